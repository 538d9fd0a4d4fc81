"""The manifest: a TOML file that says what to audit, validated all at once.

``load_manifest`` reports every problem in one ManifestError, each as ``file:line: message`` with
the nearest valid name. The schema is documented in manifests/README.md.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from pipeline.correlate import CorrelationPair
from pipeline.entries import (
    DataSpec,
    LocalEntry,
    Manifest,
    MeasurementEntry,
    ResourceSpec,
    TimmEntry,
    TrainEntry,
)
from pipeline.errors import ManifestError, did_you_mean
from pipeline.lock import lock_path
from pipeline.matrix import PairPlot
from pipeline.tomllines import line_of, table_lines
from tasks.images import TRAINING_SPLIT
from tasks.measurement import Output, Settings
from tasks.registry import METRICS
from tasks.training_results import FINAL_QUANTITIES
from tasks.training_settings import TrainSettings

Model = TypeVar("Model", bound=pydantic.BaseModel)
_LABEL = re.compile(r"[A-Za-z0-9._-]+")


class _Head(Settings):
    """The top-level keys; tables of tables are validated one by one."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    seed: int = pydantic.Field(default=0, ge=0)
    output: Output = "sigmoid"
    dtype: Literal["float32", "float64"] = "float32"
    data: DataSpec
    resources: ResourceSpec = ResourceSpec()
    train: list[dict[str, Any]] = pydantic.Field(default_factory=list)
    checkpoints: list[dict[str, Any]] = pydantic.Field(default_factory=list)
    measurements: list[dict[str, Any]] = pydantic.Field(default_factory=list)
    correlations: list[dict[str, Any]] = pydantic.Field(default_factory=list)
    pair_plot: dict[str, Any] | None = None


def load_manifest(path: Path | str) -> Manifest:
    """Read and validate a manifest file. Raises ManifestError with all problems."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{path}: cannot read the manifest ({error}). Expected a TOML file; "
            "see manifests/ for examples"
        ) from error
    manifest = parse_manifest(text, where=str(path), root=path.resolve().parent)
    return replace(manifest, lock_path=lock_path(path))


def parse_manifest(
    text: str, *, where: str, root: Path, folders: Collection[Path] | None = None
) -> Manifest:
    """Validate a manifest's text. ``where`` names it in messages, ``root`` resolves its paths.

    ``folders`` are checkpoint folders that the patterns matched when the run was launched. They
    stay part of the manifest when they are gone; without them a pattern must match something.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{where}: not valid TOML: {error}") from error
    return _Parser(where, root, text, document, folders).manifest()


class _Parser:
    """Collects problems while building a Manifest, so that the user sees all of them at once."""

    def __init__(
        self,
        where: str,
        root: Path,
        text: str,
        document: dict[str, Any],
        folders: Collection[Path] | None,
    ) -> None:
        self.where, self.root, self.text, self.document = where, root, text, document
        self.folders = folders
        self.lines = table_lines(text)
        self.problems: list[tuple[int, str]] = []

    def manifest(self) -> Manifest:
        head = self.validate(_Head, self.document, ())
        tables = {
            key: [t for t in value if isinstance(t, dict)] if isinstance(value, list) else []
            for key in ("train", "checkpoints", "measurements", "correlations")
            for value in [self.document.get(key, [])]
        }
        train = tuple(self.train_entries(tables["train"], head))
        timm, local = self.checkpoint_entries(tables["checkpoints"])
        measurements = tuple(self.measurement_entries(tables["measurements"], head))
        correlations = tuple(self.correlation_pairs(tables["correlations"], measurements))
        pair_plot = self.pair_plot(head.pair_plot, measurements) if head else None
        if head and not (train or timm or local or tables["train"] or tables["checkpoints"]):
            self.problem((), "nothing to audit: add a [[checkpoints]] or a [[train]] table")
        if self.problems or head is None:
            listed = "\n".join(f"{self.where}:{n}: {m}" for n, m in sorted(set(self.problems)))
            raise ManifestError(listed)
        return Manifest(
            name=head.name, seed=head.seed, output=head.output, dtype=head.dtype,
            data=self.rooted(head.data),
            train=train, timm=timm, local=local, measurements=measurements,
            correlations=correlations, pair_plot=pair_plot, resources=head.resources,
            root=self.root, text=self.text,
        )  # fmt: skip

    def rooted(self, data: DataSpec) -> DataSpec:
        """The same images with their paths absolute."""
        paths = {"root": data.root, "csv": data.csv}
        absolute = {
            key: str(self.root / Path(path).expanduser())
            for key, path in paths.items()
            if path is not None
        }
        return data.model_copy(update=absolute)

    def problem(self, path: tuple[str | int, ...], message: str) -> None:
        self.problems.append((line_of(self.lines, path), message))

    def validate(
        self, model: type[Model], values: Mapping[str, Any], path: tuple[str | int, ...]
    ) -> Model | None:
        """Validate one table; every pydantic error becomes a problem with its line."""
        try:
            return model.model_validate(dict(values))
        except pydantic.ValidationError as error:
            for item in error.errors():
                self.problem(path + tuple(item["loc"]), _sentence(item, model, values))
            return None

    def train_entries(
        self, tables: list[dict[str, Any]], head: _Head | None
    ) -> Iterator[TrainEntry]:
        """Expand each table's grid; names must tell the points apart."""
        seen: dict[str, int] = {}
        for index, table in enumerate(tables):
            path = ("train", index)
            special = {k: table[k] for k in ("name", "family", "data") if k in table}
            grid = {
                k: v if isinstance(v, list) else [v] for k, v in table.items() if k not in special
            }
            for key in ("name", "family"):
                if key in special and not isinstance(special[key], str):
                    self.problem((*path, key), f"{key} must be a string, found {special[key]!r}")
                    special.pop(key)
            if any(not values for values in grid.values()):
                empty = next(k for k, v in grid.items() if not v)
                self.problem((*path, empty), f"{empty} is an empty list: the grid has no points")
                continue
            twice = next((k for k, v in grid.items() if len(set(map(repr, v))) < len(v)), None)
            if twice is not None:
                self.problem((*path, twice), f"{twice} lists a value twice: {grid[twice]!r}")
                continue
            data = (
                self.validate(DataSpec, special["data"], (*path, "data"))
                if "data" in special
                else (head.data if head else None)
            )
            varied = [k for k, v in grid.items() if len(v) > 1]
            for point in itertools.product(*grid.values()):
                values = dict(zip(grid, point, strict=True))
                settings = self.validate(TrainSettings, values, path)
                if settings is None:
                    break
                name = _grid_name(special.get("name"), values, varied)
                if name in seen:
                    self.problem(
                        path,
                        f"two trained checkpoints are named {name!r} (tables {seen[name] + 1} and "
                        f"{index + 1}): give one [[train]] table another name",
                    )
                seen[name] = index
                if data is not None:
                    family = special.get("family") or settings.family
                    yield TrainEntry(
                        name=name, family=family, data=self.rooted(data), settings=settings
                    )

    def checkpoint_entries(
        self, tables: list[dict[str, Any]]
    ) -> tuple[tuple[TimmEntry, ...], tuple[tuple[LocalEntry, tuple[Path, ...]], ...]]:
        timm_entries: list[TimmEntry] = []
        local: list[tuple[LocalEntry, tuple[Path, ...]]] = []
        for index, table in enumerate(tables):
            path = ("checkpoints", index)
            source = table.get("source")
            if source == "timm":
                entry = self.validate(TimmEntry, table, path)
                if entry:
                    self.check_timm_names(entry.names, path)
                    timm_entries.append(entry)
            elif source == "local":
                entry = self.validate(LocalEntry, table, path)
                if entry:
                    local.append((entry, self.expand_paths(entry.paths, path)))
            else:
                self.problem(
                    (*path, "source"),
                    f"source must be 'timm' or 'local', found {source!r}."
                    + (did_you_mean(source, ("timm", "local")) if isinstance(source, str) else ""),
                )
        return tuple(timm_entries), tuple(local)

    def check_timm_names(self, names: list[str], path: tuple[str | int, ...]) -> None:
        import timm

        full = timm.list_models(pretrained=True)
        known = {*full, *(name.partition(".")[0] for name in full)}
        for name in names:
            architecture, _, tag = name.partition(".")
            if name in known:
                continue
            if tag and architecture in known:
                tags = [n.partition(".")[2] for n in full if n.partition(".")[0] == architecture]
                near = f" Its tags: {', '.join(sorted(filter(None, tags)))}"
            else:
                near = did_you_mean(name, known)
            self.problem(
                (*path, "names"),
                f"timm {timm.__version__} has no pretrained model {name!r}.{near}",
            )

    def expand_paths(self, patterns: list[str], path: tuple[str | int, ...]) -> tuple[Path, ...]:
        found: list[Path] = []
        for pattern in patterns:
            base = Path(pattern).expanduser()
            base = base if base.is_absolute() else self.root / base
            matches = {
                p for p in Path(base.anchor).glob(str(base.relative_to(base.anchor))) if p.is_dir()
            }
            if self.folders is not None:  # one that is gone shall be reported, not forgotten
                matches |= {p for p in self.folders if fnmatchcase(str(p), str(base))}
                matches = matches or {base}
            if not matches:
                self.problem(
                    (*path, "paths"),
                    f"no checkpoint directory matches {str(base)!r}. Expected a folder with "
                    "config.json and model.safetensors",
                )
            found.extend(sorted(matches))
        return tuple(dict.fromkeys(found))

    def measurement_entries(
        self, tables: list[dict[str, Any]], head: _Head | None
    ) -> Iterator[MeasurementEntry]:
        seen: dict[str, int] = {}
        for index, table in enumerate(tables):
            path = ("measurements", index)
            fields = dict(table)
            metric = fields.pop("metric", None)
            if metric not in METRICS:
                near = did_you_mean(metric, METRICS) if isinstance(metric, str) else ""
                self.problem(
                    (*path, "metric"),
                    f"unknown metric {metric!r}.{near} See: flatcensus list metrics",
                )
                continue
            label = fields.pop("label", None)
            if label is not None and not (isinstance(label, str) and _LABEL.fullmatch(label)):
                self.problem(
                    (*path, "label"),
                    f"label must be letters, digits, '.', '_' and '-', found {label!r}",
                )
                continue
            measurement = self.validate(METRICS[metric], fields, path)
            if measurement is None:
                continue
            if head is not None:
                try:
                    measurement.stages(head.data.samples, head.data.samples)
                except ValueError as error:
                    self.problem(path, str(error))
            first_of_metric = not any(e.get("metric") == metric for e in tables[:index])
            if label is None:
                label = "" if first_of_metric else str(getattr(measurement, "method", index))
            entry = MeasurementEntry(measurement, label)
            clash = next(
                (s for q in measurement.quantities if (s := entry.series(q)) in seen), None
            )
            if clash is not None:
                self.problem(
                    path,
                    f"measurements {seen[clash] + 1} and {index + 1} both give {clash!r}: "
                    'add label = "..." to one',
                )
                continue
            seen.update({entry.series(q): index for q in measurement.quantities})
            if (message := self.misplaced(entry, head)) is not None:
                self.problem(path, message)
                continue
            yield entry

    def misplaced(self, entry: MeasurementEntry, head: _Head | None) -> str | None:
        """What a measurement takes from a training of this manifest, or lacks in its images."""
        given = [entry.series(quantity) for quantity in entry.measurement.quantities]
        taken = [series for series in given if series in FINAL_QUANTITIES]
        if taken and self.document.get("train"):
            return (
                f"{entry.metric} gives {taken[0]!r}, and so does every [[train]] table, over all "
                'images of its training. Add label = "..." to the measurement, or remove it'
            )
        if entry.measurement.needs_training_images and head and head.data.split == TRAINING_SPLIT:
            return (
                f"{entry.metric} compares the training images with others, but [data] split = "
                f"{TRAINING_SPLIT!r} is the training images. Choose another split"
            )
        if entry.measurement.needs_labels and head and head.data.labels == "ignore":
            return (
                f'{entry.metric} needs labels, but [data] labels = "ignore" leaves them unread. '
                "Remove the measurement or that key; flatcensus list metrics says which need none"
            )
        return None

    def correlation_pairs(
        self, tables: list[dict[str, Any]], measurements: tuple[MeasurementEntry, ...]
    ) -> Iterator[CorrelationPair]:
        series = self.series(measurements)
        if series is None:
            return
        for index, table in enumerate(tables):
            path = ("correlations", index)
            pair = self.validate(CorrelationPair, table, path)
            if pair is None:
                continue
            for axis, name in (("x", pair.x), ("y", pair.y)):
                self.check_series(name, series, (*path, axis))
            yield pair

    def pair_plot(
        self, table: dict[str, Any] | None, measurements: tuple[MeasurementEntry, ...]
    ) -> PairPlot | None:
        """The pair plot with its series named: those listed, or all there are."""
        series = self.series(measurements)
        if table is None or series is None:
            return None
        plot = self.validate(PairPlot, table, ("pair_plot",))
        if plot is None:
            return None
        for name in plot.series or ():
            self.check_series(name, series, ("pair_plot", "series"))
        drawn = series if plot.series is None else list(plot.series)
        for name in plot.transforms:
            self.check_series(
                name, drawn, ("pair_plot", "transforms", name), lack="is not in the pair plot"
            )
        return plot.model_copy(update={"series": tuple(drawn)})

    def series(self, measurements: tuple[MeasurementEntry, ...]) -> list[str] | None:
        """All series of the manifest in its order; None if a measurement is invalid.

        That is reported already, and what the others are compared with is not known.
        """
        if len(measurements) < len(self.document.get("measurements", [])):
            return None
        found = [e.series(q) for e in measurements for q in e.measurement.quantities]
        return found + (list(FINAL_QUANTITIES) if self.document.get("train") else [])

    def check_series(
        self,
        name: str,
        known: list[str],
        path: tuple[str | int, ...],
        *,
        lack: str = "is measured nowhere in this manifest",
    ) -> None:
        if name not in known:
            self.problem(path, f"{name!r} {lack}.{did_you_mean(name, known)}")


def _grid_name(template: str | None, values: Mapping[str, Any], varied: list[str]) -> str:
    """Name of a grid point: the template's ``{key}`` filled in, or network and varied keys."""
    if template is not None and "{" in template:
        try:
            return template.format(**values)
        except (KeyError, IndexError, ValueError):
            return template
    parts = [template or str(values.get("network", "net"))]
    return "-".join(parts + [f"{key}={values[key]}" for key in varied])


def _sentence(item: Any, model: type[pydantic.BaseModel], values: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence with expected, found and the nearest name."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        fields: Any = model.model_fields
        for part in item["loc"][:-1]:
            annotation = fields[part].annotation if part in fields else None
            fields = getattr(annotation, "model_fields", {})
        return f"unknown key {item['loc'][-1]!r}.{did_you_mean(str(item['loc'][-1]), fields)}"
    if item["type"] == "missing":
        return f"key {key!r} is required and missing"
    found = item.get("input")
    shown = "" if isinstance(found, dict) else f", found {found!r}"
    if item["type"] == "literal_error" and isinstance(found, str):
        expected = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        shown += "." + did_you_mean(found, expected)
    message = item["msg"].removeprefix("Value error, ")
    return f"{key + ': ' if key else ''}{message}{shown}"
