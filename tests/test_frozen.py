"""A run folder speaks for itself: without its weights and images, wherever it is copied."""

import shutil
from pathlib import Path

import pytest
from commands import call
from populations import Quiet, save_mlp, write_manifest

from pipeline.frozen import FROZEN, thaw
from pipeline.resolve import resolve
from pipeline.run import Run, execute, open_run, start_run

TRAIN = '[[train]]\nnetwork = "mlp"\nwidth = 8\ndepth = 1\nsteps = 3\n'


@pytest.fixture
def run(tmp_path: Path) -> Run:
    save_mlp(tmp_path / "here/checkpoints/mlp0")
    manifest = write_manifest(tmp_path / "here/m.toml", samples=8, extra=TRAIN)
    run = start_run(manifest, str(tmp_path / "here/run"))
    execute(run, Quiet(), on="inline")
    return run


def test_the_specs_come_back_as_they_were_resolved(run: Run):
    known, now = thaw(run.manifest, run.store), resolve(run.manifest, run.store)
    assert known is not None
    assert [s.key for s in known.specs] == [s.key for s in now.specs]
    for ours, theirs in zip(known.specs, now.specs, strict=True):
        assert (ours.ref, ours.entry, ours.train, ours.data, ours.stages()) == (
            theirs.ref, theirs.entry, theirs.train, theirs.data, theirs.stages(),
        )  # fmt: skip
        assert ours.network.forward_flops == theirs.network.forward_flops
        assert ours.network.layers == theirs.network.layers != ()
    assert not known.untrained


def test_a_copied_run_is_read_without_its_checkpoints(run: Run, tmp_path: Path):
    before = call("query", run.store.uri, "--json")
    copy = tmp_path / "elsewhere"
    shutil.copytree(run.store.uri, copy)
    shutil.rmtree(tmp_path / "here")
    shutil.rmtree(copy / "checkpoints")
    for command in ("status", "correlate", "report"):
        assert call(command, copy).code == 0
    assert call("query", copy, "--json").records == before.records
    assert call("resume", copy, "--on", "inline").code == 3  # now the checkpoints are missed


def test_another_manifest_or_a_finished_training_is_resolved_anew(run: Run, tmp_path: Path):
    assert thaw(run.manifest, run.store) is not None
    changed = write_manifest(tmp_path / "here/m.toml", samples=9, extra=TRAIN)
    assert thaw(start_run(changed, run.store.uri).manifest, run.store) is None
    run.store.path(FROZEN).unlink()
    assert thaw(run.manifest, run.store) is None
    assert not open_run(run.store.uri).recall().units
