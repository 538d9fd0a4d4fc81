"""Inequalities: worked examples, cases of equality, counterexamples, and random networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bound_oracles import Checks, checks_of, measured, of_kind, reference_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobian_oracles import linear
from oracles import cnn, digits, worked_example
from torch import nn

from tasks.inequalities import evaluate

FORMS = ("untied", "printed", "direct", "per_position", "gram")
SUMMED = ("untied", "printed")  # forms with a sharpness of the network
NORMS = 5e-9  # upper ends of norms are widened by 1e-9 each; a right side has a few of them


def near(value: float) -> object:
    return pytest.approx(value, rel=NORMS)


def printed(value: float) -> object:
    """A number known to six decimals."""
    return pytest.approx(value, abs=1e-6)


def vectors(*rows: list[float]) -> torch.Tensor:
    """Images of one row of pixels each."""
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 1, 1, -1)


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


# ---------------------------------------------------------------- right sides, image by image


class Tokens(nn.Module):
    """Two layers on three tokens of five, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x.reshape(len(x), 3, 5)))
        return self.head(torch.tanh(self.second(x)).flatten(1))


def dense_norms(model: nn.Module, images: torch.Tensor) -> dict[str, tuple[float, float, int]]:
    """Spectral norm, norm of the authors, positions of every layer of a sequential network."""
    found: dict[str, tuple[float, float, int]] = {}
    convolutional = any(isinstance(m, nn.Conv2d) for m in model.modules())

    def hook(module: nn.Module, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
        name = next(n for n, m in model.named_modules() if m is module)
        weight = module.weight.detach()  # type: ignore[union-attr, operator]
        assert isinstance(weight, torch.Tensor)
        if isinstance(module, nn.Conv2d):
            x = torch.zeros_like(args[0])
            dense = torch.autograd.functional.jacobian(module.forward, x)
            sigma = torch.linalg.matrix_norm(dense.reshape(-1, x.numel()), 2)
            count = result.shape[-1] * result.shape[-2]
            found[name] = float(sigma), float(weight.norm()) * math.sqrt(count), count
        else:
            sigma = float(torch.linalg.matrix_norm(weight, 2))
            count = result[0].numel() // result.shape[-1]
            found[name] = sigma, float(weight.norm()) if convolutional else sigma, count

    handles = [
        m.register_forward_hook(hook)
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    model(images[:1].clone())
    for handle in handles:
        handle.remove()
    return found


NETWORKS: dict[str, Callable[[], nn.Module]] = {"cnn": lambda: cnn(outputs=3), "tokens": Tokens}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", [*FORMS, "authors"])
def test_right_sides_with_shared_weights_are_the_formulas_image_by_image(name: str, kind: str):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = NETWORKS[name]().double().eval()
    images = digits()[0][:3].double()
    images = images if name == "cnn" else images[:, :, :3, :5].contiguous()
    terms = [reference_terms(model, image, "identity") for image in images]
    norms = dense_norms(model, images)
    layers, n, outputs = list(norms), len(terms), 3 if name == "cnn" else 2
    norm = {k: v[1] if kind == "authors" else v[0] for k, v in norms.items()}

    def gradient(t: dict[tuple[str, str], float], layer: str) -> float:
        return {
            "untied": t["output_gradient", layer] * t["input_norm", layer] ** 2,
            "printed": t["weight_gradient", layer],
            "authors": t["weight_gradient", layer],
            "direct": t["output_gradient", layer],
            "per_position": t["position_gradient", layer],
            "gram": t["weight_gradient", layer],
        }[kind]

    def divisor(t: dict[tuple[str, str], float], layer: str) -> float:
        square = t["input_norm", layer] ** 2
        return {
            "untied": square, "printed": square, "authors": square + 1e-4, "direct": 1.0,
            "per_position": t["least_position", layer] ** 2, "gram": t["least_gram", layer],
        }[kind]  # fmt: skip

    checks = checks_of(model, images)
    first = layers[0]
    if kind in ("direct", "per_position", "gram"):
        if kind == "gram" and name == "cnn":
            assert checks("12", kind).holds is None
            return
        share = {k: [gradient(t, k) / divisor(t, k) for t in terms] for k in layers}
        one = {k: norm[k] * sum(math.sqrt(v) for v in share[k]) / n for k in layers}
        assert checks("6", kind).right == near(norm[first] ** 2 * sum(share[first]) / n)
        assert checks("11", kind).right == near(one[first])
        assert checks("12", kind).right == near(sum(one.values()))
        return
    total = [
        sum(gradient(t, k) for k in layers) if kind == "untied" else t["weight_gradient", ""]
        for t in terms
    ]
    s = sum(total) / n
    inverse = {k: sum(1 / divisor(t, k) for t in terms) / n for k in layers}
    of_layer = {k: sum(gradient(t, k) for t in terms) / n for k in layers}
    least = min(divisor(t, first) for t in terms)
    assert checks("6", kind).right == near(norm[first] ** 2 / least * s)
    assert checks("11", kind).right == near(norm[first] * math.sqrt(inverse[first] * s))
    constant = sum(norm[k] ** 2 * inverse[k] for k in layers)
    assert checks("12", kind).right == near(math.sqrt(constant * s))
    assert checks("12b", kind).right == near(
        sum(norm[k] * math.sqrt(inverse[k] * of_layer[k]) for k in layers)
    )
    roots = [math.sqrt(gradient(t, first) / divisor(t, first)) for t in terms]
    assert checks("48 A<=B", kind).right == near(norm[first] * sum(roots) / n)
    assert checks("48 B<=C", kind).right == near(
        norm[first] * math.sqrt(inverse[first] * of_layer[first])
    )
    for bound, chosen in (("9", [first]), ("10", layers)):
        powers = sum((norm[k] ** 2 / divisor(t, k)) ** outputs for k in chosen for t in terms)
        right = math.sqrt(powers) / n * (n * s / outputs) ** (outputs / 2)
        assert checks(bound, kind).right == near(right ** (1 / outputs))
    if kind == "authors":
        return
    adaptive = "first_adaptive" if kind == "printed" else "first_adaptive_untied"
    mean = sum(t[adaptive, ""] for t in terms) / n
    assert checks("44", kind).right == near(terms[0]["first_terms", ""] * mean)
    assert checks("44", kind).left == near(sum(t["input_invariant", ""] for t in terms) / n)
    assert checks("35", kind).right == near(sum(norm[k] * math.sqrt(of_layer[k]) for k in layers))
    assert checks("35", kind).left == near(
        sum(inverse[k] ** -0.5 * sum(t["path_sigma", k] for t in terms) / n for k in layers)
    )


# ---------------------------------------------------------------- equality


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


# ---------------------------------------------------------------- counterexamples


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


# ---------------------------------------------------------------- random networks

seeds = st.integers(0, 2**32 - 1)
spreads = st.sampled_from([0.0, 2.0])  # decades that layers are put out of balance by
activations = st.sampled_from([nn.ReLU, nn.Tanh, nn.LeakyReLU])


def unbalanced(model: nn.Module, spread: float, generator: torch.Generator) -> nn.Module:
    """Float64, random weights and biases, layers scaled by up to 10^(+-spread)."""
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                decades = spread * (2 * torch.rand((), generator=generator) - 1)
                for p in module.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * 10**decades)
    return model


def assert_theorems_hold(model: nn.Module, images: torch.Tensor) -> Checks:
    checks = checks_of(model, images)
    assert checks.broken == []
    for check in checks.every:
        # Volumes have a condition of their own: full rank.
        if check.kind in ("untied", "direct", "per_position") and check.bound not in ("9", "10"):
            assert check.holds is not False, check
    return checks


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    spread=spreads,
    activation=activations,
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bias=st.booleans(),
)
def test_theorems_hold_for_random_mlps(
    seed: int, spread: float, activation: type[nn.Module], widths: list[int], bias: bool
):
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip([5, *widths], widths, strict=False):
        layers += [nn.Linear(before, after, bias=bias), activation()]
    model = unbalanced(nn.Sequential(*layers[:-1]), spread, generator)
    images = torch.randn(4, 1, 1, 5, generator=generator).double()
    images = images * 10 ** (spread * torch.rand(4, 1, 1, 1, generator=generator).double() - 1)
    checks = assert_theorems_hold(model, images)
    # One position per image: the printed forms are theorems, and the chain is one.
    for bound in ("6", "11", "44", "48 A<=B", "48 B<=C", "48 C<=D"):
        assert checks(bound, "printed").conditions_met
        assert checks(bound, "printed").holds


@settings(max_examples=12, deadline=None)
@given(
    seed=seeds,
    spread=spreads,
    activation=activations,
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
)
def test_theorems_hold_for_random_convolutional_networks(
    seed: int, spread: float, activation: type[nn.Module], kernel: int, stride: int, padding: int,
    groups: int,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, kernel, stride=stride, padding=padding, groups=groups),
        activation(),
        nn.Conv2d(4, 4, 2, groups=groups, bias=False),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    images = torch.randn(3, 2, 5, 5, generator=generator).double()
    model(images[:1].float())
    assert_theorems_hold(unbalanced(model, spread, generator), images)


@settings(max_examples=12, deadline=None)
@given(seed=seeds, spread=spreads, tokens=st.integers(1, 4), norm=st.booleans())
def test_theorems_hold_for_random_token_networks(seed: int, spread: float, tokens: int, norm: bool):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
            self.norm = nn.LayerNorm(3) if norm else nn.Identity()
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x.reshape(len(x), tokens, 4))
            x = x + torch.tanh(self.second(self.norm(x)))
            mixed = torch.softmax(x @ x.mT / 10, -1) @ x
            return self.head(mixed.mean(1))

    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 1, tokens, 4, generator=generator).double()
    assert_theorems_hold(unbalanced(Mixed(), spread, generator), images)


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
