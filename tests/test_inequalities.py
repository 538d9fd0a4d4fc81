"""Both sides of the inequalities on worked examples, and what rounding and gaps do to them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from bound_oracles import (
    NORMS,
    SUMMED,
    Checks,
    checks_of,
    measured,
    near,
    of_kind,
    vectors,
)
from jacobian_oracles import linear
from oracles import cnn, digits, worked_example

from tasks.inequalities import evaluate


def printed(value: float) -> object:
    """A number known to six decimals."""
    return pytest.approx(value, abs=1e-6)


W1 = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, -1.0]]).double()
W2 = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double()


@pytest.fixture(scope="module")
def one_layer() -> Checks:
    """y = W x of the worked example: q = 17, harmonic q = 17 / 225, sigma = 3, sqrt 2."""
    return checks_of(linear(W1), worked_example()[1])


@pytest.fixture(scope="module")
def two_layers() -> Checks:
    """f = W2 W1 x: S = 304."""
    return checks_of(linear(W1, W2), worked_example()[1])


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize(
    ("bound", "left", "right"),
    [
        ("6", 11, 34),
        ("9", math.sqrt(4.242641), math.sqrt(18.068049)),
        ("10", math.sqrt(4.242641), math.sqrt(18.068049)),
        ("11", 3, 4.808326),
        ("12", 3, 4.808326),
        ("12b", 3, 4.808326),
        ("35", 10.914103, 17.492856),
        ("44", 59, 118),
        ("48 A<=B", 3, 4.242641),
        ("48 B<=C", 4.242641, 4.808326),
        ("48 C<=D", 4.808326, 4.808326),
    ],
)
def test_sides_of_one_linear_layer(
    one_layer: Checks, bound: str, left: float, right: float, kind: str
):
    check = one_layer(bound, kind)
    assert check.left == printed(left)
    assert check.right == printed(right)
    assert check.holds
    assert check.conditions_met
    assert check.num_samples == 2


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize(
    ("bound", "left", "right"),
    [
        ("6", 19, 304),
        ("9", math.sqrt(8.485281), math.sqrt(161.549616)),
        ("10", math.sqrt(10.485281), math.sqrt(162.117090)),
        ("11", 3.711065, 14.377761),
        ("12", 5.999310, 14.992455),
        ("12b", 5.999310, 11.791820),
        ("44", 63, 2 * 101),
        ("48 A<=B", 3.711065, 7.348469),
        ("48 B<=C", 7.348469, 8.328265),
        ("48 C<=D", 8.328265, 14.377761),
    ],
)
def test_sides_of_two_linear_layers(
    two_layers: Checks, bound: str, left: float, right: float, kind: str
):
    check = two_layers(bound, kind)
    assert check.left == printed(left)
    assert check.right == printed(right)
    assert check.holds
    assert check.conditions_met


@pytest.mark.parametrize("kind", SUMMED)
def test_matrix_normalised_sharpness_of_two_linear_layers(two_layers: Checks, kind: str):
    """|W1 x|^2 is 65 and 137."""
    norm = math.sqrt((19 + math.sqrt(73)) / 2)
    inner = (1 / 65 + 1 / 137) / 2
    left = norm * math.sqrt(225 / 17) + float(torch.linalg.matrix_norm(W2, 2)) / math.sqrt(inner)
    assert two_layers("35", kind).left == near(left)
    assert two_layers("35", kind).right == printed(62.820595)


def test_volumes_of_linear_layers(one_layer: Checks, two_layers: Checks):
    for kind in ("rank", "printed"):
        assert one_layer("8", kind).left == printed(2 * 4.242641)
        assert one_layer("8", kind).right == printed(11)
        assert two_layers("8", kind).left == printed(16.970563)
        assert two_layers("8", kind).right == printed(19)


def test_forms_without_a_sharpness_are_the_second_of_the_chain(
    one_layer: Checks, two_layers: Checks
):
    """One position per layer: all of them are T |J|_F, image by image."""
    norm = float(torch.linalg.matrix_norm(W2, 2))
    for kind in ("direct", "per_position", "gram"):
        assert one_layer("11", kind).right == near(3 * math.sqrt(2))
        assert two_layers("11", kind).right == near(3 * math.sqrt(6))
        assert two_layers("6", kind).right == near(9 * 6)
        assert two_layers("12", kind).right == near(3 * math.sqrt(6) + norm * math.sqrt(2))


def test_the_authors_form_adds_to_the_squared_inputs():
    """Eq. 12 of y = W x, with their 1e-4 and the spectral norm of a network without kernels."""
    x = vectors([0.01, 0.02, 0.02], [0.0, 0.03, 0.04])
    squares = np.array([9e-4, 25e-4])
    right = 3 * math.sqrt((1 / (squares + 1e-4)).mean() * 2 * squares.mean())
    for bound in ("11", "12"):
        check = checks_of(linear(W1), x)(bound, "authors")
        assert check.right == near(right)
        assert not check.is_theorem


def test_the_slack_of_the_layerwise_form_is_never_larger():
    """Eq. 12b <= Eq. 12, by Cauchy-Schwarz over layers."""
    checks = checks_of(cnn().double(), digits()[0][:4].double())
    for kind in SUMMED:
        assert checks("12b", kind).right <= checks("12", kind).right * (1 + NORMS)


def test_copies_of_the_images_change_only_the_right_sides_of_volumes():
    """Those of Eq. 9 and 10 grow as copies^((N - 1) / 2), to the power 1 / N."""
    x = worked_example()[1]
    once, twice = checks_of(linear(W1, W2), x), checks_of(linear(W1, W2), torch.cat([x, x]))
    for a, b in zip(once.every, twice.every, strict=True):
        growth = 2 ** (1 / 4) if a.bound in ("9", "10") else 1.0
        assert b.right == near(a.right * growth)
        assert b.left == near(a.left)


def test_what_is_within_rounding_holds_and_what_is_beyond_does_not():
    network = measured(linear(torch.ones(1, 1).double()), vectors([1.0]))
    for excess, holds in ((0.5, True), (3.0, False)):
        larger = dataclasses.replace(network, sigma=network.norm * (1 + excess * network.rounding))
        assert of_kind(larger, "11", "printed").holds is holds


def test_a_number_that_is_missing_leaves_a_check_undefined():
    network = measured(linear(W1), worked_example()[1])
    missing = dataclasses.replace(network, total=np.array([math.nan, 1.0]))
    by_bound = {c.bound: c for c in evaluate(missing) if c.kind == "printed"}
    assert by_bound["11"].holds is None
    assert by_bound["12b"].holds is True
