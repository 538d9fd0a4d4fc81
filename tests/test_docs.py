"""README.md says what is true of the code: files, series, columns, codes, links."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
import typer.main
from documents import DOCUMENTS, README, ROOT, blocks, quoted, section, tables

from pipeline import errors
from pipeline.cli import app
from pipeline.outcome import FailureClass
from pipeline.reduce import TABLE_SCHEMAS
from pipeline.schema import MEASUREMENT_SCHEMA
from tasks.measurement import Status
from tasks.registry import METRICS
from tasks.training_results import FINAL_QUANTITIES


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
    commands: Any = typer.main.get_command(app)
    assert {quoted(row["command"])[0] for row in listed} == set(commands.commands)

    metric, methods = "", {}
    for row in tables(section(README, "Choose a method"))[0]:
        metric = (quoted(row["metric"]) or [metric])[0]
        methods.setdefault(metric, []).append(quoted(row["`method`"])[0])
    assert {name: sorted(found) for name, found in methods.items()} == {
        name: sorted(typing.get_args(model.model_fields["method"].annotation))
        for name, model in METRICS.items()
        if "method" in model.model_fields
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
    sharpness = (ROOT / "tasks/grouped_stages.py").read_text()
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
    assert hosts <= {"arxiv.org", "github.com", "keepachangelog.com", "HEAD:8265"}
