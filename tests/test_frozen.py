"""A run folder speaks for itself: without its weights and images, wherever it is copied."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from commands import call
from populations import Quiet, save_mlp, write_manifest

from pipeline.errors import StoreError
from pipeline.frozen import FROZEN, freeze, thaw
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


def test_equal_parts_of_specs_are_kept_once(tmp_path: Path):
    many = '[[measurements]]\nmetric = "nmls"\nlabel = "m{}"\nmax_iterations = {}\n'
    sizes = {}
    for number in (1, 5):
        for seed in range(number):
            save_mlp(tmp_path / f"{number}/checkpoints/mlp{seed}", seed=seed)
        manifest = write_manifest(
            tmp_path / f"{number}/m.toml", samples=8,
            measurements="".join(many.format(i, 50 + i) for i in range(number)),
        )  # fmt: skip
        run = start_run(manifest, str(tmp_path / f"{number}/run"))
        resolved = resolve(run.manifest, run.store)
        assert len({id(spec.network) for spec in resolved.specs}) == 1
        freeze(resolved, run.manifest, run.store)
        sizes[number] = len(run.store.get(FROZEN)) / len(resolved.specs)
        known = thaw(run.manifest, run.store)
        assert known is not None
        assert len({id(spec.network) for spec in known.specs}) == 1
        assert [s.fields for s in known.specs] == [s.fields for s in resolved.specs]
        assert known.specs[0].network == resolved.specs[0].network
    assert sizes[5] < sizes[1] / 3, "the network is written once, not 25 times"


def test_what_an_older_flatcensus_kept_is_read(run: Run):
    """It wrote each spec in full, and no digest."""
    now = thaw(run.manifest, run.store)
    document = json.loads(run.store.get(FROZEN))["known"]
    values, columns = document.pop("values"), document.pop("columns")
    own = ("key", "checkpoint", "measurement", "train")
    records = []
    for row in document["specs"]:
        record = {
            name: item if name in own else values[item]
            for name, item in zip(columns, row, strict=False)
            if name != "stored"
        }
        places = row[len(columns) :]
        names = record.pop("names of fields")
        records.append(
            record | {"fields": {n: values[p] for n, p in zip(names, places, strict=True)}}
        )
    document["specs"] = records
    run.store.put(FROZEN, json.dumps(document, indent=1).encode())
    known = thaw(run.manifest, run.store)
    assert known is not None
    assert now is not None
    assert [dataclasses.replace(s, stored=None) for s in now.specs] == list(known.specs)


def test_a_flipped_bit_is_no_other_checkpoint(run: Run):
    content = run.store.get(FROZEN)
    for place in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[place] ^= 1
        run.store.put(FROZEN, bytes(flipped))
        with pytest.raises(StoreError, match=r"resolved\.json is damaged"):
            thaw(run.manifest, run.store)


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
