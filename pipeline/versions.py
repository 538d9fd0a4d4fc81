"""Versions that go with every number: this code, torch, timm."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

VERSION = "0.1.0"  # here, because code that Ray carries to a node has no other record of it
LIBRARIES = ("torch", "timm", "numpy", "ray", "pyarrow")


@cache
def code_version() -> str:
    """Release and a digest of the sources, so that an edited checkout tells itself apart."""
    digest = hashlib.sha256()
    for package in ("pipeline", "tasks"):  # where Ray carried them, each has a place of its own
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for source in sorted(Path(spec.origin).parent.glob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{VERSION}+{digest.hexdigest()[:8]}"


@cache
def versions() -> dict[str, str]:
    """Version of this code and of every library that can change a number."""
    return {"flatcensus": code_version(), **{name: metadata.version(name) for name in LIBRARIES}}
