"""Synthetic summaries that look like a census of pretrained networks. Seeded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

X, Y = "normalized_mls", "adaptive_sharpness"
FAMILIES = (
    "vit", "deit", "deit3", "eva02", "beit", "beitv2", "crossvit", "maxvit", "mobilevit",
    "fastvit", "flexivit", "levit", "tiny_vit", "vitamin",
)  # fmt: skip


def census(
    num_checkpoints: int = 60,
    *,
    families: Sequence[str] = FAMILIES,
    seed: int = 0,
    rho: float = 0.8,
    noise: float = 0.08,
    failed: int = 3,
    outliers: int = 3,
    oracle: bool = False,
) -> pd.DataFrame:
    """A summary of two series, with failed checkpoints and gross outliers at the end."""
    generator = np.random.Generator(np.random.PCG64(seed))
    n = num_checkpoints
    family = [families[int(i)] for i in generator.integers(0, len(families), n)]
    shift = dict(zip(families, generator.normal(0, 0.7, len(families)), strict=True))
    u = generator.standard_normal(n) * 0.7 + [shift[f] for f in family]
    v = rho * u + np.sqrt(1 - rho**2) * generator.standard_normal(n)
    v[n - outliers :] += 3.0
    rows = []
    for i in range(n):
        name = f"{family[i]}_base_patch16_{generator.choice([224, 384])}.augreg_{i:03d}"
        bad = i < failed
        for series, scale, level in ((X, 3e4, u[i]), (Y, 1.5e3, v[i])):
            relative = noise * generator.uniform(0.5, 1.5)
            value = scale * np.exp(level + relative * generator.standard_normal())
            rows.append(line(name, family[i], series, value, relative * value, failed=bad))
        if oracle and not bad:
            exact = rows[-2]["value"] * (1 + 1e-4 * generator.standard_normal())
            rows.append(line(name, family[i], f"{X}@dense", exact, noise * exact, bound=0.0))
    return pd.DataFrame(rows)


def line(
    checkpoint: str,
    family: str,
    series: str,
    value: float,
    stderr: float,
    *,
    failed: bool = False,
    bound: float | None = None,
) -> dict[str, object]:
    """One row of a summary."""
    quantity, _, label = series.partition("@")
    nan = float("nan")
    return {
        "checkpoint": checkpoint, "family": family, "tag": checkpoint.partition(".")[2],
        "metric": quantity, "label": label or quantity, "series": series, "quantity": quantity,
        "value": nan if failed else value, "stderr": nan if failed else stderr,
        "stderr_draws": nan, "ci_low": nan if failed else value - 2 * stderr,
        "ci_high": nan if failed else value + 2 * stderr,
        "error_bound": nan if failed else (3e-4 * value if bound is None else bound),
        "num_samples": 0 if failed else 100, "num_missing": 100 if failed else 0,
        "num_rows": 0 if failed else 100, "num_probes": 0, "forward_equivalents": 6600.0,
        "status": "failed" if failed else "ok",
        "status_text": "OutOfMemory: batch_size = 8 needs 9.1 GB" if failed else "reached",
        "spec_key": "0123456789abcdef",
    }  # fmt: skip


def many_series(
    num_series: int, num_checkpoints: int = 30, *, families: Sequence[str] = FAMILIES[:5]
) -> pd.DataFrame:
    """A summary of several correlated positive series ``q0``, ``q1``, ...; one value is missing."""
    generator = np.random.Generator(np.random.PCG64(1))
    common = generator.standard_normal(num_checkpoints)
    rows = []
    for s in range(num_series):
        weight = generator.uniform(-1, 1)
        for i in range(num_checkpoints):
            family = families[i % len(families)]
            value = float(np.exp(weight * common[i] + 0.4 * generator.standard_normal()))
            failed = s == 1 and i == 3
            rows.append(line(f"{family}_{i}", family, f"q{s}", value, 0.05 * value, failed=failed))
    return pd.DataFrame(rows)
