"""Networks that attain the inequalities, and networks that defeat the printed ones.

A wrong constant shows in the first; slack inequalities do not see it.
"""

from __future__ import annotations

import math

import pytest
import torch
from bound_oracles import (
    SUMMED,
    Checks,
    checks_of,
    measured,
    near,
    of_kind,
    vectors,
)
from jacobian_oracles import linear
from torch import nn


@pytest.mark.parametrize("size", [1, 2, 3])
def test_orthogonal_rows_attain_eq_6_8_and_9(size: int):
    generator = torch.Generator().manual_seed(size)
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    x = torch.randn(1, 1, 1, 5, generator=generator, dtype=torch.float64)
    checks = checks_of(linear(1.7 * q[:size]), x)
    for bound in ("6", "9", "10"):
        for kind in SUMMED:
            assert checks(bound, kind).right == near(checks(bound, kind).left)
    for kind in ("rank", "printed"):
        assert checks("8", kind).left == near(1.7**2 * size)
        assert checks("8", kind).right == near(1.7**2 * size)
    assert checks("9", "printed").left == near(1.7)
    assert checks.broken == []


def test_a_product_of_scalars_attains_eq_10_12_and_35():
    one = torch.ones(1, 1).double()
    checks = checks_of(linear(one, one), vectors([2.5]))
    for bound, value in (("10", 2.0), ("12", 2.0), ("12b", 2.0), ("35", 5.0)):
        for kind in SUMMED:
            assert checks(bound, kind).left == near(value)
            assert checks(bound, kind).right == near(value)


def test_a_scalar_product_attains_eq_11_and_the_whole_chain():
    w = torch.tensor([[3.0, -1.0, 2.0, 0.5]]).double()
    checks = checks_of(linear(w), vectors([0.3, 1.0, -2.0, 5.0]))
    for bound in ("11", "48 A<=B", "48 B<=C", "48 C<=D"):
        for kind in SUMMED:
            assert checks(bound, kind).left == near(float(w.norm()))
            assert checks(bound, kind).right == near(float(w.norm()))
            assert checks(bound, kind).holds


@pytest.mark.parametrize("units", [3, 5])
def test_a_sum_of_units_attains_eq_44_so_d_counts_units_and_not_inputs(units: int):
    checks = checks_of(
        linear(torch.ones(units, 1).double(), torch.ones(1, units).double()), vectors([1.0])
    )
    for kind in SUMMED:
        assert checks("44", kind).left == near(units**2)
        assert checks("44", kind).right == near(units * units)
    assert checks("44", "printed").left > 1 * (units + units)  # one input, all parameters


class Weighted(nn.Module):
    """f = sum_t a_t <w, x_t>, a fixed: all trainable parameters are w."""

    def __init__(self, w: list[float], a: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(len(w), 1, bias=False)
        self.layer.weight.data = torch.tensor([w])
        self.a: torch.Tensor
        self.register_buffer("a", torch.tensor(a))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(len(x), len(self.a), -1)
        return self.layer(tokens)[:, :, 0] @ self.a[:, None]


def test_orthogonal_tokens_attain_every_form():
    model = Weighted([1.0, -2.0], [2.0, 0.5]).double()
    checks = checks_of(model, vectors([3.0, 0.0, 0.0, 3.0]))
    value = math.sqrt(5) * math.hypot(2.0, 0.5)
    for kind in ("untied", "direct", "per_position", "gram"):
        assert checks("11", kind).left == near(value)
        assert checks("11", kind).right == near(value)
        assert checks("12", kind).right == near(value)
        assert checks("11", kind).conditions_met
    assert checks("11", "printed").holds is False  # 1 / sqrt(2) of it: two tokens
    assert checks("11", "printed").right == near(value / math.sqrt(2))


class Skip(nn.Module):
    """x + tanh(v x) in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.layer.weight.data.fill_(0.75)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return x + self.layer(x).tanh()


def test_one_dimension_attains_eq_17():
    checks = checks_of(Skip().double(), vectors([1.3]))
    for kind in ("untied", "printed", "direct"):
        check = checks("17", kind, "layer")
        assert check.left == near(0.75 / math.cosh(0.75 * 1.3) ** 2)
        assert check.right == near(check.left)
        assert check.conditions_met


def assert_printed_fails(checks: Checks, *bounds: str) -> None:
    for bound in bounds:
        printed_form, untied = checks(bound, "printed"), checks(bound, "untied")
        assert printed_form.holds is False, bound
        assert not printed_form.conditions_met
        assert "positions" in printed_form.conditions
        assert untied.holds is True
        assert untied.conditions_met
        assert untied.is_theorem
    assert checks.broken == []


def test_tokens_that_cancel_have_no_sharpness_but_a_sensitivity():
    """f = <w, x_1> - <w, x_2> at x_1 = x_2: S = S_adaptive = 0, MLS = 2, IIMLS = 4."""
    checks = checks_of(Weighted([1.0, -1.0], [1.0, -1.0]).double(), vectors([1.0, 1.0, 1.0, 1.0]))
    assert_printed_fails(checks, "6", "9", "10", "11", "12", "12b", "35", "44", "48 A<=B")
    for bound in ("6", "9", "11", "44"):
        assert checks(bound, "printed").right == 0
    assert checks("11", "printed").left == near(2)
    assert checks("44", "printed").left == near(4)
    gram = checks("11", "gram")
    assert gram.holds is None
    assert "has dependent positions on 1 images" in gram.conditions


def test_a_steep_head_defeats_the_printed_and_the_authors_form():
    """f = 10 w x_1 - 10 w x_2 as a 1 x 1 kernel: MLS 14.14 > 1 and > 1.41, NMLS 28.28 > 14.18."""
    kernel = nn.Conv2d(1, 1, 1, bias=False)
    kernel.weight.data.fill_(1.0)
    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[10.0, -10.0]])
    checks = checks_of(nn.Sequential(kernel, nn.Flatten(), head).double(), vectors([1.0, 1.0]))
    assert_printed_fails(checks, "11", "12")
    assert checks("11", "printed").left == near(10 * math.sqrt(2))
    assert checks("11", "printed").right == near(1)
    assert checks("12", "printed").left == near(20 * math.sqrt(2))
    assert checks("12", "printed").right == near(math.sqrt(201))
    authors = checks("11", "authors")
    assert authors.right == near(math.sqrt(2) * math.sqrt(2 / 2.0001))
    assert (authors.holds, authors.is_theorem, authors.conditions_met) == (False, False, False)


def test_overlapping_patches_are_dependent_so_a_gradient_can_vanish():
    """16 patches of 9 pixels; a steep head in the null space of their matrix."""
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = nn.functional.unfold(x, 3, padding=1)[0]  # (9, 16)
    kernel, head = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Linear(16, 1, bias=False)
    model = nn.Sequential(kernel, nn.Flatten(), head).double()
    kernel.weight.data = torch.arange(9.0).double().reshape(1, 1, 3, 3)
    head.weight.data = 1e4 * torch.linalg.svd(patches, full_matrices=True).Vh[-1:]
    checks = checks_of(model, x)
    assert_printed_fails(checks, "6", "11", "12", "12b", "44", "48 A<=B", "35")
    assert checks("48 A<=B", "printed").right < 1e-12 * checks("48 A<=B", "printed").left
    assert checks("11", "gram").holds is None


def test_eq_8_as_printed_is_false_below_full_rank():
    """One singular value 1 of two: dV = 1 > (1 / 2)^(2 / 2)."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    checks = checks_of(linear(weight), vectors([1.0, 2.0]))
    found = checks("8", "printed")
    assert (found.left, found.right) == (near(2), near(1))
    assert found.holds is False
    assert not found.conditions_met
    assert "the rank is below N on 1 images" in found.conditions
    assert checks("8", "rank").holds is True
    assert checks("8", "rank").left == near(1)
    for bound, where in (("9", "on 1 images"), ("10", "at 1 layers")):
        assert f"the rank is below N {where}" in checks(bound, "untied").conditions
        assert not checks(bound, "untied").conditions_met


def test_an_input_without_a_pixel_of_weight_has_no_invariant_sensitivity():
    """y = x_2 at (1, 0): IIMLS = S_adaptive = 0, normalised MLS 1, so Eq. 44 says nothing of it."""
    network = measured(linear(torch.tensor([[0.0, 1.0]]).double()), vectors([1.0, 0.0]))
    check = of_kind(network, "44", "printed")
    assert (check.left, check.right, check.holds) == (0, 0, True)
    assert float(network.sigma[0] * network.length[0]) == near(1)


def test_a_dead_layer_leaves_the_printed_forms_undefined_and_named():
    """The second image is negative throughout, so the second layer reads zeros."""
    model = linear(torch.eye(3).double(), torch.ones(2, 3).double())
    model.insert(2, nn.ReLU())
    checks = checks_of(model, vectors([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]))
    for bound in ("10", "12", "12b"):
        for kind in SUMMED:
            check = checks(bound, kind)
            assert check.holds is None
            assert check.right == math.inf or math.isnan(check.right)
            assert not check.conditions_met
            assert "layer 3 has a zero input on 1 images" in check.conditions
    assert checks("12", "direct").holds is True
    assert checks("12", "direct").conditions_met
    assert checks("11", "untied").conditions_met
    assert checks.broken == []
