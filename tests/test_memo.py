"""Tables are used again only while they are what a reduction would give."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call, files
from populations import Quiet, save_mlp, write_manifest
from pyarrow.dataset import Dataset

from pipeline import memo
from pipeline import run as running
from pipeline.compact import compact
from pipeline.errors import StoreError
from pipeline.local_store import LocalStore
from pipeline.memo import MEMO, recall, run_tables
from pipeline.run import Run, execute, open_run, start_run
from pipeline.shards import list_shards

MEASUREMENTS = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "accuracy"
[[correlations]]
x = "normalized_mls"
y = "accuracy"
"""
SQL = "select checkpoint, series, value from summary order by all"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two networks measured in several units each, and the tables of that."""
    folder = tmp_path_factory.mktemp("memo")
    for seed in range(2):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    path = write_manifest(
        folder / "m.toml", samples=32, measurements=MEASUREMENTS,
        resources="unit_seconds = 1e-6\nbatch_size = 16",
    )  # fmt: skip
    run = start_run(path, str(folder / "run"))
    execute(run, Quiet(), on="inline")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    shutil.copytree(finished, tmp_path / "run")
    run = open_run(str(tmp_path / "run"))
    run.reduce()
    return run


def answer(run: Run) -> str:
    found = call("query", run.store.uri, SQL, "--json")
    assert found.code == 0, found.err
    return found.out


def is_known(run: Run) -> bool:
    return recall(run.store) is not None


def test_tables_are_known_once_reduced_and_give_the_same_answers(run: Run):
    assert is_known(run)
    known = answer(run)
    run.store.delete(MEMO)
    assert not is_known(run)
    assert answer(run) == known
    assert is_known(run), "a query keeps what it reduced"


def test_a_query_of_known_tables_reads_no_shard_and_loads_no_torch(run: Run):
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pipeline.cli import app\n"
        "for arguments in (['query', sys.argv[1]], ['correlate', sys.argv[1]]):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
        "print([m for m in ('torch', 'ray', 'timm', 'scipy') if m in sys.modules])\n"
    )
    shutil.rmtree(Path(run.store.uri) / "specs")  # nor these
    command = [sys.executable, "-c", code, run.store.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def other_manifest(run: Run) -> None:
    run.store.put("manifest.toml", run.store.get("manifest.toml") + b"\n# another\n")


def other_specs(run: Run) -> None:
    run.store.put("resolved.json", run.store.get("resolved.json"))
    path = Path(run.store.uri) / "resolved.json"
    path.write_bytes(path.read_bytes() + b" ")


def rewritten_shard(run: Run) -> None:
    key = run.store.list("shards/")[0]
    run.store.put(key, run.store.get(key))


def touched_shard(run: Run) -> None:
    os.utime(Path(run.store.uri) / run.store.list("shards/")[0], (0, 0))


def missing_shard(run: Run) -> None:
    run.store.delete(run.store.list("shards/")[0])


def packed(run: Run) -> None:
    compact(run.store)


def other_table(run: Run) -> None:
    run.store.put("tables/matrix.parquet", run.store.get("tables/layers.parquet"))


def missing_table(run: Run) -> None:
    run.store.delete("tables/matrix.parquet")


@pytest.mark.parametrize(
    "change",
    [
        other_manifest, other_specs, rewritten_shard, touched_shard, missing_shard, packed,
        other_table, missing_table,
    ],
)  # fmt: skip
def test_whatever_changes_makes_tables_out_of_date(run: Run, change):
    change(run)
    assert not is_known(run)


def test_another_version_of_the_code_makes_tables_out_of_date(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memo, "versions", lambda: {"flatcensus": "other"})
    assert not is_known(run)


def test_tables_of_a_packed_run_are_known_and_the_same(run: Run):
    known = answer(run)
    assert call("compact", run.store.uri).code == 0
    assert run.store.list("shards/") == []
    assert is_known(run)
    assert answer(run) == known


def test_what_is_committed_while_tables_are_made_makes_them_out_of_date(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    def slow(*arguments, **named):
        found = planned_units(*arguments, **named)
        rewritten_shard(run)
        return found

    planned_units = running.planned_units
    monkeypatch.setattr(running, "planned_units", slow)
    run.reduce()
    assert not is_known(run)


@pytest.mark.parametrize("packed_first", [False, True])
def test_no_flipped_bit_gives_another_answer(run: Run, packed_first: bool):
    if packed_first:
        call("compact", run.store.uri)
    expected, rng = answer(run), random.Random(0)
    folder = Path(run.store.uri)
    good = {k: v for k, v in files(folder).items() if k.startswith(RESULTS)}
    for number in range(16):
        key = rng.choice(sorted(good))
        bad = bytearray(good[key])
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (folder / key).write_bytes(bad)
        summary = run_tables(str(folder))["summary"]
        table = summary.to_table() if isinstance(summary, Dataset) else summary
        for line in table.to_pandas().query("status != 'incomplete'").to_dict("records"):
            found = f'"series": "{line["series"]}", "value": {line["value"]!r}'
            assert found in expected, f"flip {number} in {key} changed an answer"
        restore(folder, good)


RESULTS = ("shards/", "packs/", "tables/")


def restore(folder: Path, good: dict[str, bytes]) -> None:
    """As it was; files that are as they were keep their stamps."""
    found = files(folder)
    for key in found.keys() - good.keys():
        if key.startswith(RESULTS):
            (folder / key).unlink()
    for key, data in good.items():
        if found.get(key) != data:
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)


def test_a_folder_that_cannot_be_written_can_be_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    known = answer(run)
    run.store.delete(MEMO)

    def refuse(*_: object) -> None:
        raise StoreError("read-only")

    monkeypatch.setattr(LocalStore, "put", refuse)
    assert answer(run) == known
    assert "not kept for the next question: read-only" in caplog.text


def test_compact_and_verify_say_what_they_did(run: Run):
    uri, count = run.store.uri, len(run.store.list("shards/"))
    done = call("compact", uri, "--json")
    assert done.code == 0
    assert done.records == [
        {"units": count, "packs": 1, "merged": 0, "duplicates": 0, "nondeterminism": [],
         "quarantined": []}
    ]  # fmt: skip
    assert done.next_step.startswith("flatcensus query")
    assert "nothing to pack" in call("compact", uri).err
    assert f"0 sound shards, {count} units in 1 sound pack, 0 damaged" in call("verify", uri).err
    path = next((Path(uri) / "packs").glob("*.rows.parquet"))
    path.write_bytes(path.read_bytes()[:-1])
    found = call("verify", uri)
    assert found.code == 3
    assert f"{count} of its {count} units are to do again" in found.out
    assert found.next_step.startswith("flatcensus resume")
    assert list_shards(run.store) == {}
    execute(run, Quiet(), on="inline")
    assert sum(map(len, list_shards(run.store).values())) == count
