"""The IDX format of MNIST-like data sets: reading with checks, and writing.

An IDX file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the values. Only unsigned bytes are supported; a
name ending in ``.gz`` is compressed.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 0x08


class DatasetError(ValueError):
    """A data set cannot be used as asked: what was found, where, and what to do."""


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Args:
        path: The file, compressed if its name ends in ``.gz``.
        ndim: Expected number of dimensions: 3 for images, 1 for labels.

    Returns:
        Array of uint8 with the shape that the header states.

    Raises:
        DatasetError: If the file is not such an array, or shorter or longer than its header says.
    """
    data = _contents(path)
    magic = bytes((0, 0, UNSIGNED_BYTE, ndim))
    if data[:4] != magic:
        raise DatasetError(
            f"{path}: expected an IDX file of {ndim}-dimensional unsigned bytes (it starts with "
            f"0x{magic.hex()}), found 0x{data[:4].hex()}. Download the file again."
        )
    header = 4 + 4 * ndim
    shape = tuple(int(n) for n in np.frombuffer(data[4:header].ljust(4 * ndim, b"\0"), ">u4"))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected or len(data) < header:
        raise DatasetError(
            f"{path}: expected {expected} bytes for shape {shape}, found {len(data)}. "
            "The file is damaged; download it again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array of uint8 as an IDX file, compressed if the name ends in ``.gz``."""
    assert values.dtype == np.uint8, values.dtype
    header = bytes((0, 0, UNSIGNED_BYTE, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _contents(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    # Not gzip.open: it raises on a truncated file without saying how much it could read.
    stream = zlib.decompressobj(wbits=31)
    try:
        data = stream.decompress(raw)
    except zlib.error as error:
        raise DatasetError(
            f"{path}: expected a gzip file, but it does not decompress ({error}). "
            "Download the file again."
        ) from error
    if not stream.eof:
        raise DatasetError(
            f"{path}: expected a complete gzip file, found one that ends after {len(raw)} bytes "
            f"({len(data)} bytes unpacked). Download the file again."
        )
    return data
