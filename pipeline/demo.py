"""The demo's manifest, which ships inside the package so that it runs from any folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path


def demo_manifest() -> AbstractContextManager[Path]:
    """Path of the demo manifest while the context is open."""
    return resources.as_file(resources.files("pipeline") / "demo.toml")
