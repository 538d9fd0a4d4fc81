"""What all commands share: their arguments, and the border where errors become exit codes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from pipeline.console import Console
from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_UNEXPECTED, FlatcensusError

P = ParamSpec("P")

ManifestArg = Annotated[Path, typer.Argument(help="TOML manifest; see manifests/.")]
RunArg = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder: runs/demo or s3://bucket/demo.")
]
RunOption = Annotated[
    str | None,
    typer.Option("--run", help="Run folder or s3:// URI; default runs/<name of the manifest>."),
]
OnOption = Annotated[
    str, typer.Option("--on", help="inline, local (Ray on this machine), or a Ray address.")
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Submit it as a job of the cluster named by --on.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")
]


def reported(command: Callable[P, int]) -> Callable[P, None]:
    """Turn errors into one message and an exit code; the outermost border."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        console = Console(as_json=bool(kwargs.get("as_json")))
        try:
            code = command(*args, **kwargs)
        except FlatcensusError as error:
            console.error(str(error))
            code = error.exit_code
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_OK
        except KeyboardInterrupt:
            console.error("interrupted; nothing is lost, the same command continues")
            code = EXIT_INTERRUPTED
        except Exception as error:
            if os.environ.get("FLATCENSUS_DEBUG"):
                raise
            console.error(
                f"unexpected {type(error).__name__}: {error}. "
                "Set FLATCENSUS_DEBUG=1 for the traceback, and please report it"
            )
            code = EXIT_UNEXPECTED
        raise typer.Exit(code)

    return run


def shown(argument: Path | str) -> str:
    """An argument as a shell takes it."""
    return shlex.quote(str(argument))


def relative(path: str) -> str:
    """A path as the user would type it from here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
