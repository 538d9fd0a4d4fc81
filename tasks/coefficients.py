"""Weighted correlation coefficients of many replicates at once: Pearson, Spearman, Kendall's τ_b.

A whole-number weight of k is k equal copies of a checkpoint. Ranks come from the signs of all
differences within a family: twice the centred average rank of i is Σ_j copies_j sign(x_i − x_j),
and τ_b = Σ_ij s_ij t_ij / √(Σ_ij |s_ij| Σ_ij |t_ij|) with s, t the signs of x, y. That costs n² per
replicate and needs no sorting, ties and families included.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Method = Literal["pearson", "spearman", "kendall"]
Array = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1_000_000  # pairs of checkpoints held at once, 4 MB as float32


def coefficients(
    method: Method, x: Array, y: Array, weights: Array, copies: Array, same: Array
) -> Array:
    """Coefficients (B,) of x, y (B or 1, n) with whole-number weights (B, n); NaN if constant.

    ``same`` (n, n) is 1 for two checkpoints of one family, ``copies`` (B or 1, n) says how often a
    checkpoint counts within it, for means and ranks.
    """
    if method == "pearson":
        a, b = _centred(x, copies, same), _centred(y, copies, same)
        return _ratio((weights * a * b).sum(1), (weights * a * a).sum(1), (weights * b * b).sum(1))
    n = weights.shape[1]
    chunk = max(1, CHUNK_ELEMENTS // (n * n))
    mask = same.astype(np.float32)
    parts = []
    for start in range(0, len(weights), chunk):
        piece = slice(start, start + chunk)
        # float32 is exact here: all sums are whole numbers below 2**24
        w, c = weights[piece].astype(np.float32), _piece(copies, piece).astype(np.float32)
        sign_x, sign_y = _signs(_piece(x, piece), mask), _signs(_piece(y, piece), mask)
        parts.append((_spearman if method == "spearman" else _kendall)(sign_x, sign_y, w, c))
    return np.concatenate(parts)


def constant_text(a: Array, b: Array, same: Array) -> str:
    """Which of the two is constant (within families, if there are several)."""
    ones = np.ones((1, a.size))
    names = [n for n, v in (("x", a), ("y", b)) if not _centred(v[None], ones, same).any()]
    verb = "are" if len(names) > 1 else "is"
    where = "" if same.all() else " within every family"
    return f"{' and '.join(names)} {verb} constant{where}"


def _piece(values: Array, piece: slice) -> Array:
    return values if len(values) == 1 else values[piece]


def _signs(x: Array, mask: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Order (B, n, n) of each pair of one family: +1, 0 or -1; 0 across families."""
    left, right = x[:, :, None], x[:, None, :]
    return ((left > right).view(np.int8) - (left < right).view(np.int8)) * mask


def _times(signs: np.ndarray, w: np.ndarray) -> Array:
    return np.matmul(signs, w[:, :, None])[:, :, 0].astype(np.float64)


def _spearman(sign_x: np.ndarray, sign_y: np.ndarray, w: np.ndarray, c: np.ndarray) -> Array:
    a, b = _times(sign_x, c), _times(sign_y, c)
    return _ratio((w * a * b).sum(1), (w * a * a).sum(1), (w * b * b).sum(1))


def _kendall(sign_x: np.ndarray, sign_y: np.ndarray, w: np.ndarray, c: np.ndarray) -> Array:
    def total(products: np.ndarray) -> Array:
        return (w * _times(products, c)).sum(1)

    return _ratio(total(sign_x * sign_y), total(np.abs(sign_x)), total(np.abs(sign_y)))


def _ratio(covariance: Array, variance_x: Array, variance_y: Array) -> Array:
    defined = (variance_x > 0) & (variance_y > 0)
    product = np.where(defined, np.sqrt(variance_x) * np.sqrt(variance_y), 1.0)
    return np.where(defined, np.clip(covariance / product, -1, 1), np.nan)


def _centred(x: Array, weights: Array, same: Array) -> Array:
    """Values (B or 1, n) minus their family's weighted mean, zero where only rounding is left."""
    total = weights @ same
    rest = x - ((weights * x) @ same) / np.where(total > 0, total, 1)
    return np.where(np.abs(rest) > 64 * np.finfo(np.float64).eps * np.abs(x).max(), rest, 0.0)
