"""Where a run stands, told without a plan: the same as the plan says, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from populations import Quiet, save_mlp, write_manifest

from pipeline.decisions import DECISIONS
from pipeline.progress import plan_standing
from pipeline.run import Run, execute, start_run
from pipeline.schema import Failure
from pipeline.shards import list_shards
from pipeline.standing import FROZEN, standing
from pipeline.worker import write_failure

TWINS = (
    '[[measurements]]\nmetric = "adaptive_sharpness"\ntarget_relative_stderr = 1e-9\n'
    'max_draws = {}\n'
)  # fmt: skip
MEASUREMENTS = (
    '[[measurements]]\nmetric = "normalized_mls"\n'
    + TWINS.format(4)
    + TWINS.format(8)
    + 'label = "long"\n'
)
TRAIN = '[[train]]\nnetwork = "mlp"\nwidth = 8\ndepth = 1\nsteps = 3\n'


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two networks that are equal, one that is broken, one that is trained; all is done."""
    for name in ("a", "b"):
        save_mlp(tmp_path / f"checkpoints/{name}")
    save_mlp(tmp_path / "checkpoints/broken")
    (tmp_path / "checkpoints/broken/config.json").write_text("{}")
    manifest = write_manifest(
        tmp_path / "m.toml", samples=70, measurements=MEASUREMENTS, extra=TRAIN,
        resources="unit_seconds = 1e-6\nbatch_size = 8",
    )  # fmt: skip
    run = start_run(manifest, str(tmp_path / "run"))
    execute(run, Quiet(), on="inline")
    return run


def told(run: Run) -> None:
    found = standing(run.store)
    assert found is not None
    assert found == plan_standing(run.recall())


def test_what_is_told_is_what_the_plan_says_whatever_is_missing_or_failed(run: Run):
    told(run)
    found = standing(run.store)
    assert found is not None
    assert (found.num_units, found.num_failed) == (0, 1)
    assert found.unresolved[0].checkpoint == "broken"
    for number in (3, 5, 7):
        for names in list_shards(run.store).values():
            for name in names[2::number]:
                run.store.delete(name.key)
        told(run)
    for unit in list(run.recall().units)[::2]:
        write_failure(run.store, unit, Failure(class_="crash", type="Died", message="x"))
    told(run)
    again = standing(run.store)
    assert again is not None
    assert again.num_units > 0
    assert again.num_failed > 1
    assert {line["measurement"] for line in again.lines()} == {
        "training", "normalized_mls", "adaptive_sharpness", "adaptive_sharpness@long",
        "(checkpoints not to be had)",
    }  # fmt: skip


def test_a_checkpoint_that_waits_for_its_training_is_told(tmp_path: Path):
    manifest = write_manifest(tmp_path / "m.toml", samples=8, checkpoints="none/*", extra=TRAIN)
    text = manifest.read_text()
    manifest.write_text(text.replace('[[checkpoints]]\nsource = "local"\npaths = ["none/*"]\n', ""))
    run = start_run(manifest, str(tmp_path / "run"))
    execute(run, Quiet(), on="inline")
    assert standing(run.store) is not None
    frozen = run.store.get(FROZEN)
    for names in list_shards(run.store).values():
        for name in names:
            run.store.delete(name.key)
    assert standing(run.store) is not None
    # As it was before the training had ended.
    from pipeline.frozen import freeze
    from pipeline.resolve import resolve

    freeze(resolve(run.manifest, run.store), run.manifest, run.store)
    assert run.store.get(FROZEN) != frozen
    found = standing(run.store)
    assert found is not None
    assert (found.num_waiting, found.num_units) == (1, 1)
    told(run)


def test_a_plan_must_say_what_the_folder_does_not(run: Run, monkeypatch: pytest.MonkeyPatch):
    kept = {key: run.store.get(key) for key in (DECISIONS, FROZEN, "manifest.toml")}
    assert standing(run.store) is not None
    run.store.delete(DECISIONS)
    assert standing(run.store) is None, "nobody knows whether the looks sufficed"
    run.store.put(DECISIONS, kept[DECISIONS])
    for key, content in (
        ("manifest.toml", kept["manifest.toml"] + b"\n"),
        (FROZEN, kept[FROZEN].replace(b"mlp", b"nlp", 1)),
        (FROZEN, b"{}"),
    ):
        run.store.put(key, content)
        assert standing(run.store) is None
        run.store.put(key, kept[key])
    assert standing(run.store) is not None
    monkeypatch.setattr("pipeline.standing.code_version", lambda: "another")
    assert standing(run.store) is None


def test_status_needs_neither_torch_nor_timm(run: Run):
    program = (
        "import sys\n"
        "from pipeline.cli import app\n"
        "try:\n    app(['status', sys.argv[1]])\n"
        "except SystemExit as end:\n"
        "    assert not {'torch', 'timm', 'ray', 'scipy'} & set(sys.modules)\n"
        "    print('code', end.code)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, run.store.uri], capture_output=True, text=True,
        check=False, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert "code 3" in answer.stdout, answer.stderr
    assert "adaptive_sharpness@long" in answer.stdout
