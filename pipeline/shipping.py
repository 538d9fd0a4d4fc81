"""What a cluster gets from here: this code, and settings that are no secrets.

Ray carries the two packages to every process of a job, named by the hash of their content, and puts
them before whatever is installed there. They travel as folders: a wheel would be installed on the
nodes with all its dependencies, gigabytes of torch. The dependencies themselves are the nodes' own,
and slots whose versions differ are refused (pipeline/ray_executor.py).

Tokens and keys never travel, since everyone who sees Ray's dashboard can read what does: they come
from the environment of the nodes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pipeline
import tasks
from pipeline.errors import UsageError

# Ray tells the processes of a submitted job by it; they have this code already.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
FORWARDED = (
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT",
    "HF_HUB_ETAG_TIMEOUT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
    "AWS_DEFAULT_REGION", "AWS_ALLOW_HTTP", "AWS_ENDPOINT", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "FLATCENSUS_S3_PATIENCE_SECONDS",
)  # fmt: skip


def runtime_env() -> dict[str, Any]:
    """Ray's ``runtime_env`` for a whole job: code and settings.

    Raises:
        UsageError: A setting that would be forwarded holds a password.
    """
    return {
        "py_modules": [str(Path(package.__path__[0]).resolve()) for package in (pipeline, tasks)],
        "excludes": ["__pycache__"],
        "env_vars": settings(),
    }


def driver_env() -> dict[str, Any]:
    """The same for a driver that joins a cluster; empty in a submitted job, which has it all."""
    return {} if JOB_VARIABLE in os.environ else runtime_env()


def settings() -> dict[str, str]:
    """The variables of ``FORWARDED`` that are set here. Raises UsageError for passwords in them."""
    found = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    for name, value in found.items():
        if "@" in value:  # http://user:password@host
            raise UsageError(
                f"{name} holds a password. It would be shown in the cluster's dashboard: take it "
                "out here, and set it in the environment of the nodes (before `ray start`)"
            )
    return found
