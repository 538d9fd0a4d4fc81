"""Terms of the bounds against plain autograd; batches, units, rounding, layers that do not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bound_oracles import Checks, bound_rows, checks_of, measured, reference_terms
from jacobian_oracles import linear
from oracles import cnn, columns, digits, make_subject, mlp, tiny_vit, trained
from timm.layers.std_conv import StdConv2d
from torch import nn

from tasks.block import Block
from tasks.bound_forms import Network
from tasks.bounds import Bounds, network_of
from tasks.inequalities import evaluate
from tasks.measurement import Estimate, Row, Status

KINDS = ("untied", "printed", "authors", "direct", "per_position", "gram")


def grouped() -> nn.Module:
    """Grouped, strided, dilated convolutions without padding: some patches are independent."""
    return nn.Sequential(
        nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.Tanh(),
        nn.Conv2d(6, 8, 2, groups=2, dilation=2, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def grouped_first() -> nn.Module:
    """Groups in the layer that reads the image, which has two channels."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    )


def wide_linear() -> nn.Module:
    """More outputs than inputs: the first layer is the head, and a basis of 64 misses some."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 90))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "vit": tiny_vit, "grouped": grouped, "wide_linear": wide_linear,
    "grouped_first": grouped_first,
    "vit_wide": lambda: tiny_vit(1, num_classes=40, depth=1),
}  # fmt: skip


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return NETWORKS[name]().double().eval()


def images(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return digits()[0][:count].to(dtype)


def by_key(rows: list[Row], sample: int) -> dict[tuple[str, str], float]:
    return {(r.quantity, r.layer or ""): r.value for r in rows if r.sample == sample}


@pytest.mark.parametrize("name", NETWORKS)
def test_terms_are_plain_autograds(name: str):
    model, x = built(name), images(2)
    x = x.reshape(2, 2, 4, 8) if name == "grouped_first" else x
    rows = bound_rows(model, x, output="sigmoid")
    for i, image in enumerate(x):
        found, expected = by_key(rows, i), reference_terms(model, image, "sigmoid")
        assert expected.keys() <= found.keys()
        for key, value in expected.items():
            # Eigenvalues of a Gram matrix have the rounding of its largest, |x|^2 at most.
            absolute = 0.0
            if key[0] == "least_gram":
                absolute = 1e-12 * expected["input_norm", key[1]] ** 2 * 10
            assert found[key] == pytest.approx(value, rel=1e-9, abs=absolute), key


def test_overlapping_patches_multiply_the_number_of_terms():
    """3 x 3 patches at every pixel: each is in nine, of twelve outputs."""
    assert measured(built("cnn"), images(1)).num_terms == 9 * 12
    assert measured(built("vit"), images(1)).num_terms == 32
    assert measured(built("grouped"), images(1)).num_terms == 2 * 2 * 6


def sides(rows: list[Row]) -> list[tuple[str, str, str | None, float, float]]:
    checks = evaluate(network_of(columns(rows)))
    return [(c.bound, c.kind, c.layer, c.left, c.right) for c in checks]


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize(
    ("batch_size", "units"),
    [(1, [range(7)]), (3, [range(7)]), (8, [range(4, 7), range(4)]), (2, [range(5), range(5, 7)])],
)
def test_batches_and_units_change_rounding_only(name: str, batch_size: int, units: list[range]):
    model, x = built(name), images(7)
    whole = sides(bound_rows(model, x))
    parts = sides(bound_rows(model, x, batch_size=batch_size, units=units))
    assert len(parts) == len(whole)
    for (*name_a, left_a, right_a), (*name_b, left_b, right_b) in zip(whole, parts, strict=True):
        assert name_a == name_b
        assert left_b == pytest.approx(left_a, rel=1e-9)
        if name_a[1] != "gram":  # divides by an eigenvalue near zero
            assert right_b == pytest.approx(right_a, rel=1e-9, nan_ok=True)


def test_the_order_of_stored_rows_does_not_matter():
    rows = bound_rows(built("cnn"), images(5))
    assert sides(rows[::-1][len(rows) // 3 :] + rows[::-1][: len(rows) // 3]) != []
    backwards = sorted(rows, key=lambda r: -(r.sample or 0))
    assert sides(backwards) == sides(rows)


@pytest.mark.parametrize("build", [mlp, cnn, tiny_vit])
def test_float32_gives_the_verdicts_of_float64_on_trained_networks(build: Callable[[], nn.Module]):
    model = trained(build, epochs=3)
    single = checks_of(model, images(6, torch.float32), output="sigmoid")
    double = checks_of(model.double(), images(6), output="sigmoid")
    assert single.broken == []
    assert double.broken == []
    for a, b in zip(single.every, double.every, strict=True):
        assert (a.bound, a.kind, a.layer, a.holds) == (b.bound, b.kind, b.layer, b.holds)
        if a.kind != "gram" and a.bound not in ("8", "9", "10"):
            assert a.right == pytest.approx(b.right, rel=1e-3, nan_ok=True), a
            assert a.left == pytest.approx(b.left, rel=1e-3), a


class Twice(nn.Module):
    """One layer called two times on an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x.flatten(1)))
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def standardised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), StdConv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(3)
    )


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build().eval()
        model(digits()[0][:1])  # lazy layers
    return model.double()


SUMS = ("10", "12", "12b", "35")


def test_a_weight_changed_in_the_forward_leaves_sums_over_layers_undefined_and_says_why():
    checks = checks_of(seeded(standardised), images(3))
    assert checks.broken == []
    for check in checks.every:
        if check.bound in SUMS:
            assert check.holds is None
            assert not check.conditions_met
            assert re.search("layer 2 .*has no norm of its own", check.conditions)
    assert checks("11", "direct").holds is True
    assert checks("11", "direct").conditions_met


def test_a_weight_used_twice_has_no_gradient_of_its_own_but_outputs_have():
    checks = checks_of(seeded(Twice), images(3))
    assert checks.broken == []
    assert checks("12b", "printed").holds is None
    for bound in ("12", "12b", "10"):
        check = checks(bound, "printed")
        assert not check.conditions_met
        assert "layer layer has no gradient of its own" in check.conditions
        assert "layer layer#2 has no gradient of its own" in check.conditions
    for kind in ("untied", "direct"):
        assert checks("12", kind).holds is True
        assert checks("12", kind).conditions_met


@pytest.mark.parametrize("build", [standardised, Twice])
def test_a_bound_over_layers_without_a_gradient_of_their_own_has_that_status(
    build: Callable[[], nn.Module],
):
    rows = columns(bound_rows(seeded(build), images(3)))
    estimates = {e.quantity: e for e in Bounds(kind="gram").summarize(rows)}
    assert math.isnan(estimates["nmls_bound"].value)
    assert estimates["nmls_bound"].status is Status.OWN_WEIGHT


def test_a_norm_in_front_of_the_first_layer_is_named():
    model = seeded(lambda: nn.Sequential(nn.BatchNorm2d(1), cnn()))
    model[0].running_mean.fill_(0.3)  # type: ignore[index, union-attr]
    checks = checks_of(model, images(3))
    assert checks.broken == []
    for check in checks.every:
        if check.bound in ("6", "9", "11", "44") or check.bound.startswith("48"):
            assert not check.conditions_met
            assert "the first layer alone reads the image" in check.conditions
            assert "not met: the first layer is not alone in reading the image" in check.conditions
    assert checks("44", "untied").holds is None
    assert checks("12", "untied").conditions_met


class Beside(nn.Module):
    """<w, x> by a layer, and a share of it around the layer."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.layer, self.share = nn.Linear(64, 1, bias=False), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.layer(x) + self.share * x @ self.layer.weight.detach().mT


@pytest.mark.parametrize("share", [1.0, 1e-6])
def test_a_small_path_around_the_first_layer_is_noticed(share: float):
    """MLS is 1 + share of the tight right side: the bound is broken, so its condition must be."""
    checks = checks_of(seeded(lambda: Beside(share)), images(1))
    assert checks("11", "untied").holds is False
    assert not checks("11", "untied").conditions_met
    assert checks.broken == []


def estimates_of(rows: list[Row], kind: str) -> dict[str, Estimate]:
    settings = Bounds(kind=kind)  # type: ignore[arg-type]
    return {e.quantity: e for e in settings.summarize(columns(rows))}


@pytest.mark.parametrize("name", ["mlp", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_series_are_the_right_sides_of_eq_11_and_12(name: str, kind: str):
    rows = bound_rows(built(name), images(4))
    checks, found = Checks(evaluate(network_of(columns(rows)))), estimates_of(rows, kind)
    for quantity, bound in (("mls_bound", "11"), ("nmls_bound", "12")):
        right = checks(bound, kind).right
        value = found[quantity].value
        assert value == pytest.approx(right, rel=1e-12) or not np.isfinite([value, right]).any()
        met = checks(bound, kind).conditions_met
        assert found[quantity].status is (Status.OK if met else Status.CONDITIONS_UNMET)
        assert found[quantity].num_samples == 4


@pytest.mark.parametrize("kind", ["untied", "printed", "direct", "per_position"])
def test_standard_errors_are_those_of_the_jackknife(kind: str):
    """200 images: jackknife and linearisation differ by O(1/n) of the error."""
    rows = bound_rows(built("mlp"), images(200), batch_size=50)
    found, network = estimates_of(rows, kind), columns(rows)
    sample = np.asarray(network["sample"]).astype(int)
    weights = np.isin(network["quantity"].astype(str), ["operator_norm", "authors_norm"])
    always = weights | np.isin(
        network["quantity"].astype(str), ["num_outputs", "rounding", "positions"]
    )
    values: dict[str, list[float]] = {"mls_bound": [], "nmls_bound": []}
    for left_out in range(0, 200, 1 if kind == "untied" else 4):
        kept = always | (sample != left_out)
        part = {name: column[kept] for name, column in network.items()}
        for e in Bounds(kind=kind).summarize(part):  # type: ignore[arg-type]
            if e.quantity in values:
                values[e.quantity].append(e.value)
    for quantity, jackknife in values.items():
        v = np.array(jackknife)
        # Every fourth image gives the spread of jackknife values to about 1/sqrt(2 * 50).
        tolerance = 0.03 if kind == "untied" else 4 / math.sqrt(2 * len(v))
        assert found[quantity].stderr == pytest.approx(
            math.sqrt(199) * v.std() * math.sqrt(200 / 199), rel=tolerance
        )


def test_dead_inputs_are_counted_over_layers_and_images():
    model = linear(torch.eye(3).double(), torch.ones(2, 3).double())
    model.insert(2, nn.ReLU())
    x = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [-3.0, 1.0, 1.0]])
    rows = bound_rows(model, x.reshape(3, 1, 1, 3).double())
    found = estimates_of(rows, "untied")
    assert found["dead_inputs"].value == 1
    assert not math.isfinite(found["nmls_bound"].value)
    assert found["nmls_bound"].status is Status.CONDITIONS_UNMET
    assert found["mls_bound"].status is Status.OK


def test_a_block_without_the_first_image_has_no_rows_of_weights():
    subject = make_subject(built("mlp"), images(3))
    rows = Bounds().measure(subject, Block(range(1, 3)))
    assert {r.sample for r in rows} == {1, 2}
    assert not {"operator_norm", "num_outputs", "rounding"} & {r.quantity for r in rows}


def test_terms_have_the_types_of_a_network():
    network = measured(built("vit"), images(2))
    assert isinstance(network, Network)
    assert network.layer_sigma.shape == (len(network.layers), 2)
    assert network.reads_image
    assert network.num_outputs == 10
