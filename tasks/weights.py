"""Files of weights: which ones are read, how, and what is said when they do not fit.

``.safetensors`` files are read as they are; ``.pt``, ``.pth`` and ``.bin`` files with torch's
``weights_only`` unpickler, which executes nothing. Every other format is refused by name.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

SAFE_SUFFIX = ".safetensors"
WEIGHTS_ONLY_SUFFIXES = (".bin", ".pt", ".pth")
NUM_KEYS_SHOWN = 3
FETCH_HINT = "Delete what is left of it and resume the run, which fetches it again."


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded as asked: what was found, where, and what to do."""


def weights_file(path: Path) -> Path:
    """Find the weights of a checkpoint folder: ``model.safetensors``, else the only readable file.

    Raises:
        CheckpointError: If there is none in a format that is loaded, or several.
    """
    named = path / f"model{SAFE_SUFFIX}"
    if named.is_file():
        return named
    readable = (SAFE_SUFFIX, *WEIGHTS_ONLY_SUFFIXES)
    others = sorted(p for p in path.iterdir() if p.is_file() and p.name != "config.json")
    found = [p for p in others if p.suffix in readable]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path}: expected one weights file, found {', '.join(p.name for p in found)}. "
            f"Name the right one {named.name}, or remove the others."
        )
    raise CheckpointError(
        f"{path}: no weights in a format that is loaded ({', '.join(readable)}), found "
        f"{', '.join(p.name for p in others) or 'nothing'}. Other formats can execute code; "
        "convert the weights with safetensors.torch.save_file."
    )


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, without reading them.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: not found. {FETCH_HINT}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {path.stat().st_size} bytes that are none "
            f"({error}). The file is damaged; copy or download it again."
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict without executing anything.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds more than tensors.
    """
    if path.suffix == SAFE_SUFFIX:
        safetensors_shapes(path)
        return load_file(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused. It is damaged or holds more than weights, and loading that could "
            f"execute code ({str(error).splitlines()[0]}). Save the state_dict alone, as "
            "safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:  # which one depends on where it was cut
        raise CheckpointError(
            f"{path}: not a complete torch file ({error}). Copy or save it again."
        ) from error
    for key in ("state_dict", "model"):  # the usual wrappers of training scripts
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise CheckpointError(f"{path}: expected named tensors, found {type(state).__name__}")
    return dict(state)


def check_finite(model: nn.Module, path: str) -> None:
    """Raise CheckpointError if a parameter or buffer holds NaN or infinity."""
    bad = [k for k, v in model.state_dict().items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:NUM_KEYS_SHOWN])}. "
            "The training diverged or the file is damaged; take another checkpoint."
        )


def load_strictly(
    model: nn.Module, state: dict[str, torch.Tensor], weights: Path, architecture: str
) -> None:
    """Load weights that must fit exactly; raises CheckpointError if they do not."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise foreign_weights(weights, architecture, str(error)) from error


def foreign_weights(weights: Path, architecture: str, message: str) -> CheckpointError:
    """Condense torch's list of all keys to counts and the first few."""
    parts = []
    for kind in ("Missing", "Unexpected"):
        found = re.search(rf"{kind} key\(s\) in state_dict: (.*?)\.\s*(?:\n|$)", message)
        if found:
            keys = found[1].split(", ")
            parts.append(f"{len(keys)} {kind.lower()}: {', '.join(keys[:NUM_KEYS_SHOWN])}")
    shapes = re.findall(r"size mismatch for (.*?)[:] .*?(\[[^]]*\]).*?(\[[^]]*\])", message)
    if shapes:
        shown = [f"{key} {a} instead of {b}" for key, a, b in shapes[:NUM_KEYS_SHOWN]]
        parts.append(f"{len(shapes)} of another shape: {', '.join(shown)}")
    return CheckpointError(
        f"{weights}: weights of another architecture than {architecture!r} "
        f"({'; '.join(parts) or message.strip() or 'conversion failed'}). "
        "Correct architecture or model_args, or take the weights that belong to them."
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    if not path.is_file():
        raise CheckpointError(f"{path}: not found. {FETCH_HINT}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
