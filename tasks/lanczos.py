"""Largest eigenvalues of a batch of symmetric positive semidefinite operators, with a certificate.

Lanczos on each operator A of size N from a start drawn uniformly on the sphere, all operators at
once. The largest Ritz value theta_1 is a lower bound of lambda_1. The upper bound is probabilistic
and assumes nothing about the spectrum: with Lanczos coefficients a_j, b_j and the orthonormal
polynomials p_0 = 1, b_{j+1} p_{j+1}(t) = (t - a_j) p_j(t) - b_j p_{j-1}(t), basis vector j is
p_j(A) times the start, so a start with component gamma on the top eigenvector has

    gamma^2 sum_{j <= k} p_j(lambda_1)^2 <= 1,     gamma^2 ~ Beta(1/2, (N - 1) / 2).

With delta^2 the eps-quantile of that distribution, lambda_1 <= t* with probability >= 1 - eps,
where t* > theta_1 solves sum_{j <= k} p_j(t*)^2 = 1 / delta^2 (van Dorsselaer, Hochstenbach and
van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2001; Hochstenbach, ETNA 40, 2013).

Rounding inside the operator is not part of the certificate: the caller widens the interval.

Shapes: B operators, N their size, k steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.special
import torch

Apply = Callable[[torch.Tensor], torch.Tensor]
"""(A, N) float64 vectors of the A operators it was made for -> their products, (A, N) float64."""

MakeOperator = Callable[[np.ndarray], Apply]
"""Indices (A,) of the operators that are still needed -> their joint product."""

_REBUILD_BELOW = 0.5  # chosen: a new graph costs about one step of the operators it keeps


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Largest eigenvalues with their bounds; every array is (B,) float64 unless said otherwise.

    Attributes:
        lower: Largest Ritz value or Rayleigh quotient: a lower bound, and the best estimate.
        upper: Upper bound with the stated failure probability; NaN where the method has none.
        residual: ||A v - lower v|| for the unit Ritz vector v: an eigenvalue lies within it.
        conditional_error: residual^2 / (theta_1 - theta_2) (Kato-Temple): bounds
            lambda_1 - lower only under the unverified condition that theta_2 is above every other
            eigenvalue. NaN where the method does not know theta_2.
        num_iterations: (B,) int, products spent on each operator.
        converged: (B,) bool. False also where the operator gave NaN or infinity, or numbers whose
            squares do not fit float64; then ``lower`` and ``upper`` are NaN.
    """

    lower: np.ndarray
    upper: np.ndarray
    residual: np.ndarray
    conditional_error: np.ndarray
    num_iterations: np.ndarray
    converged: np.ndarray


def lanczos(
    make_operator: MakeOperator,
    starts: torch.Tensor,
    *,
    tolerance: float,
    failure_probability: float,
    max_iterations: int,
) -> Eigenvalues:
    """Largest eigenvalues by Lanczos, stopped per operator by the width of its certificate.

    The basis is reorthogonalised twice in float64, (B, k, N). Operators that are done leave: their
    rows are zero from then on, and when fewer than half of the rows are live ``make_operator`` is
    called again for those. Eigenvalues stand for squared singular values, so widths are of roots.

    Args:
        make_operator: Makes the product of a subset of operators.
        starts: (B, N) float64, independent, each uniform on the unit sphere.
        tolerance: Stop when sqrt(upper / lower) - 1 is at most this.
        failure_probability: Chance that one ``upper`` is too small.
        max_iterations: Limit on products per operator; N products are always enough.

    Returns:
        Bounds of the largest eigenvalues.
    """
    num, size = starts.shape
    steps = min(max_iterations, size)
    log_threshold = _log_threshold(size, failure_probability)
    basis = starts.new_zeros((num, steps + 1, size))
    basis[:, 0] = starts / starts.norm(dim=1, keepdim=True)
    a, b = np.full((num, steps), np.nan), np.full((num, steps), np.nan)
    iterations = np.zeros(num, dtype=np.int64)
    converged, alive = np.zeros(num, dtype=bool), np.ones(num, dtype=bool)

    rows = np.arange(num)
    apply = make_operator(rows)
    for k in range(steps):
        if alive[rows].mean() < _REBUILD_BELOW:
            rows = np.flatnonzero(alive)
            del apply  # its graph must be gone before the next one is built
            apply = make_operator(rows)
        live = np.flatnonzero(alive[rows])
        products = apply(basis[rows, k])[live]
        now = rows[live]
        previous = basis[now, : k + 1]
        coefficients = torch.zeros_like(previous[:, :, 0])
        for _ in range(2):
            overlap = torch.einsum("bkn,bn->bk", previous, products)
            products = products - torch.einsum("bkn,bk->bn", previous, overlap)
            coefficients += overlap
        norms = products.norm(dim=1)
        a[now, k] = _in_range(coefficients[:, k])
        b[now, k] = norms.cpu().numpy()
        iterations[now] += 1

        finite = np.isfinite(a[now, k]) & np.isfinite(b[now, k])
        theta = np.full(len(now), np.nan)
        theta[finite] = _ritz_values(a[now[finite]], b[now[finite]], k + 1)[:, -1]
        # Below rounding level the residual is noise: the Krylov space is invariant, and holds
        # the top eigenvector because almost every start has a component on it.
        scale = np.maximum(theta, 0)
        exhausted = finite & (b[now, k] <= 4 * size * np.finfo(float).eps * scale)
        if k + 1 == size:
            exhausted = finite
        b[now[exhausted], k] = 0
        target = scale * (1 + tolerance) ** 2
        inside = _log_weight(a[now, : k + 1], b[now, : k + 1], target) >= log_threshold
        converged[now] = finite & (exhausted | inside)
        alive[now] = finite & ~converged[now]
        if not alive.any():
            break
        basis[now, k + 1] = products / torch.where(norms > 0, norms, 1)[:, None]
    return _finish(a, b, iterations, converged, log_threshold)


def power_iteration(
    make_operator: MakeOperator, starts: torch.Tensor, *, tolerance: float, max_iterations: int
) -> Eigenvalues:
    """Largest eigenvalues by power iteration, u <- A u / ||A u||.

    On A = J J^T this is gradient ascent on ||J v||^2 with v = J^T u and an infinite step. It stops
    when the residual ||A u - rho u|| is at most ``tolerance`` * rho, rho the Rayleigh quotient.
    That guarantees an eigenvalue within ``tolerance`` * rho of rho (so a singular value within
    ``tolerance`` / 2, relatively, of the root), and rho <= lambda_1. That the eigenvalue is the
    largest is likely and not certified, so there is no upper bound. A rule on the relative change
    of rho would guarantee nothing: the change is small wherever convergence is slow.

    Args:
        make_operator: Makes the product of a subset of operators.
        starts: (B, N) float64, one random start per operator.
        tolerance: Relative residual at which an operator is done.
        max_iterations: Limit on products per operator.

    Returns:
        Rayleigh quotients and residuals; ``upper`` is NaN.
    """
    num, _ = starts.shape
    vectors = starts / starts.norm(dim=1, keepdim=True)
    lower, residual = np.full(num, np.nan), np.full(num, np.nan)
    iterations = np.zeros(num, dtype=np.int64)
    converged, alive = np.zeros(num, dtype=bool), np.ones(num, dtype=bool)

    rows = np.arange(num)
    apply = make_operator(rows)
    for _ in range(max_iterations):
        if alive[rows].mean() < _REBUILD_BELOW:
            rows = np.flatnonzero(alive)
            del apply
            apply = make_operator(rows)
        live = np.flatnonzero(alive[rows])
        now = rows[live]
        products = apply(vectors[rows])[live]
        quotient = (vectors[now] * products).sum(1)
        lower[now] = _in_range(quotient)
        residual[now] = (products - quotient[:, None] * vectors[now]).norm(dim=1).cpu().numpy()
        iterations[now] += 1
        finite = np.isfinite(lower[now]) & np.isfinite(residual[now])
        converged[now] = finite & (residual[now] <= tolerance * lower[now])
        alive[now] = finite & ~converged[now]
        if not alive.any():
            break
        norms = products.norm(dim=1, keepdim=True)
        vectors[now] = products / torch.where(norms > 0, norms, 1)
        vectors[~torch.from_numpy(alive)] = 0
    unknown = np.full(num, np.nan)
    bad = ~(np.isfinite(lower) & np.isfinite(residual))
    lower[bad] = residual[bad] = np.nan
    return Eigenvalues(lower, unknown, residual, unknown, iterations, converged)


def _finish(
    a: np.ndarray,
    b: np.ndarray,
    iterations: np.ndarray,
    converged: np.ndarray,
    log_threshold: float,
) -> Eigenvalues:
    """Bounds from all coefficients; operators are grouped by their number of steps."""
    num = len(iterations)
    lower, upper, residual, conditional = (np.full(num, np.nan) for _ in range(4))
    for k in np.unique(iterations):
        group = np.flatnonzero(iterations == k)
        group = group[np.isfinite(a[group, :k]).all(1) & np.isfinite(b[group, :k]).all(1)]
        if not len(group):
            continue
        values, vectors = np.linalg.eigh(_tridiagonal(a[group], b[group], k))
        theta = np.maximum(values[:, -1], 0)
        lower[group] = theta
        residual[group] = b[group, k - 1] * np.abs(vectors[:, -1, -1])
        upper[group] = _upper_bound(a[group, :k], b[group, :k], theta, log_threshold)
        if k > 1:
            gap = values[:, -1] - values[:, -2]
            with np.errstate(divide="ignore", invalid="ignore"):
                bound = residual[group] ** 2 / gap
            conditional[group] = np.where(residual[group] == 0, 0.0, bound)
    return Eigenvalues(lower, upper, residual, conditional, iterations, converged)


def _upper_bound(
    a: np.ndarray, b: np.ndarray, theta: np.ndarray, log_threshold: float
) -> np.ndarray:
    """The root t* > theta of sum_j p_j(t)^2 = 1 / delta^2, (A,), from above.

    ``p_1(t) = (t - a_1) / b_2`` alone passes the threshold at a_1 + b_2 / delta, which brackets
    the root; 64 bisections of log(t - theta) then leave a relative error of 1e-17 in t.
    """
    high = np.maximum(a[:, 0] - theta, 0) + b[:, 0] * np.exp(log_threshold / 2)
    low = np.finfo(float).eps * np.maximum(theta, np.finfo(float).tiny)
    high = np.maximum(high, low)
    for _ in range(64):
        middle = np.sqrt(low) * np.sqrt(high)
        reached = _log_weight(a, b, theta + middle) >= log_threshold
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle)
    # An invariant Krylov space holds the top eigenvector: theta itself is the eigenvalue.
    return np.where(b[:, -1] == 0, theta, theta + high)


def _log_weight(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Log of sum_{j <= k} p_j(t)^2 for t above the largest Ritz value, (A,).

    The ratios r_j = p_j / p_{j-1} are positive there and neither they nor the sum of logarithms
    overflow. A ratio that rounding made non-positive (t within rounding of a Ritz value) is
    replaced by a tiny one, which lowers the weight and so can only raise the bound.
    """
    tiny = np.finfo(float).tiny
    log_p, total = np.zeros(len(t)), np.zeros(len(t))
    ratio = np.ones(len(t))
    for j in range(a.shape[1]):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            below = b[:, j - 1] / ratio if j else 0.0
            ratio = (t - a[:, j] - below) / b[:, j]
        ratio = np.where(ratio > tiny, ratio, tiny)
        log_p = log_p + np.log(ratio)
        total = np.logaddexp(total, 2 * log_p)
    return total


def _in_range(quotients: torch.Tensor) -> np.ndarray:
    """Rayleigh quotients (A,) as an array, NaN where their squares would over- or underflow."""
    x = quotients.cpu().numpy()
    return np.where((x == 0) | ((np.abs(x) > 1e-140) & (np.abs(x) < 1e140)), x, np.nan)


def _ritz_values(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Eigenvalues of the leading k x k tridiagonal matrices, (A, k) ascending."""
    return np.linalg.eigvalsh(_tridiagonal(a, b, k))


def _tridiagonal(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """(A, k, k) matrices with diagonal a_1..a_k and off-diagonal b_2..b_k (stored from b[:, 0])."""
    matrix = np.zeros((len(a), k, k))
    index = np.arange(k)
    matrix[:, index, index] = a[:, :k]
    matrix[:, index[1:], index[:-1]] = b[:, : k - 1]
    matrix[:, index[:-1], index[1:]] = b[:, : k - 1]
    return matrix


def _log_threshold(size: int, failure_probability: float) -> float:
    """log(1 / delta^2), delta^2 the quantile of a start's squared component on one direction."""
    if size == 1:
        return 0.0  # the only direction: the component is 1
    quantile = scipy.special.betaincinv(0.5, (size - 1) / 2, failure_probability)
    return float(-np.log(quantile))
