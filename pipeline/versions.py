"""Versions that go with every number: this code, torch, timm."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

VERSION = "0.1.0"  # here, because code that Ray carries to a node has no other record of it
LIBRARIES = ("torch", "timm", "numpy", "ray", "pyarrow")


@cache
def code_version() -> str:
    """Release and a digest of the sources, so that an edited checkout tells itself apart."""
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for package in (here, here.parent / "tasks"):
        for source in sorted(package.glob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{VERSION}+{digest.hexdigest()[:8]}"


@cache
def versions() -> dict[str, str]:
    """Version of this code and of every library that can change a number."""
    return {"flatcensus": code_version(), **{name: metadata.version(name) for name in LIBRARIES}}
