"""Sampled traces: exact by enumeration of signs, unbiased, with errors that are as stated."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tasks.deflated import Moments, deflated_moments, rest_gram, unbiased_moments

REPEATS = 300
SIZE = 120
SPECTRA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "falling": lambda k: 0.8**k,  # as of trained networks
    "slow": lambda k: torch.exp(-k / 16),  # as at random initialisation
    "heavy": lambda k: 1 / (1 + k),
}


class Dense:
    """Products with matrices (B, N, M)."""

    def __init__(self, matrices: torch.Tensor) -> None:
        self.matrices = matrices

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        return (self.matrices.mT @ u[:, :, None])[:, :, 0]

    def gram(self, u: torch.Tensor) -> torch.Tensor:
        return (self.matrices @ self.vjp(u)[:, :, None])[:, :, 0]


def moments(
    matrices: torch.Tensor, target: float = 0.02, max_draws: int = 128, seed: int = 0
) -> Moments:
    return deflated_moments(
        lambda active: Dense(matrices[active]),
        [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(matrices))],
        matrices[:, 0],
        size=matrices.shape[1],
        ratio=True,
        target_relative_stderr=target,
        max_draws=max_draws,
    )


def with_spectrum(eigenvalues: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    size = len(eigenvalues)
    random = torch.randn(size, size, dtype=torch.float64, generator=seeded(7))
    return (torch.linalg.qr(random).Q * eigenvalues.sqrt()).expand(repeats, size, size)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truth(eigenvalues: torch.Tensor) -> tuple[float, float]:
    trace = float(eigenvalues.sum())
    return trace, trace**2 / float(eigenvalues.square().sum())


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_mean_over_all_pairs_of_signs_is_exact_for_any_basis(steps):
    """All 2^N x 2^N pairs: the estimators' expectations, without randomness."""
    a = torch.randn(4, 6, dtype=torch.float64, generator=seeded(0))
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=seeded(1))).Q[:steps]
    c = a @ a.mT
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    pairs = torch.stack([torch.stack(p) for p in itertools.product(signs, repeat=2)])
    count = len(pairs)
    q, cq = basis.expand(count, -1, -1), (basis @ c).expand(count, -1, -1)
    trace, second = unbiased_moments(q, cq, rest_gram(q, cq, pairs, pairs @ c @ pairs.mT))
    assert trace.mean().item() == pytest.approx(torch.trace(c).item(), rel=1e-12)
    assert second.mean().item() == pytest.approx(c.square().sum().item(), rel=1e-12)
    if steps < 2:
        assert second.std() > 0.01 * second.mean()  # the single pairs are not


@pytest.mark.parametrize("name", SPECTRA)
def test_bias_is_below_its_error_and_the_spread_is_as_stated(name):
    """At the defaults and at fixed 8 and 32 probes, over independent repeats."""
    eigenvalues = SPECTRA[name](torch.arange(SIZE, dtype=torch.float64))
    trace, ratio = truth(eigenvalues)
    for target, draws in ((0.02, 128), (1e-12, 8), (1e-12, 32)):
        found = moments(with_spectrum(eigenvalues, REPEATS), target, draws)
        assert target < 0.01 or found.converged.all()
        for values, stated, exact in (
            (found.trace, found.trace_stderr, trace),
            (found.ratio, found.ratio_stderr, ratio),
        ):
            spread = values.std(ddof=1)
            # What is left of the ratio's bias after the jackknife: of second order.
            assert abs(values.mean() - exact) < 4 * spread / REPEATS**0.5 + 2 * spread**2 / exact
            # Too large is allowed (the jackknife's variance is); too small is not: 4 errors of a
            # standard deviation from 300 values of heavier tails than normal.
            assert 0.75 < (stated**2).mean() ** 0.5 / spread < 1.9


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_the_stated_error_cover(name):
    """95 % nominally; 88 % is 4 standard errors below 93 %, what few effective probes leave."""
    eigenvalues = SPECTRA[name](torch.arange(SIZE, dtype=torch.float64))
    found = moments(with_spectrum(eigenvalues, REPEATS), seed=3)
    for values, stated, exact in (
        (found.trace, found.trace_stderr, truth(eigenvalues)[0]),
        (found.ratio, found.ratio_stderr, truth(eigenvalues)[1]),
    ):
        assert np.mean(np.abs(values - exact) <= 1.96 * stated) > 0.87


def test_stopping_at_the_target_does_not_bias_downwards():
    """Stopping at the first look that meets 5 % would: by 1 %, seven standard errors here."""
    eigenvalues = 0.5 ** torch.arange(SIZE, dtype=torch.float64)
    found = moments(with_spectrum(eigenvalues, 400), target=0.05)
    assert len(set(found.num_probes.tolist())) > 1  # it did stop by the error
    for values, exact in zip((found.trace, found.ratio), truth(eigenvalues), strict=True):
        assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / 400**0.5


def test_deflation_saves_what_plain_probes_would_need():
    """Plain probes: relative variance 2 / (m D) for the trace, D = 9, so 555 probes to 2 %."""
    eigenvalues = SPECTRA["falling"](torch.arange(SIZE, dtype=torch.float64))
    found = moments(with_spectrum(eigenvalues, 20))
    assert (found.num_probes <= 48).all()
    assert 2 / truth(eigenvalues)[1] / 0.02**2 > 500


def test_numbers_do_not_depend_on_the_neighbours_that_stop_earlier_or_later():
    k = torch.arange(SIZE, dtype=torch.float64)
    matrices = torch.cat([with_spectrum(f(k)) for f in SPECTRA.values()])
    together = moments(matrices)
    assert len(set(together.num_probes.tolist())) > 1
    for i in range(len(matrices)):
        alone = deflated_moments(
            lambda active, i=i: Dense(matrices[i : i + 1][active]),
            [seeded(i)], matrices[i : i + 1, 0], size=SIZE, ratio=True,
            target_relative_stderr=0.02, max_draws=128,
        )  # fmt: skip
        assert alone.num_probes[0] == together.num_probes[i]
        assert alone.ratio[0] == pytest.approx(together.ratio[i], rel=1e-12)
        assert alone.ratio_stderr[0] == pytest.approx(together.ratio_stderr[i], rel=1e-9)


def test_few_outputs_repeated_eigenvalues_and_low_rank_are_exact():
    """The Krylov space ends early; every further direction is as good as another."""
    for eigenvalues in ([3.0, 3.0, 3.0, 3.0], [1.0, 0.0, 0.0, 0.0, 0.0], [4.0, 1.0] + 8 * [0.0]):
        spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
        found = moments(with_spectrum(spectrum, 3))
        trace, ratio = truth(spectrum)
        np.testing.assert_allclose(found.trace, trace, rtol=1e-12)
        np.testing.assert_allclose(found.ratio, ratio, rtol=1e-12)
        assert (found.trace_stderr < 1e-12 * trace).all()
        assert found.converged.all()


def test_zero_and_overflowing_operators_stop_at_once_and_leave_their_neighbours_alone():
    good = with_spectrum(SPECTRA["heavy"](torch.arange(SIZE, dtype=torch.float64)))
    found = moments(torch.cat([good, 0 * good, good * torch.inf]))
    assert found.ratio[0] == pytest.approx(moments(good).ratio[0], rel=1e-12)
    assert found.trace[1] == 0
    assert np.isnan(found.ratio[1:]).all()
    assert np.isnan(found.trace[2])
    assert (found.num_probes[1:] == 8).all()
    assert found.converged.tolist() == [True, False, False]
