"""Trained checkpoints whose files changed since: never measured as if they were another network."""

from __future__ import annotations

from pathlib import Path

import pytest
from populations import Quiet

from pipeline.compact import compact
from pipeline.run import Run, execute, open_run, start_run

MANIFEST = """
name = "trained"
[data]
name = "digits"
samples = 8
[[train]]
network = "mlp"
width = [4, 5]
steps = 5
learning_rate = 0.1
[[measurements]]
metric = "normalized_mls"
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "m.toml").write_text(MANIFEST)
    run = start_run(tmp_path / "m.toml", str(tmp_path / "run"))
    assert execute(run, Quiet(), on="inline").failed == 0
    return run


def weights(run: Run) -> list[Path]:
    return sorted((Path(run.store.uri) / "checkpoints").rglob("model.safetensors"))


def flip(file: Path) -> bytes:
    sound = file.read_bytes()
    file.write_bytes(sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
    return sound


def test_weights_of_which_a_bit_has_turned_are_trained_again(
    run: Run, caplog: pytest.LogCaptureFixture
):
    first, _ = weights(run)
    sound = flip(first)
    planned = run.plan()
    assert [unit.spec.kind for unit in planned.units] == []  # a plan sets nothing aside
    assert len(planned.waiting) == 1
    result = execute(run, Quiet(), on="inline")
    assert "model.safetensors: not as the training left it" in caplog.text
    assert first.read_bytes() == sound
    assert (result.committed, result.failed) == (1, 0), "the training alone: its numbers stand"
    assert execute(run, Quiet(), on="inline").committed == 0


def test_weights_that_are_gone_are_trained_again(run: Run):
    first, _ = weights(run)
    sound = first.read_bytes()
    first.unlink()
    assert execute(run, Quiet(), on="inline").committed == 1
    assert first.read_bytes() == sound


def test_damaged_weights_of_a_packed_training_are_a_row_that_says_what_to_do(run: Run):
    compact(run.store)
    first, _ = weights(run)
    sound = flip(first)
    result = execute(run, Quiet(), on="inline")
    assert result.committed == 0
    (absent,) = open_run(run.store.uri).recall().unresolved
    assert "not as the training left it" in absent.reason
    assert "bring the file back from a copy" in absent.reason
    first.write_bytes(sound)
    execute(run, Quiet(), on="inline")
    assert not open_run(run.store.uri).recall().unresolved
