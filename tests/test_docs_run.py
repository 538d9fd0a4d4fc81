"""What the README shows works: commands, snippets, and the run folder it describes."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer.main
from commands import call
from documents import README, blocks, quoted, section, tables
from hub_world import NAMES, point, served, write_census
from populations import Quiet, save_mlp, write_manifest
from s3_servers import s3_server, use_s3

from pipeline.cli import app
from pipeline.outputs import write_outputs
from pipeline.reduce import TABLE_SCHEMAS
from pipeline.run import execute, open_run, start_run
from pipeline.shards import verify
from tasks.checkpoints import describe_local, load_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands can be given as they are."""
    folder = tmp_path_factory.mktemp("place")
    for seed in range(3):
        save_mlp(folder / f"mlps/mlp{seed}", seed=seed)
    measured = "\n".join(
        f"[[measurements]]\n{text}"
        for text in (
            'metric = "normalized_mls"',
            'metric = "normalized_mls"\nmethod = "dense"',
            'metric = "adaptive_sharpness"\nmax_draws = 4',
        )
    )
    pair = '[[correlations]]\nx = "normalized_mls"\ny = "adaptive_sharpness"\n'
    for name in ("demo", "my-audit", "fashion-vits"):
        write_manifest(
            folder / f"{name}.toml", checkpoints="mlps/*", samples=16, measurements=measured,
            extra=pair,
        )  # fmt: skip
    write_census(folder / "census.toml", *NAMES[:2])
    (folder / "manifests").mkdir()
    text = (folder / "fashion-vits.toml").read_text().replace("mlps/*", "../mlps/*")
    (folder / "manifests/fashion-vits.toml").write_text(text)
    launch(folder / "demo.toml", folder / "runs/demo")
    shutil.copytree(folder / "runs/demo", folder / "loose")
    return folder


@pytest.fixture
def loose(place: Path) -> Path:
    """The same with the demo's shards as they were: a command of the README packs them."""
    shutil.rmtree(place / "runs/demo")
    shutil.copytree(place / "loose", place / "runs/demo")
    return place


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the bucket that the README's commands name."""
    with s3_server("moto", tmp_path_factory.mktemp("moto")) as address:
        yield address


def launch(manifest: Path, folder: Path) -> None:
    run = start_run(manifest, str(folder))
    execute(run, Quiet(), on="inline")
    plan, result = run.reduce()
    write_outputs(run, plan, result)


def group() -> Any:
    """The command line as click sees it."""
    return typer.main.get_command(app)


def shown() -> list[tuple[str, list[str]]]:
    """Commands in the README's console blocks, each with the output that is shown."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(README, "console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
    return found


OURS = [(line, output) for line, output in shown() if line.startswith("flatcensus ")]
# Unless told otherwise. What logs shows, a cluster has left: see test_cluster.py.
STARTS_RAY = {"demo", "launch", "train", "resume", "logs"}
CHEAP = [
    (line, output)
    for line, output in OURS
    if line.split()[1] not in STARTS_RAY or "--on inline" in line
]


def test_console_blocks_show_known_programs():
    assert {line.split()[0] for line, _ in shown()} == {"flatcensus", "pip", "make"}
    assert {line.split()[1] for line, _ in OURS} == set(group().commands) - {"report"}


@pytest.mark.parametrize("line", [line for line, _ in OURS])
def test_command_lines_have_options_that_exist(line: str):
    _, name, *arguments = shlex.split(line)
    assert group().commands[name].make_context(name, arguments).info_name == name


@pytest.mark.parametrize(("line", "output"), CHEAP, ids=[line for line, _ in CHEAP])
def test_commands_run_and_print_what_is_shown(
    line: str,
    output: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    monkeypatch.chdir(place)
    if "s3://" in line:
        use_s3(monkeypatch, request.getfixturevalue("bucket"))
    with served(*NAMES[:2]) as hub:
        point(hub, monkeypatch, place)
        answer = call(*shlex.split(line)[1:])
    assert answer.code == 0, answer.err
    if output:
        printed = {form(text) for text in (answer.out + answer.err).splitlines()}
        assert form(output[0]) in printed


def form(line: str) -> tuple[str, ...]:
    """A line without its figures and its spacing."""
    return tuple(re.sub(r"\d+", "0", line).split())


def test_snippets_run(loose: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(loose)
    snippets = blocks(README, "python")
    assert len(snippets) == 4
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^mlp2 ", printed, re.M), "the pivot table"
    assert "width" in printed, "the answer of DuckDB"
    assert printed.count(" adaptive_sharpness ") >= 6, "a line per shard: three nets, two looks"
    loaded = load_checkpoint(describe_local(loose / "checkpoints/vit-64"))
    assert (loaded.num_outputs, loaded.data_config["input_size"][-1]) == (10, 64)


def test_the_digest_snippet_notices_one_flipped_bit(loose: Path, tmp_path: Path, monkeypatch):
    (snippet,) = [s for s in blocks(README, "python") if "sha256" in s]
    shard = min((loose / "runs/demo/shards").rglob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    copy = tmp_path / "runs/demo/shards/key" / shard.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        exec(compile(snippet, "README.md", "exec"), {})


def path_patterns() -> list[re.Pattern[str]]:
    """The documented paths of a run folder as regular expressions."""
    words = {
        "spec_key": "[0-9a-f]{24}", "first": "[0-9]+", "stop": "[0-9]+", "draw": "[0-9]+",
        "k": "[0-9]+", "n": "[0-9]+", "name": "[0-9x-]+(?:[.]failed-[0-9]+)?", "x": "[^/]+",
        "launch": "[0-9T]+-[0-9a-f]{6}", "digest": "[0-9a-f]+", "id": "[0-9a-f]+",
        "time": "[0-9]+", "nonce": "[0-9a-f]+", "rows, units": "rows|units",
        "file": "[^/]+", "table": "|".join(TABLE_SCHEMAS), "y": "[^/]+",
        "svg, png, pdf": "svg|png|pdf",
    }  # fmt: skip
    patterns = []
    for row in tables(section(README, "The run folder"))[0]:
        (path,) = quoted(row["path"])
        parts = re.split(r"<([^>]+)>", path + ("config.json" if path.endswith("/") else ""))
        text = "".join(f"(?:{words[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts))
        patterns.append(re.compile(text))
    return patterns


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a training, a failed checkpoint and a damaged shard."""
    folder = tmp_path_factory.mktemp("eventful")
    save_mlp(folder / "mlps/bad", change=lambda model: next(model.parameters()).fill_(float("nan")))
    save_mlp(folder / "mlps/good")
    manifest = write_manifest(
        folder / "eventful.toml", checkpoints="mlps/*", samples=8,
        measurements='[[measurements]]\nmetric = "adaptive_sharpness"\nmax_draws = 4\n',
        extra='[[train]]\nnetwork = "mlp"\nwidth = 4\ndepth = 1\nsteps = 3\neval_every = 0\n'
        '[[correlations]]\nx = "squared_error"\ny = "adaptive_sharpness"\n',
    )  # fmt: skip
    run = folder / "run"
    launch(manifest, run)
    shard = max((run / "shards").rglob("*x2-4.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (damaged,) = verify(open_run(str(run)).store)
    assert damaged.key.endswith(shard.name)
    return run


def test_every_file_of_a_run_is_documented_and_every_documented_file_exists(eventful: Path):
    files = [str(p.relative_to(eventful)) for p in eventful.rglob("*") if p.is_file()]
    files = [f.replace("model.safetensors", "config.json") for f in files]
    patterns = path_patterns()
    assert [f for f in files if not any(p.fullmatch(f) for p in patterns)] == []
    unused = [p.pattern for p in patterns if not any(p.fullmatch(f) for f in files)]
    # Logs of detached launches; test_packs has packs.
    kept = [p for p in unused if "launches/" not in p and "packs/" not in p]
    assert kept == [re.escape("hub.lock.json")], "only a run with hub checkpoints has that"


def test_tables_have_the_documented_types_whatever_they_hold(eventful: Path, place: Path):
    for run in (eventful, place / "runs/demo"):
        for name, schema in TABLE_SCHEMAS.items():
            found = pq.read_schema(run / f"tables/{name}.parquet")
            assert found.equals(schema), name
    assert pq.read_table(eventful / "tables/failures.parquet").num_rows == 1
    assert pq.read_table(place / "runs/demo/tables/failures.parquet").num_rows == 0


def test_figures_of_pairs_that_left_the_manifest_go(tmp_path: Path):
    save_mlp(tmp_path / "mlps/mlp0")
    pairs = [
        f'[[correlations]]\nx = "normalized_mls"\ny = "mls"\ntransform_y = "{scale}"\n'
        for scale in ("log", "sqrt")
    ]
    figures = tmp_path / "run/figures"
    for kept in (pairs, pairs[:1]):
        manifest = write_manifest(
            tmp_path / "m.toml", checkpoints="mlps/*", samples=2, extra="".join(kept),
            measurements='[[measurements]]\nmetric = "normalized_mls"\n',
        )  # fmt: skip
        launch(manifest, tmp_path / "run")
        (figures / "mine.png").write_bytes(b"")
        assert len(list(figures.glob("*_against_*.png"))) == len(kept)
    assert (figures / "mine.png").exists()


def test_plan_names_the_field_that_makes_results_stale(place: Path, monkeypatch):
    monkeypatch.chdir(place)
    changed = (place / "demo.toml").read_text().replace("max_draws = 4", "max_draws = 4\nrho = 0.2")
    (place / "changed.toml").write_text(changed)
    answer = call("plan", "changed.toml", "--run", "runs/demo")
    assert "stale: mlp0 adaptive_sharpness (measurement.rho 0.1 -> 0.2)" in answer.err
    more = (place / "demo.toml").read_text().replace("max_draws = 4", "max_draws = 8")
    (place / "more.toml").write_text(more)
    assert "stale" not in call("plan", "more.toml", "--run", "runs/demo").err
