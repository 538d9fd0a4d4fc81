"""Every error a user can cause, with its exit code.

    FlatcensusError           1  unexpected in kind, but named
    ├── ManifestError         2  the manifest: all problems at once, file:line, nearest valid name
    ├── QueryError            2  SQL or filters that cannot be run
    ├── UsageError            2  a command that does not fit the run it names
    ├── DataError             4  the images cannot be had or read
    ├── HubError              4  the hub cannot give the weights
    ├── StoreError            4  the run folder cannot be read or written
    ├── ShardError            4  a shard that is not what was written
    └── ResourceError         4  the machine or cluster cannot do what is asked

Exit codes besides: 0 all done, 3 finished with failed units, 130 interrupted (resumable).
Each message says what was expected, what was found, where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

EXIT_OK, EXIT_UNEXPECTED, EXIT_USAGE, EXIT_FAILED_UNITS, EXIT_ENVIRONMENT = 0, 1, 2, 3, 4
EXIT_INTERRUPTED = 130


class FlatcensusError(Exception):
    """Base of all errors that are shown as one message without a traceback."""

    exit_code: ClassVar[int] = EXIT_UNEXPECTED


class ManifestError(FlatcensusError):
    """The manifest cannot be used; the message lists every problem."""

    exit_code = EXIT_USAGE


class QueryError(FlatcensusError):
    """A query that cannot be run."""

    exit_code = EXIT_USAGE


class UsageError(FlatcensusError):
    """A command that does not fit the run or file it names."""

    exit_code = EXIT_USAGE


class DataError(FlatcensusError):
    """The images that the manifest names cannot be had or read."""

    exit_code = EXIT_ENVIRONMENT


class HubError(FlatcensusError):
    """The hub cannot give the weights or data. ``unasked``: nobody answered, or it is offline."""

    exit_code = EXIT_ENVIRONMENT

    def __init__(self, message: str, *, unasked: bool = False) -> None:
        super().__init__(message)
        self.unasked = unasked


class StoreError(FlatcensusError):
    """The run folder cannot be read or written. ``disk_full`` tells that one cause apart."""

    exit_code = EXIT_ENVIRONMENT

    def __init__(self, message: str, *, disk_full: bool = False) -> None:
        super().__init__(message)
        self.disk_full = disk_full


class ShardError(FlatcensusError):
    """A shard's bytes are not what was written: truncated, flipped, or of another schema."""

    exit_code = EXIT_ENVIRONMENT

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


class ResourceError(FlatcensusError):
    """The machine or cluster cannot do what is asked."""

    exit_code = EXIT_ENVIRONMENT


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or the list of valid names where none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f" Valid: {shown}." if names else ""
