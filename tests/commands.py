"""The command line in this process: exit code, stdout, stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from pipeline.cli import app


class Answer(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[Any]:
        """Stdout as JSON lines; fails if anything else is there."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def next_step(self) -> str:
        """The command after ``next:``, without its comment."""
        steps = [line for line in self.err.splitlines() if line.startswith("next: ")]
        assert len(steps) <= 1, self.err
        return steps[0].removeprefix("next: ").partition("   #")[0] if steps else ""


def call(*arguments: object) -> Answer:
    """Run a command; an exception that escapes it is the test's failure."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
