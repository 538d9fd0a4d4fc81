"""Counts of timm's architectures on disk, so that a second plan of hundreds takes seconds.

One JSON file each, named by everything that it depends on: architecture, arguments, the versions of
timm and torch, and ``VERSION`` of what is counted. A file that is damaged or cannot be written
costs the time of counting again and nothing else; writers of one file write the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

VERSION = 1  # bump when tasks.counting or tasks.preparation changes what is counted

_log = logging.getLogger(__name__)


def folder() -> Path:
    """The user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``), and a place in it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flatcensus/outlines"


def read(named: str) -> dict[str, Any] | None:
    """The counts of a network as ``write`` got them, or None where there are none that are sound.

    Args:
        named: Architecture and arguments, as one string.
    """
    try:
        known = json.loads(_path(named).read_bytes())
        content = known["counts"]
        if known["named"] == named and known["sha256"] == _digest(content):
            return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.debug("%s cannot be read (%s): counted again", _path(named), error)
    return None


def write(named: str, counts: dict[str, Any]) -> None:
    """Keep the counts of a network. A cache that cannot be written is no reason to fail."""
    path = _path(named)
    known = {"named": named, "sha256": _digest(counts), "counts": counts}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        os.replace(temporary, path)
    except OSError as error:
        _log.info("outlines are not kept: %s", error)


def _path(named: str) -> Path:
    parts = json.dumps([VERSION, timm.__version__, torch.__version__, named])
    return folder() / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"


def _digest(counts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()
