"""manifests/README.md says what is true: every key, its type, default and role."""

from __future__ import annotations

import ast
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS, REFERENCE, Table, blocks, quoted, section, tables

from pipeline.correlate import CorrelationPair
from pipeline.errors import ManifestError
from pipeline.manifest import DataSpec, LocalEntry, ResourceSpec, TimmEntry, _Head, parse_manifest
from pipeline.matrix import PairPlot
from tasks.families import DEFAULTS, FAMILIES, TRAITS, traits_of
from tasks.registry import METRICS
from tasks.training_settings import NETWORK_DEFAULTS, OPTIMIZER_DEFAULTS, TrainSettings


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


def test_every_key_of_the_pair_plot_is_documented():
    check_fields(PairPlot, tables(section(REFERENCE, "pair_plot"))[0])


def test_every_measurement_setting_is_documented_with_its_default_and_its_part_in_the_key():
    generic = tables(section(REFERENCE, "measurements"))[0]
    assert [quoted(row["key"]) for row in generic] == [["metric"], ["label"]]
    assert set(re.findall(r'`"(\w+)"`', generic[0]["meaning"])) == set(METRICS)
    for metric, model in METRICS.items():
        (rows,) = tables(section(REFERENCE, metric)) or [[]]  # no table: no settings
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


def test_the_tables_of_families_are_the_data():
    listed, choices = tables(section(REFERENCE, "families"))
    assert [(quoted(r["family"]), quoted(r["for example"])) for r in listed] == [
        ([name], [m.architecture for m in members]) for name, members in FAMILIES.items()
    ]
    assert [tuple(quoted(r["special"])) for r in listed] == [traits_of(name) for name in FAMILIES]
    known = {**DEFAULTS, **{f"`{name}`": choice for name, choice in TRAITS.items()}}
    assert [r[""] for r in choices] == list(known)
    for row, choice in zip(choices, known.values(), strict=True):
        assert (row["what is done"], row["why"]) == (choice.done, choice.reason)
        assert tuple(quoted(row["not defined"])) == choice.cannot


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
        with pytest.raises(ManifestError, match="samples"):
            parse_manifest(text, where="m", root=Path("/nowhere"))


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
