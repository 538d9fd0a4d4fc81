"""Images and labels in Parquet files, as ``datasets`` writes them: read row by row.

The column of the images is a struct with the encoded ``bytes`` (and a ``path``), or the bytes
alone; that of the labels holds integers, whose names are in the ``huggingface`` metadata of the
file if it is a ClassLabel. A row group is decompressed when one of its images is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.idx import DatasetError


@dataclass(frozen=True)
class ParquetImages:
    """One image per row of these files.

    Attributes:
        paths: The files, in order.
        column: Column of the images.
    """

    paths: tuple[Path, ...]
    column: str

    def read(self, i: int) -> tuple[bytes, str]:
        """Encoded image of row ``i``, counted through all files, and its place.

        Raises:
            DatasetError: If the row holds none, or the file cannot be read.
        """
        group = int(np.searchsorted(self._ends, i, side="right"))
        file, inside = self._groups[group]
        row = i - (int(self._ends[group - 1]) if group else 0)
        place = f"{self.paths[file]} row group {inside} row {row}"
        try:
            table = self._files[file].read_row_group(inside, columns=[self.column])
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(
                f"{self.paths[file]}: expected a readable Parquet file, but {error}. Delete it, "
                "and it is fetched anew."
            ) from error
        value = table.column(0)[row].as_py()
        if isinstance(value, dict):
            place += f" ({value.get('path') or 'no name'})"
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise DatasetError(f"{place}: expected the bytes of an image, found none.")
        return value, place

    def fingerprint(self) -> bytes:
        """Not asked: whoever opens Parquet files knows their SHA-256."""
        raise AssertionError("a data set of Parquet files has a given identity")

    @cached_property
    def _files(self) -> list[pq.ParquetFile]:
        return [pq.ParquetFile(path) for path in self.paths]

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        return [(f, g) for f, file in enumerate(self._files) for g in range(file.num_row_groups)]

    @cached_property
    def _ends(self) -> np.ndarray:
        sizes = [self._files[f].metadata.row_group(g).num_rows for f, g in self._groups]
        return np.cumsum(sizes)


def read_labels(paths: Sequence[Path], column: str) -> np.ndarray:
    """Labels of all rows, (N,) int64. Raises DatasetError if one is missing or no integer."""
    parts = []
    for path in paths:
        values = pq.read_table(path, columns=[column]).column(0)
        if values.null_count or not pa.types.is_integer(values.type):
            raise DatasetError(
                f"{path}: expected an integer in every row of column {column!r}, found "
                f"{values.type} with {values.null_count} rows without. Choose another label "
                'column, or set labels = "ignore".'
            )
        parts.append(values.to_numpy().astype(np.int64))
    return np.concatenate(parts)


def check_columns(
    footer: pq.FileMetaData, *, image: str, label: str | None, where: str
) -> tuple[str, ...]:
    """Names of the classes, from a file's footer.

    Integers without names name themselves: 0 to the largest there is.

    Args:
        footer: Of one file.
        image: Column of the images.
        label: Column of the labels; None if they are not read.
        where: The file, for messages.

    Raises:
        DatasetError: If a column is missing or of another kind.
    """
    schema = footer.schema.to_arrow_schema()
    kinds = {name: schema.field(name).type for name in schema.names}
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if image not in kinds:
        raise DatasetError(
            f"{where}: no column {image!r} of images. Found {listed}. Set image to one of them."
        )
    if not (_is_encoded(kinds[image]) or pa.types.is_binary(kinds[image])):
        raise DatasetError(
            f"{where}: expected encoded images in column {image!r} (a struct with bytes, or "
            f"bytes), found {kinds[image]}. Set image to another of {listed}."
        )
    if label is None:
        return ()
    if label not in kinds or not pa.types.is_integer(kinds[label]):
        raise DatasetError(
            f"{where}: expected integer labels in column {label!r}, found {listed}. Set label to "
            'another column, or labels = "ignore" and measure only what needs none.'
        )
    features = json.loads((footer.metadata or {}).get(b"huggingface", b"{}"))
    names = features.get("info", {}).get("features", {}).get(label, {}).get("names")
    if names:
        return tuple(map(str, names))
    return tuple(map(str, range(_largest(footer, schema.names.index(label), where) + 1)))


def _is_encoded(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and pa.types.is_binary(field.type) for field in kind.fields
    )


def _largest(footer: pq.FileMetaData, column: int, where: str) -> int:
    """Largest label of a file, from the statistics of its row groups."""
    found: list[Any] = []
    name = footer.schema.to_arrow_schema().names[column]
    for g in range(footer.num_row_groups):
        group = footer.row_group(g)
        places = [c for c in range(group.num_columns) if group.column(c).path_in_schema == name]
        statistics = group.column(places[0]).statistics
        if statistics is None or not statistics.has_min_max:
            raise DatasetError(
                f"{where}: column {name!r} holds integers without names, and the file does not "
                "say how many classes there are. Write it with datasets, or with statistics."
            )
        found.append(statistics.max)
    return int(max(found, default=0))
