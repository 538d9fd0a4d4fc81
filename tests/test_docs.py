"""README.md and manifests/README.md say what is true: keys, defaults, columns, files, commands."""

from __future__ import annotations

import ast
import re
import shlex
import types
import typing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer.main
from commands import call
from populations import Quiet, save_mlp, write_manifest

from pipeline import errors
from pipeline.cli import app
from pipeline.correlate import CorrelationPair
from pipeline.manifest import DataSpec, LocalEntry, ResourceSpec, TimmEntry, _Head, parse_manifest
from pipeline.outcome import FailureClass
from pipeline.outputs import write_outputs
from pipeline.reduce import TABLE_SCHEMAS
from pipeline.run import execute, open_run, start_run, verify
from pipeline.schema import MEASUREMENT_SCHEMA
from tasks.checkpoints import describe_local, load_checkpoint
from tasks.measurement import Status
from tasks.registry import METRICS
from tasks.training_results import FINAL_QUANTITIES
from tasks.training_settings import NETWORK_DEFAULTS, OPTIMIZER_DEFAULTS, TrainSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "manifests/README.md").read_text()
DOCUMENTS = {"README.md": README, "manifests/README.md": REFERENCE}
DOCUMENTS["CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text()

Table = list[dict[str, str]]


def section(text: str, title: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$\n", text, re.M)
    assert found, f"no heading {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def tables(text: str) -> list[Table]:
    """All Markdown tables of a text, each a list of rows by column title."""
    found: list[Table] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        assert all(len(line) == len(head) for line in lines), f"ragged table: {head}"
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def default(cell: str) -> Any:
    """A documented default: a literal in backticks, or words, which stand for None."""
    literal = re.fullmatch(r"`([^`]+)`", cell)
    return ast.literal_eval(literal[1]) if literal else None


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_fields(model: Any, rows: Table, *, besides: tuple[str, ...] = ()) -> None:
    """Every field has a row with its default and kind, and there is no other row."""
    documented = {quoted(row["key"])[0]: row for row in rows}
    assert len(documented) == len(rows)
    assert set(documented) - set(besides) == set(model.model_fields)
    for name, field in model.model_fields.items():
        row = documented[name]
        assert (row["default"] == "*required*") == field.is_required(), name
        if not field.is_required() and field.default_factory is None:
            expected = field.default
            if isinstance(expected, ResourceSpec):
                expected = None
            assert default(row["default"]) == plain(expected), name
        check_kind(name, field.annotation, row["type"])


def check_kind(name: str, annotation: Any, cell: str) -> None:
    """The documented type fits the annotation: choices in full, numbers as numbers."""
    kinds = parts(annotation)
    choices = {c for k in kinds if typing.get_origin(k) is typing.Literal for c in k.__args__}
    assert set(re.findall(r'`"([^"]+)"`', cell)) == choices, name
    words = {int: "integer", float: "number"}
    for kind in kinds & set(words):
        assert cell.startswith(words[kind]), name
    if str in kinds and not choices:
        assert re.match("string|path|list of (strings|paths)", cell), name


def parts(annotation: Any) -> set[Any]:
    """The types in a union, a list or an annotated type; Literals stay whole."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return parts(annotation.__origin__)
    if origin in (typing.Union, types.UnionType, list, tuple):
        return set().union(*(parts(a) for a in typing.get_args(annotation) if a is not Ellipsis))
    return {annotation} - {type(None)}


# ---- the manifest reference ----


def test_every_top_level_key_is_documented():
    (rows,) = tables(section(REFERENCE, "Top level"))
    check_fields(_Head, rows)


def test_every_key_of_data_and_resources_is_documented():
    check_fields(DataSpec, tables(section(REFERENCE, "data"))[0])
    check_fields(ResourceSpec, tables(section(REFERENCE, "resources"))[0])
    assert {row["role"] for row in tables(section(REFERENCE, "resources"))[0]} == {"resources"}


def test_every_key_of_checkpoints_and_correlations_is_documented():
    local, timm = tables(section(REFERENCE, "checkpoints"))
    check_fields(LocalEntry, local)
    check_fields(TimmEntry, timm)
    check_fields(CorrelationPair, tables(section(REFERENCE, "correlations"))[0])


def test_every_measurement_setting_is_documented_with_its_default_and_its_part_in_the_key():
    generic = tables(section(REFERENCE, "measurements"))[0]
    assert [quoted(row["key"]) for row in generic] == [["metric"], ["label"]]
    assert set(re.findall(r'`"(\w+)"`', generic[0]["meaning"])) == set(METRICS)
    for metric, model in METRICS.items():
        (rows,) = tables(section(REFERENCE, metric))
        check_fields(model, rows)
        coverage = {quoted(r["key"])[0] for r in rows if r["role"] == "coverage"}
        assert coverage == model.coverage_fields
        assert {r["role"] for r in rows} <= {"key", "coverage"}
        assert set(model.quantities) <= set(quoted(section(REFERENCE, metric)))


def test_every_training_setting_is_documented_with_its_defaults():
    special, common, networks, optimizers = tables(section(REFERENCE, "train"))
    assert [quoted(row["key"])[0] for row in special] == ["name", "family", "data"]
    owned = {quoted(row["key"])[0] for row in networks + optimizers}
    fields = dict(TrainSettings.model_fields)
    shared = types.SimpleNamespace(
        model_fields={k: f for k, f in fields.items() if k not in owned or k == "learning_rate"}
    )
    check_fields(shared, common)
    assert {quoted(row["key"])[0] for row in common} | owned == set(fields)
    assert {row["role"] for row in common + networks + optimizers} == {"key"}
    for rows, defaults in ((networks, NETWORK_DEFAULTS), (optimizers, OPTIMIZER_DEFAULTS)):
        for owner, expected in defaults.items():
            cells = {quoted(row["key"])[0]: row[f"`{owner}`"] for row in rows}
            found = {key: default(cell) for key, cell in cells.items() if cell != "–"}
            assert found == expected, owner
        for row in rows:
            check_kind(row["key"], fields[quoted(row["key"])[0]].annotation, row["type"])


def test_roles_are_those_that_are_explained():
    (roles,) = [t for t in tables(REFERENCE) if list(t[0]) == ["role", "what a change does"]]
    explained = {row["role"] for row in roles}
    used = {row["role"] for t in tables(REFERENCE) if "key" in t[0] for row in t}
    assert used == explained == {"key", "content", "coverage", "resources", "name"}


@pytest.mark.parametrize("document", ["README.md", "manifests/README.md"])
def test_every_example_manifest_is_valid(document: str):
    examples = blocks(DOCUMENTS[document], "toml")
    assert len(examples) >= 2
    for text in examples:
        if not re.search("^name =", text.partition("[")[0], re.M):
            text = f'name = "example"\ndata = {{ name = "digits" }}\n{text}'
        if "[[train]]" not in text and "[[checkpoints]]" not in text:
            text += '\n[[train]]\nnetwork = "mlp"\n'
        parse_manifest(text, where=document, root=Path("/nowhere"), folders=())


def test_grid_names_are_the_ones_that_the_reference_shows():
    (grid,) = [t for t in blocks(REFERENCE, "toml") if "w{width}" in t]
    text = f'name = "example"\ndata = {{ name = "digits" }}\n{grid}'
    names = [t.name for t in parse_manifest(text, where="m", root=Path("/nowhere")).train]
    assert len(names) == 6
    assert names[0] == "w64-lr0.1-s0"
    assert "named `w64-lr0.1-s0`" in REFERENCE


def test_numbers_of_another_type_are_refused_as_stated():
    assert '`samples = "100"` and `samples = 100.0` are refused' in REFERENCE
    for value in ('"100"', "100.0"):
        text = f'name = "a"\n[data]\nname = "digits"\nsamples = {value}\n[[train]]\nnetwork="mlp"\n'
        with pytest.raises(errors.ManifestError, match="samples"):
            parse_manifest(text, where="m", root=Path("/nowhere"))


# ---- the README against the code ----


def test_the_tree_names_every_source_file_and_no_other():
    (tree,) = [t for t in blocks(README, "text") if "THE MATHEMATICS" in t]
    for package in ("tasks", "pipeline"):
        part = re.search(rf"^{package}/ .*\n((?:^  .*\n)+)", tree, re.M)
        assert part, package
        named = [n for line in part[1].splitlines() for n in re.findall(r"\S+", line[:29])]
        present = {
            p.name for p in (ROOT / package).iterdir() if p.suffix in (".py", ".toml", ".j2")
        }
        assert sorted(named) == sorted(present)
    for line in tree.splitlines():
        if line and not line.startswith(" "):
            for name in re.findall(r"\S+", line if line.startswith("README") else line[:29]):
                assert (ROOT / name).exists(), name


def test_every_series_command_method_status_and_exit_code_is_listed():
    series = [quoted(row["series"]) for row in tables(section(README, "What it measures"))[0]]
    quantities = {q for model in METRICS.values() for q in model.quantities}
    assert {name for names in series for name in names} == quantities | set(FINAL_QUANTITIES)

    statuses = tables(section(README, "What it measures"))[1][-1]
    assert {*(s.value for s in Status), "failed"} < set(quoted(statuses["meaning"]))

    (listed,) = [t for t in tables(README) if "command" in t[0]]
    assert {quoted(row["command"])[0] for row in listed} == set(group().commands)

    metric, methods = "", {}
    for row in tables(section(README, "Choose a method"))[0]:
        metric = (quoted(row["metric"]) or [metric])[0]
        methods.setdefault(metric, []).append(quoted(row["`method`"])[0])
    assert {name: sorted(found) for name, found in methods.items()} == {
        name: sorted(typing.get_args(model.model_fields["method"].annotation))
        for name, model in METRICS.items()
    }

    classes, codes = tables(section(README, "When something fails"))
    documented = {quoted(row["`failure_class`"])[0] for row in classes}
    assert documented == {*typing.get_args(FailureClass), "unresolved"}
    expected = {v for k, v in vars(errors).items() if k.startswith("EXIT_")}
    assert {int(row["exit code"]) for row in codes} == expected


@pytest.mark.parametrize("name", ["shards", *TABLE_SCHEMAS])
def test_every_column_is_listed_in_order(name: str):
    part = README.partition(f"<!-- columns:{name} -->")[2].partition("<!-- ")[0]
    (rows,) = tables(part)
    columns = [column for row in rows for column in quoted(row["column"])]
    schema = MEASUREMENT_SCHEMA if name == "shards" else TABLE_SCHEMAS[name]
    if name == "units":  # grouped by meaning there
        assert sorted(columns) == sorted(schema.names)
    else:
        assert columns == schema.names


def test_stated_coverage_is_the_one_that_was_measured():
    correlation = (ROOT / "tasks/correlation.py").read_text()
    sharpness = (ROOT / "tasks/adaptive_sharpness.py").read_text()
    for figure in ("88 to 100 %, median 96 %", "85 %"):
        assert figure in correlation
        assert figure in README
    assert "8, 32, 64 groups on covers 90, 92, 93.5 %" in sharpness
    assert (
        "8, 32 and 64 groups on let the 95 % interval\ncover the truth in 90, 92 and 93.5 %"
        in README
    )


def test_links_lead_somewhere():
    for document, text in DOCUMENTS.items():
        anchors = {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif not target.startswith("https://"):
                assert (ROOT / Path(document).parent / target.partition("#")[0]).exists(), target


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    used = re.findall(r"`make ([\w-]+)`|^\$ make ([\w-]+)$", README, re.M)
    assert used
    assert {a or b for a, b in used} <= set(targets)


def test_documents_name_no_machine():
    places = r"/(?:work|tmp|root|home|mnt|venvs)\b|localhost|127\.0\.0\.1|\bpypi\b|\bmirror\b"
    for document, text in DOCUMENTS.items():
        assert not re.search(places, text, re.I), document
    hosts = {h for text in DOCUMENTS.values() for h in re.findall(r"https?://([^/\s)]+)", text)}
    assert hosts <= {"arxiv.org", "github.com", "keepachangelog.com"}


# ---- commands and snippets, run ----


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
    (folder / "manifests").mkdir()
    text = (folder / "fashion-vits.toml").read_text().replace("mlps/*", "../mlps/*")
    (folder / "manifests/fashion-vits.toml").write_text(text)
    launch(folder / "demo.toml", folder / "runs/demo")
    return folder


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
STARTS_RAY = {"demo", "launch", "train", "resume"}  # unless told otherwise
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
    group().commands[name].make_context(name, arguments)


@pytest.mark.parametrize(("line", "output"), CHEAP, ids=[line for line, _ in CHEAP])
def test_commands_run_and_print_what_is_shown(
    line: str, output: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    answer = call(*shlex.split(line)[1:])
    assert answer.code == 0, answer.err
    if output:
        printed = {form(text) for text in (answer.out + answer.err).splitlines()}
        assert form(output[0]) in printed


def form(line: str) -> tuple[str, ...]:
    """A line without its figures and its spacing."""
    return tuple(re.sub(r"\d+", "0", line).split())


def test_snippets_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(place)
    snippets = blocks(README, "python")
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^mlp2 ", printed, re.M), "the pivot table"
    assert "width" in printed, "the answer of DuckDB"
    assert printed.count(" adaptive_sharpness ") >= 6, "a line per shard: three nets, two looks"
    loaded = load_checkpoint(describe_local(place / "checkpoints/vit-64"))
    assert (loaded.num_outputs, loaded.data_config["input_size"][-1]) == (10, 64)


def test_the_digest_snippet_notices_one_flipped_bit(place: Path, tmp_path: Path, monkeypatch):
    (snippet,) = [s for s in blocks(README, "python") if "sha256" in s]
    shard = min((place / "runs/demo/shards").rglob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    copy = tmp_path / "runs/demo/shards/key" / shard.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        exec(compile(snippet, "README.md", "exec"), {})


# ---- the run folder ----


def path_patterns() -> list[re.Pattern[str]]:
    """The documented paths of a run folder as regular expressions."""
    words = {
        "spec_key": "[0-9a-f]{24}", "first": "[0-9]+", "stop": "[0-9]+", "draw": "[0-9]+",
        "k": "[0-9]+", "n": "[0-9]+", "name": "[0-9x-]+(?:[.]failed-[0-9]+)?", "x": "[^/]+",
        "table": "|".join(TABLE_SCHEMAS), "y": "[^/]+", "svg, png, pdf": "svg|png|pdf",
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
    assert unused == [re.escape("hub.lock.json")], "only a run with hub checkpoints has that"


def test_tables_have_the_documented_types_whatever_they_hold(eventful: Path, place: Path):
    for run in (eventful, place / "runs/demo"):
        for name, schema in TABLE_SCHEMAS.items():
            found = pq.read_schema(run / f"tables/{name}.parquet")
            assert found.equals(schema), name
    assert pq.read_table(eventful / "tables/failures.parquet").num_rows == 1
    assert pq.read_table(place / "runs/demo/tables/failures.parquet").num_rows == 0


def test_plan_names_the_field_that_makes_results_stale(place: Path, monkeypatch):
    monkeypatch.chdir(place)
    changed = (place / "demo.toml").read_text().replace("max_draws = 4", "max_draws = 4\nrho = 0.2")
    (place / "changed.toml").write_text(changed)
    answer = call("plan", "changed.toml", "--run", "runs/demo")
    assert "stale: mlp0 adaptive_sharpness (measurement.rho 0.1 -> 0.2)" in answer.err
    more = (place / "demo.toml").read_text().replace("max_draws = 4", "max_draws = 8")
    (place / "more.toml").write_text(more)
    assert "stale" not in call("plan", "more.toml", "--run", "runs/demo").err
