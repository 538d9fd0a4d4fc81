"""Local volumetric ratios against dense SVDs, closed forms, ranks and scaling laws."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobian_oracles import NETWORKS, Positioned, exact_spectra, linear, network
from torch import nn

from tasks.block import Block
from tasks.log_mean import log_mean
from tasks.measurement import Estimate, Row, Status, Subject
from tasks.outline import LayerOutline, Outline
from tasks.volume import Volume

COUNT = 4
FAST = Volume(layers=False)


def images(count: int = COUNT) -> torch.Tensor:
    return oracles.digits()[0][:count]


@functools.cache
def exact(name: str) -> dict[str, np.ndarray]:
    return exact_spectra(network(name), images())


def subject(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> Subject:
    return oracles.make_subject(network(name).to(dtype), images(), **changes)  # type: ignore[arg-type]


def estimates(
    model: nn.Module, x: torch.Tensor, volume: Volume | None = None
) -> dict[str, Estimate]:
    """Of logits, in float64: by quantity, layers as ``quantity/layer``."""
    volume = volume or Volume()
    of = oracles.make_subject(copy.deepcopy(model).double(), x, output="identity")
    return by_name(volume, volume.measure(of, Block(range(len(x)))))


def by_name(volume: Volume, rows: list[Row]) -> dict[str, Estimate]:
    found = volume.summarize(oracles.columns(rows))
    return {e.quantity + (f"/{e.layer}" if e.layer else ""): e for e in found}


def log_volumes(singular_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-volume and rank per image, with the textbook rule of float64 and a wide gap."""
    s = singular_values
    kept = s > 1e-11 * s[:, :1]
    return np.where(kept, np.log(np.where(kept, s, 1)), 0).sum(1), kept.sum(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_volumes_and_ranks_are_those_of_dense_svds(name):
    rows = Volume().measure(subject(name), Block(range(COUNT)))
    found = by_name(Volume(), rows)
    totals = np.zeros(COUNT)
    for layer, s in exact(name).items():
        truth, rank = log_volumes(s)
        quantities = (
            ("layer_log_volume", "layer_rank") if layer else ("log_volume", "jacobian_rank")
        )
        for quantity, expected in zip(quantities, (truth, rank), strict=True):
            chosen = [r for r in rows if (r.quantity, r.layer) == (quantity, layer or None)]
            assert [row.sample for row in chosen] == list(range(COUNT))
            values = np.array([row.value for row in chosen])
            np.testing.assert_allclose(values, expected, atol=1e-8)
            for row, value in zip(chosen, expected, strict=True):
                assert row.status is Status.OK
                assert row.lower - 1e-9 <= value <= row.upper + 1e-9
        if layer:
            totals += np.exp(truth)
            name_ = f"layer_log_volume/{layer}"
            assert found[name_].value == pytest.approx(np.log(np.exp(truth).mean()), abs=1e-8)
    truth, rank = log_volumes(exact(name)[""])
    assert found["log_lvr"].value == pytest.approx(np.log(np.exp(truth).mean()), abs=1e-8)
    assert found["mean_log_volume"].value == pytest.approx(truth.mean(), abs=1e-8)
    assert found["mean_log_volume"].value <= found["log_lvr"].value
    assert found["log_nvr"].value == pytest.approx(np.log(totals.mean()), abs=1e-8)
    assert found["jacobian_rank"].value == rank.mean()
    top3 = np.log(exact(name)[""][:, :3]).sum(1).mean()
    assert found["log_volume_top3"].value == pytest.approx(top3, abs=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_log_volumes_hold_those_of_float64_of_the_same_rank(name):
    """The interval is by Weyl from the noise of the rows; it is the stated tolerance."""
    rows = Volume().measure(subject(name, torch.float32), Block(range(COUNT)))
    compared = 0
    for row in rows:
        if row.quantity not in ("log_volume", "layer_log_volume"):
            continue
        s = exact(name)[row.layer or ""][row.sample]
        quantity = "layer_rank" if row.layer else "jacobian_rank"
        (rank,) = [
            int(r.value)
            for r in rows
            if (r.quantity, r.layer, r.sample) == (quantity, row.layer, row.sample)
        ]
        truth = np.log(s[:rank]).sum()
        assert row.lower <= truth <= row.upper
        compared += 1
    assert compared == COUNT * len(exact(name))


def test_closed_forms_of_linear_networks():
    """LVR = 3 sqrt 2 = 4.242641; with a second layer LVR = 8.485281 and NVR = 10.485281."""
    w1 = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, -1.0]]).double()
    w2 = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double()
    _, x = oracles.worked_example()
    one, two = estimates(linear(w1), x), estimates(linear(w1, w2), x)
    assert one["log_lvr"].value == pytest.approx(1.445186, abs=1e-6)
    assert math.exp(one["log_lvr"].value) == pytest.approx(4.242641, abs=1e-6)
    assert one["log_nvr"].value == pytest.approx(one["log_lvr"].value, rel=1e-12)
    assert math.exp(two["log_lvr"].value) == pytest.approx(8.485281, abs=1e-6)
    assert math.exp(two["log_nvr"].value) == pytest.approx(10.485281, abs=1e-6)
    assert math.exp(two["layer_log_volume/2"].value) == pytest.approx(2, rel=1e-12)
    for found in (one, two):
        assert found["jacobian_rank"].value == 2
        assert {e.status for e in found.values()} == {Status.OK}
        # Two outputs: the three largest are the two that there are.
        assert found["log_volume_top3"].value == pytest.approx(found["log_lvr"].value, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layernorm_before_the_head_takes_two_of_its_directions(dtype):
    """32 features, 40 outputs, eps of the norm 0: rank 30 = d - 2, and the volume of those."""
    model = network("vit_wide")
    model.norm.eps = 0.0
    of = oracles.make_subject(model.to(dtype), images())
    found = by_name(FAST, FAST.measure(of, Block(range(COUNT))))
    assert found["jacobian_rank"].value == 30
    assert found["jacobian_rank"].status is Status.OK
    truth = np.log(exact_spectra(model, images())[""][:, :30]).sum(1).mean()
    error = found["mean_log_volume"].error_bound
    assert abs(found["mean_log_volume"].value - truth) <= error + 1e-8
    assert error < (0.5 if dtype == torch.float32 else 1e-6)
    full = Volume(volume="full", layers=False)
    found = by_name(full, full.measure(of, Block(range(COUNT))))
    assert found["log_lvr"].value == -math.inf
    assert found["mean_log_volume"].value == -math.inf
    assert found["jacobian_rank"].value == 30


class Kinked(nn.Module):
    """relu(x) diag(1, 2, 3): rank is the number of positive inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1).relu())


def test_images_of_different_rank_are_said_and_full_counts_deficient_ones_as_zero():
    x = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]).reshape(3, 1, 1, 3)
    pseudo = estimates(Kinked(), x)
    for quantity in ("log_lvr", "mean_log_volume", "jacobian_rank"):
        assert pseudo[quantity].status is Status.RANK_VARIES, quantity
    assert math.exp(pseudo["log_lvr"].value) == pytest.approx((6 + 2 + 6) / 3, rel=1e-12)
    assert pseudo["jacobian_rank"].value == pytest.approx(8 / 3)
    # The layer behind the kink has rank 3 for every image.
    assert pseudo["layer_rank/layer"].value == 3
    assert pseudo["log_nvr"].status is Status.OK
    full = estimates(Kinked(), x, Volume(volume="full"))
    assert math.exp(full["log_lvr"].value) == pytest.approx(4, rel=1e-12)
    assert full["mean_log_volume"].value == -math.inf
    assert full["log_lvr"].status is Status.OK


def test_a_cut_without_a_gap_is_said_in_rows_and_estimates():
    """Two singular values on either side of 10 times the noise, a factor of two apart."""
    noise = 1e-13  # the least that a float64 network without a referee is given
    weight = torch.diag(torch.tensor([1.0, 1.5e-12, 0.75e-12], dtype=torch.float64))
    x = torch.ones(2, 1, 1, 3)
    found = estimates(linear(weight), x)
    assert noise * 10 < 1.5e-12
    for quantity in ("log_lvr", "log_nvr", "mean_log_volume", "jacobian_rank", "layer_rank/1"):
        assert found[quantity].status is Status.UNCLEAR_RANK, quantity
    assert math.isnan(found["jacobian_rank"].error_bound)
    weight[2, 2] = 1e-14
    found = estimates(linear(weight), x)
    assert found["log_lvr"].status is Status.OK
    assert found["jacobian_rank"].value == 2
    assert found["jacobian_rank"].error_bound == 0


def test_a_zero_jacobian_has_volume_zero_and_rank_zero():
    found = estimates(linear(torch.zeros(2, 3)), torch.ones(2, 1, 1, 3))
    assert found["log_lvr"].value == found["log_nvr"].value == -math.inf
    assert found["jacobian_rank"].value == 0
    assert found["log_volume_top3"].value == -math.inf


def test_without_layers_the_sum_over_layers_is_not_measured():
    volume = Volume(layers=False)
    rows = volume.measure(subject("mlp"), Block(range(COUNT)))
    assert not any(row.layer for row in rows)
    found = by_name(volume, rows)
    assert set(found) == set(Volume.quantities)
    assert found["log_nvr"].status is Status.NOT_MEASURED
    whole = by_name(Volume(), Volume().measure(subject("mlp"), Block(range(COUNT))))
    for quantity in set(Volume.quantities) - {"log_nvr"}:
        assert found[quantity].value == pytest.approx(whole[quantity].value, rel=1e-12)


def test_layers_on_constant_inputs_are_named_and_left_out():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = estimates(Positioned(), images())
    for quantity in ("layer_log_volume/position", "layer_rank/position"):
        assert found[quantity].status is Status.CONSTANT_INPUT
    parts = [found[f"layer_log_volume/{layer}"].value for layer in ("first", "head")]
    assert found["log_nvr"].value == pytest.approx(np.logaddexp(*parts), rel=1e-12)


def test_rows_do_not_depend_on_batches_or_blocks_or_memory():
    whole = Volume().measure(subject("vit", batch_size=4), Block(range(COUNT)))
    parts: list[Row] = []
    for block in (range(1), range(1, COUNT)):
        of = subject("vit", batch_size=2)
        parts += Volume(memory_gib=2e-4).measure(of, Block(block))
    for a, b in zip(whole, parts, strict=True):
        assert (a.sample, a.layer, a.quantity, a.status) == (
            b.sample,
            b.layer,
            b.quantity,
            b.status,
        )
        assert a.value == pytest.approx(b.value, rel=1e-10)


def test_an_overflow_is_a_row_and_not_an_error():
    class Root(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.abs().sqrt()

    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), Root())
    x = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]).reshape(3, 1, 1, 2)
    found = estimates(model, x)
    for quantity in Volume.quantities:
        assert found[quantity].status is Status.NOT_FINITE, quantity
        assert math.isnan(found[quantity].value), quantity


def test_cost_and_note_follow_the_rows_of_the_head():
    layers = (LayerOutline("a", 10, 192, 1), LayerOutline("head", 192, 1000, 1))
    outline = Outline({"input_size": (3, 96, 96)}, 1000, 10**6, 10**9, layers)
    assert "192 exact rows through 2 layers" in Volume().note(outline)
    assert "192 exact rows, the largest take 20 MiB" in Volume(layers=False).note(outline)
    less = Volume(layers=False, memory_gib=0.01).note(outline)
    assert less.endswith("20 MiB (float32), more than memory_gib = 0.01: raise it")
    assert 192 < Volume().forward_equivalents(outline) < 400
    assert Volume(memory_gib=9.0).key_fields() == Volume().key_fields()


@pytest.mark.parametrize("count", [3, 50])
def test_log_of_a_mean_has_the_delta_methods_error(count):
    """Bias and spread over many draws: sd of the log-mean is the stated stderr on average."""
    rng = np.random.default_rng(0)
    values = rng.normal(-1000, 0.2, (400, count))
    found = [log_mean(column_rows(v), "log_volume", name="log_lvr") for v in values]
    truth = -1000 + 0.2**2 / 2  # of a log-normal
    estimate, stderr = (np.array([getattr(e, k) for e in found]) for k in ("value", "stderr"))
    spread = estimate.std(ddof=1)
    assert np.sqrt((stderr**2).mean()) == pytest.approx(spread, rel=4 / np.sqrt(2 * 400))
    bias = -(np.expm1(0.2**2)) / (2 * count)
    assert abs(estimate.mean() - truth - bias) < 4 * spread / np.sqrt(400)
    covered = np.mean([e.ci_low <= truth <= e.ci_high for e in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400)


def test_log_of_a_mean_does_not_depend_on_the_order_of_rows():
    values = np.random.default_rng(0).normal(0, 3, 20)
    one = log_mean(column_rows(values), "log_volume", name="log_lvr")
    assert log_mean(column_rows(values[::-1]), "log_volume", name="log_lvr") == one


def column_rows(values: np.ndarray):
    return oracles.columns(
        [
            Row("log_volume", float(v), i, lower=float(v), upper=float(v))
            for i, v in enumerate(values)
        ]
    )


scales = st.floats(0.1, 10)
few = settings(max_examples=8, deadline=None)


class Scaled(nn.Module):
    """c f: a factor outside the layers."""

    def __init__(self, model: nn.Module, c: float) -> None:
        super().__init__()
        self.model, self.c = model, c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c * self.model(x)


@functools.cache
def relu_network(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first, last = (nn.Linear(*s, bias=bias, dtype=torch.float64) for s in ((64, 24), (24, 5)))
        return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


def lvr(model: nn.Module, x: torch.Tensor) -> float:
    return estimates(model, x, FAST)["log_lvr"].value


@few
@given(scales)
def test_scaling_the_outputs_adds_n_logarithms_of_the_factor(c):
    found = lvr(Scaled(relu_network(), c), images())
    assert found == pytest.approx(lvr(relu_network(), images()) + 5 * math.log(c), abs=1e-8)


@few
@given(scales)
def test_scaling_the_images_with_the_first_layer_subtracts_them(s):
    model = copy.deepcopy(relu_network())
    with torch.no_grad():
        model[1].weight.div_(s)
    found = lvr(model, s * images().double())
    assert found == pytest.approx(lvr(relu_network(), images()) - 5 * math.log(s), abs=1e-8)


@few
@given(scales)
def test_moving_scale_between_relu_layers_changes_nothing(a):
    model = copy.deepcopy(relu_network())
    with torch.no_grad():
        model[1].weight.mul_(a)
        model[1].bias.mul_(a)
        model[3].weight.div_(a)
    assert lvr(model, images()) == pytest.approx(lvr(relu_network(), images()), abs=1e-8)


@few
@given(scales)
def test_scaling_all_weights_of_a_bias_free_relu_network_adds_ln_logarithms(a):
    model = copy.deepcopy(relu_network(bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(a)
    base = lvr(relu_network(bias=False), images())
    assert lvr(model, images()) == pytest.approx(base + 2 * 5 * math.log(a), abs=1e-8)


@few
@given(st.integers(0, 10**6))
def test_a_rotation_of_the_inputs_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator).double())
    model = copy.deepcopy(relu_network())
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight @ turn.mT)
    turned = (images().double().flatten(1) @ turn.mT).reshape(images().shape)
    assert lvr(model, turned) == pytest.approx(lvr(relu_network(), images()), abs=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_volume_is_bounded_by_the_frobenius_norm_of_its_rank(name):
    """r dV^(2/r) <= ||J||_F^2: geometric against arithmetic mean."""
    rows = FAST.measure(subject(name), Block(range(COUNT)))
    log_volume = [row.value for row in rows if row.quantity == "log_volume"]
    rank = [row.value for row in rows if row.quantity == "jacobian_rank"]
    for v, r, s in zip(log_volume, rank, exact(name)[""], strict=True):
        assert r * math.exp(2 * v / r) <= (s**2).sum() * (1 + 1e-9)
