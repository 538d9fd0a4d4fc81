"""Random generators whose state is a pure function of a key.

Every random number of a measurement comes from ``generator(seed, name, indices...)``, so it does
not depend on which worker asks, in which order, or how often. The key is hashed with SHA-256, not
with ``hash`` (salted per process) and not by adding integers (neighbouring seeds would collide).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def normal_vectors(generators: Sequence[torch.Generator], size: int) -> torch.Tensor:
    """One vector of standard normals from each generator, (B, size) float64 on the CPU.

    Args:
        generators: On the CPU, so that neither device nor batch decides the numbers.
        size: Length of a vector.
    """
    return torch.stack([torch.randn(size, generator=g, dtype=torch.float64) for g in generators])


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Random generator seeded by a key.

    Args:
        key: What the numbers are for, e.g. ``(seed, "normalized_mls", sample)``. Integers and
            strings are told apart: ``1`` and ``"1"`` give different numbers.
        device: Where the generator draws. CPU and CUDA streams differ for one key: weight noise is
            drawn where the weights are, because moving it would cost more than the forwards, so
            its numbers agree between device kinds only within their standard error.

    Returns:
        A fresh generator; equal keys give equal streams.

    Raises:
        ValueError: If the key is empty or holds anything but int and str.
    """
    if not key or any(type(part) not in (int, str) for part in key):
        raise ValueError(f"expected a key of int and str parts, got {key!r}")
    digest = hashlib.sha256(repr(key).encode()).digest()
    # 63 bits: manual_seed takes a signed 64-bit integer.
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator(device=device).manual_seed(seed)
