"""Spectra of Jacobians at images and layers, against dense SVDs of plain autograd's rows."""

from __future__ import annotations

import functools

import numpy as np
import oracles
import pytest
import torch
from jacobian_oracles import NETWORKS, exact_spectra, linear, network
from torch import nn

from tasks.layer_rows import IMAGE, plan_rows
from tasks.measurement import MeasurementError, Subject
from tasks.spectra import numerical_rank, spectra

COUNT = 5
EPS = float(np.finfo(np.float64).eps)


def images(count: int = COUNT) -> torch.Tensor:
    return oracles.digits()[0][:count]


@functools.cache
def exact(name: str) -> dict[str, np.ndarray]:
    return exact_spectra(network(name), images())


def subject(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> Subject:
    return oracles.make_subject(network(name).to(dtype), images(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_singular_values_of_images_and_of_every_layer_are_those_of_all_rows(name):
    """Absolute error in units of sigma_1: QR and SVD are backward stable, nothing more."""
    of = subject(name)
    found = spectra(of, of.batch(range(COUNT)), layers=True)
    assert list(found.singular_values) == list(exact(name))
    for layer, truth in exact(name).items():
        values = found.singular_values[layer]
        assert np.all(np.diff(values, axis=1) <= 0)
        error = np.abs(values - truth[:, : values.shape[1]])
        assert np.all(error <= 1e-12 * truth[:, :1])
        assert np.all(truth[:, values.shape[1] :] <= 1e-12 * truth[:, :1])
        np.testing.assert_allclose(
            found.frobenius(layer), np.linalg.norm(truth, axis=1), rtol=1e-12
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_singular_values_are_within_the_stated_noise_of_float64(name):
    of = subject(name, torch.float32)
    found = spectra(of, of.batch(range(COUNT)), layers=True)
    for layer, truth in exact(name).items():
        values = found.singular_values[layer]
        error = np.abs(values - truth[:, : values.shape[1]]).max(1) / truth[:, 0]
        assert np.all(error <= 4 * found.noise[layer])
        assert found.noise[layer] < 1e-4


def test_a_head_saves_rows_and_changes_no_singular_value(monkeypatch):
    of = subject("vit_wide")
    batch = of.batch(range(COUNT))
    short = spectra(of, batch, layers=True)
    assert (short.num_rows, short.num_outputs) == (32, 40)
    monkeypatch.setattr("tasks.layer_rows.subject_head", lambda *_: None)
    full = spectra(of, batch, layers=True)
    assert full.num_rows == 40
    for name, values in short.singular_values.items():
        every = full.singular_values[name]
        assert np.abs(every[:, : values.shape[1]] - values).max() <= 1e-12 * every.max()
        assert np.all(every[:, values.shape[1] :] <= 1e-12 * every[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_decides_how_many_passes_and_no_number(dtype):
    of = subject("vit", dtype)
    batch = of.batch(range(COUNT))
    whole = spectra(of, batch, layers=True)
    bytes_of = {k: 10 * 8 * v for k, v in _sizes(of).items()}
    assert len(_plan(of, 2.0).groups) == 1
    # All of two images; all of none, in two groups; hardly the largest layer.
    for budget, at_once, groups in (
        (2.1 * sum(bytes_of.values()), 2, 1),
        (0.7 * sum(bytes_of.values()), 1, 2),
        (1.0 * max(bytes_of.values()), 1, None),
    ):
        gib = budget * (dtype.itemsize / 8) / 2**30
        plan = _plan(of, gib)
        assert plan.images_at_once == at_once
        assert groups is None or len(plan.groups) == groups
        assert [name for group in plan.groups for name in group] == list(plan.sizes)
        found = spectra(of, batch, layers=True, memory_gib=gib)
        # float64 rows differ by the rounding of another batch size; float32 by that of float32
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        for name, values in found.singular_values.items():
            expected = whole.singular_values[name]
            assert np.abs(values - expected).max() <= tolerance * expected.max(), name
        assert found.forward_equivalents >= whole.forward_equivalents


def test_rows_that_do_not_fit_are_refused_with_the_layer_and_what_it_needs():
    of = subject("vit")
    need = 10 * max(_sizes(of).values()) * 8 / 2**30
    with pytest.raises(MeasurementError, match=r"layer blocks.0.mlp.fc2: the 10 rows.*take") as e:
        spectra(of, of.batch(range(2)), layers=True, memory_gib=0.99 * need)
    assert f"{need:.3g} GiB" in str(e.value)
    assert "memory_gib" in str(e.value)


def test_layernorm_in_front_of_the_head_costs_two_ranks():
    """32 features, 40 outputs: the mean is lost exactly, the radial direction up to eps."""
    of = subject("vit_wide")
    found = spectra(of, of.batch(range(COUNT)))
    rank, clear = numerical_rank(found.singular_values[IMAGE], found.noise[IMAGE])
    # In float64 the epsilon of the LayerNorm leaves the radial direction above rounding.
    assert set(rank) <= {30, 31}
    assert clear.all()
    of = subject("vit_wide", torch.float32)
    found = spectra(of, of.batch(range(COUNT)))
    rank, _ = numerical_rank(found.singular_values[IMAGE], found.noise[IMAGE])
    assert set(rank) <= {30, 31}


def test_exactly_singular_jacobians_have_their_rank_in_both_precisions():
    """Width 6 between 64 inputs and 12 outputs, no head that could hide it."""
    random = torch.Generator().manual_seed(0)
    sizes = ((6, 64), (12, 6), (12, 12))
    model = linear(*(torch.randn(*s, generator=random).double() / 10 for s in sizes))
    model.insert(3, nn.Tanh())
    for dtype in (torch.float32, torch.float64):
        of = oracles.make_subject(model.to(dtype), images(), output="identity")
        found = spectra(of, of.batch(range(COUNT)))
        rank, clear = numerical_rank(found.singular_values[IMAGE], found.noise[IMAGE])
        assert rank.tolist() == [6] * COUNT
        assert clear.all()


def test_rank_rule_keeps_what_is_ten_times_the_noise_and_says_when_there_is_no_gap():
    s = np.array([[1.0, 1e-3, 0.0], [1.0, 2e-5, 1e-6], [1.0, 2e-5, 0.9e-5], [0.0, 0.0, 0.0]])
    rank, clear = numerical_rank(s, 1e-6)
    assert rank.tolist() == [2, 2, 2, 0]
    assert clear.tolist() == [True, True, False, True]
    rank, clear = numerical_rank(np.full((1, 3), np.nan), 1e-6)
    assert rank.tolist() == [0]


def test_volumes_of_float64_rows_keep_digits_that_a_gram_matrix_would_lose():
    """Singular values 1 and 1e-9: the smaller one to 1e-6, relatively."""
    weight = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    turn, _ = torch.linalg.qr(
        torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    )
    model = linear(weight @ turn[:2])
    of = oracles.make_subject(model, torch.ones(2, 1, 1, 3).double(), output="identity")
    found = spectra(of, of.batch(range(2))).singular_values[IMAGE]
    np.testing.assert_allclose(found, [[1, 1e-9]] * 2, rtol=1e-6)


def test_saturated_outputs_leave_tiny_singular_values_and_not_zero():
    """Sigmoid slopes near the least whose products the self-test can judge."""
    for dtype, logit in ((torch.float32, 60.0), (torch.float64, 345.0)):
        model = linear(torch.eye(3, dtype=dtype) * logit)
        of = oracles.make_subject(model, torch.ones(2, 1, 1, 3, dtype=dtype))
        found = spectra(of, of.batch(range(2))).singular_values[IMAGE]
        np.testing.assert_allclose(found, np.full((2, 3), logit * np.exp(-logit)), rtol=1e-6)


def test_rows_that_overflow_are_nan_for_their_image_only():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), _Root()).double()
    x = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]).reshape(3, 1, 1, 2).double()
    of = oracles.make_subject(model, x, output="identity")
    found = spectra(of, of.batch(range(3)), layers=True)
    for values in found.singular_values.values():
        assert np.isfinite(values[:2]).all()
        assert np.isnan(values[2]).all()


def test_networks_without_layers_have_a_spectrum_and_no_layers():
    of = oracles.make_subject(*oracles.worked_example(), output="identity")
    found = spectra(of, of.batch(range(2)))
    assert list(found.singular_values) == [IMAGE]
    np.testing.assert_allclose(found.singular_values[IMAGE], [[3, np.sqrt(2)]] * 2, rtol=1e-14)
    with pytest.raises(MeasurementError, match="expected linear or convolutional modules"):
        spectra(of, of.batch(range(2)), layers=True)


class _Root(nn.Module):
    """sign(z) sqrt|z| with an infinite derivative at 0."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.abs().sqrt()


def _plan(of: Subject, memory_gib: float):
    return plan_rows(of, of.batch(range(COUNT)), image=True, layers=True, memory_gib=memory_gib)


def _sizes(of: Subject) -> dict[str, int]:
    return _plan(of, 2.0).sizes
