"""Lanczos bounds on operators whose eigenvalues are known, and the rate at which they fail."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from tasks.lanczos import Eigenvalues, MakeOperator, lanczos, power_iteration

SIZE = 60
SPECTRA = {
    "linear": np.linspace(1, 0, SIZE),
    "power": 1 / np.arange(1, SIZE + 1),
    "geometric": 0.7 ** np.arange(SIZE),
    "hidden_top": np.concatenate([[1.0], np.linspace(0.9, 0, SIZE - 1)]),
}


def starts(count: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, size, generator=random, dtype=torch.float64)
    return torch.nn.functional.normalize(normals, dim=1)


def diagonal(eigenvalues: np.ndarray | torch.Tensor) -> MakeOperator:
    """Operators with these eigenvalues, (N,) or one row per operator (B, N)."""
    table = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return lambda active: lambda u: u * (table if table.ndim == 1 else table[active])


def run(
    spectrum: np.ndarray | torch.Tensor,
    count: int = 8,
    *,
    tolerance: float = 1e-3,
    failure_probability: float = 1e-9,
    max_iterations: int = 64,
    seed: int = 0,
) -> Eigenvalues:
    return lanczos(
        diagonal(spectrum),
        starts(count, np.shape(spectrum)[-1], seed),
        tolerance=tolerance,
        failure_probability=failure_probability,
        max_iterations=max_iterations,
    )


@pytest.mark.parametrize("failure_probability", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("name", SPECTRA)
def test_upper_bounds_fail_no_more_often_than_stated(name, failure_probability):
    """At fixed steps, 4000 starts; the limit is passed by chance once in 10^6 such tests."""
    count = 4000
    for steps in (2, 5, 10):
        found = run(
            SPECTRA[name],
            count,
            tolerance=1e-14,
            failure_probability=failure_probability,
            max_iterations=steps,
            seed=steps,
        )
        violations = int((found.upper < 1 - 1e-12).sum())
        assert violations <= scipy.stats.binom.isf(1e-6, count, failure_probability)
        assert (found.lower <= 1 + 1e-12).all()


def test_upper_bounds_are_nearly_sharp():
    """A bound that never failed at 20 % would be needlessly wide: one case comes within half."""
    rates = []
    for name, spectrum in SPECTRA.items():
        found = run(spectrum, 2000, tolerance=1e-14, failure_probability=0.2, max_iterations=5)
        rates.append(((found.upper < 1 - 1e-12).mean(), name))
    assert max(rates)[0] > 0.1, rates


@pytest.mark.slow
def test_no_violation_in_ten_thousand_starts_at_one_in_a_million():
    """With the stopping rule on, which picks the moment to stop by looking at the bound."""
    for seed, spectrum in enumerate(SPECTRA.values()):
        found = run(spectrum, 2500, tolerance=0.03, failure_probability=1e-6, seed=seed)
        assert found.converged.all()
        assert (found.upper >= 1 - 1e-12).all()
        assert (np.sqrt(found.upper / found.lower) <= 1.03 * (1 + 1e-12)).all()


def test_stopping_by_the_certificate_keeps_its_failure_probability():
    """The bound must hold at a data-dependent step: eps = 5 %, tolerance 10 %, 5000 starts each."""
    for seed, spectrum in enumerate(SPECTRA.values()):
        found = run(spectrum, 5000, tolerance=0.1, failure_probability=0.05, seed=seed)
        violations = int((found.upper < 1 - 1e-12).sum())
        assert violations <= scipy.stats.binom.isf(1e-6, 5000, 0.05)


def test_a_start_orthogonal_to_the_top_is_the_only_way_to_be_wrong():
    """Pins what the probability is about: without a top component the bound is blind."""
    blind = starts(1)
    blind[0, 0] = 0
    found = lanczos(
        diagonal(SPECTRA["hidden_top"]),
        blind,
        tolerance=1e-3,
        failure_probability=1e-9,
        max_iterations=64,
    )
    assert found.upper[0] < 1


def test_bounds_enclose_dense_eigenvalues_of_random_matrices():
    random = torch.Generator().manual_seed(1)
    roots = torch.randn(6, 40, 90, generator=random, dtype=torch.float64)
    matrices = roots @ roots.mT
    exact = torch.linalg.eigvalsh(matrices)[:, -1].numpy()
    found = lanczos(
        lambda active: lambda u: torch.einsum("bij,bj->bi", matrices[active], u),
        starts(6, 40),
        tolerance=1e-4,
        failure_probability=1e-9,
        max_iterations=64,
    )
    assert found.converged.all()
    # eigvalsh is itself exact to roundoff times the norm only
    assert (found.lower <= exact * (1 + 1e-13)).all()
    assert (exact <= found.upper * (1 + 1e-13)).all()
    # A symmetric matrix has an eigenvalue within the residual of every Rayleigh quotient.
    assert (exact - found.lower <= found.residual + 1e-13 * exact).all()
    assert (exact - found.lower <= found.conditional_error * (1 + 1e-6) + 1e-13 * exact).all()


@pytest.mark.parametrize("scale", [1e-130, 1.0, 1e130])
def test_bounds_scale_with_the_operator(scale):
    unit = run(SPECTRA["power"])
    found = run(SPECTRA["power"] * scale)
    for name in ("lower", "upper"):
        np.testing.assert_allclose(getattr(found, name) / scale, getattr(unit, name), rtol=1e-12)
    np.testing.assert_array_equal(found.num_iterations, unit.num_iterations)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_operators_whose_squares_leave_float64_are_flagged_not_guessed(scale):
    found = run(SPECTRA["power"] * scale)
    assert np.isnan([found.lower, found.upper]).all()
    assert not found.converged.any()


def test_zero_operator_is_done_after_one_product_with_a_zero_interval():
    found = run(np.zeros(SIZE))
    assert found.converged.all()
    assert (found.num_iterations == 1).all()
    assert (found.lower == 0).all()
    assert (found.upper == 0).all()


def test_identity_is_done_after_one_product_with_a_point():
    found = run(np.full(SIZE, 3.0))
    assert (found.num_iterations == 1).all()
    np.testing.assert_allclose([found.lower, found.upper], 3, rtol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_operators_end_with_an_invariant_space(rank):
    spectrum = np.zeros(SIZE)
    spectrum[:rank] = np.linspace(2, 1, rank)
    found = run(spectrum, tolerance=1e-15, failure_probability=1e-12)
    assert found.converged.all()
    assert (found.num_iterations <= rank + 2).all()  # one in exact arithmetic, one for rounding
    np.testing.assert_allclose([found.lower, found.upper], 2, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_products_of_a_small_space_give_the_exact_value(size):
    spectrum = np.linspace(2, 1, size)
    found = run(spectrum, tolerance=1e-15, failure_probability=1e-12)
    assert (found.num_iterations <= size).all()
    assert found.converged.all()
    np.testing.assert_allclose([found.lower, found.upper], 2, rtol=1e-12)


@pytest.mark.parametrize("max_iterations", [1, 2, 3])
def test_too_few_iterations_give_a_wide_valid_interval(max_iterations):
    found = run(SPECTRA["linear"], 500, max_iterations=max_iterations)
    assert not found.converged.any()
    assert (found.lower < 1).all()
    assert (found.upper > 1).all()
    assert np.isfinite(found.upper).all()


def test_operators_that_give_nan_are_flagged_and_do_not_harm_their_neighbours():
    table = torch.as_tensor(SPECTRA["power"]).repeat(4, 1)
    table[2, 7] = float("inf")
    found = run(table, 4)
    alone = run(SPECTRA["power"], 4)
    good = [0, 1, 3]
    assert np.isnan([found.lower[2], found.upper[2]]).all()
    assert not found.converged[2]
    assert found.converged[good].all()
    np.testing.assert_allclose(found.upper[good], alone.upper[good], rtol=1e-12)


def test_finished_operators_leave_and_the_rest_is_rebuilt_without_changing_results():
    """Easy operators end early; results equal those of each operator alone, to rounding."""
    table = torch.stack(
        [torch.as_tensor(SPECTRA["geometric"])] * 6 + [torch.linspace(1, 0.9, SIZE)]
    )
    made: list[list[int]] = []

    def make(active: np.ndarray):
        made.append(active.tolist())
        return diagonal(table)(active)

    settings = {"tolerance": 1e-4, "failure_probability": 1e-9, "max_iterations": SIZE}
    together = lanczos(make, starts(7), **settings)
    assert made[0] == list(range(7))
    assert made[-1] == [6]
    for i in range(7):
        alone = lanczos(diagonal(table[i]), starts(7)[i : i + 1], **settings)
        assert alone.num_iterations[0] == together.num_iterations[i]
        np.testing.assert_allclose(alone.upper[0], together.upper[i], rtol=1e-12)


def power(spectrum: np.ndarray, tolerance: float, max_iterations: int = 5000) -> Eigenvalues:
    return power_iteration(
        diagonal(spectrum), starts(200), tolerance=tolerance, max_iterations=max_iterations
    )


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("name", SPECTRA)
def test_power_iteration_keeps_what_its_stopping_rule_guarantees(name, tolerance):
    found = power(SPECTRA[name], tolerance)
    assert found.converged.all()
    assert (found.lower <= 1 + 1e-12).all()
    distance = np.abs(SPECTRA[name][None] - found.lower[:, None]).min(1)
    assert (distance <= tolerance * found.lower).all()
    assert np.isnan(found.upper).all()


@pytest.mark.parametrize("name", ["geometric", "power", "hidden_top"])
def test_power_iteration_finds_the_top_where_there_is_a_gap(name):
    """Gaps of 10 to 50 %, tolerance 1e-4: no other eigenvalue fits the residual but the top."""
    found = power(SPECTRA[name], 1e-4)
    np.testing.assert_allclose(found.lower, 1, rtol=1e-4)


def test_power_iteration_flags_limits_zeros_and_nan():
    assert not power(SPECTRA["linear"], 1e-6, max_iterations=3).converged.any()
    zero = power(np.zeros(SIZE), 1e-4)
    assert zero.converged.all()
    assert (zero.lower == 0).all()
    broken = power(np.full(SIZE, np.nan), 1e-4)
    assert np.isnan(broken.lower).all()
    assert not broken.converged.any()
