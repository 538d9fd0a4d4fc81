"""Skip connections (Eq. 16 and 17) against explicit Jacobians of both paths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bound_oracles import bound_rows, checks_of
from jacobian_oracles import Residual, path_jacobians
from oracles import cnn, digits, make_subject, mlp, tiny_vit
from torch import nn

import tasks.skips
from tasks.layer_graph import layer_graph
from tasks.measurement import Output, Row
from tasks.skips import skip_sigmas


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return build().double().eval()


def images(count: int = 3) -> torch.Tensor:
    return digits()[0][:count].double()


def skips(rows: list[Row]) -> dict[tuple[str, int], float]:
    return {
        (r.layer or "", r.sample or 0): r.value for r in rows if r.quantity == "skip_sigma"
    }  # fmt: skip


class Block(nn.Module):
    """x + W2 tanh(W1 x) without a norm, between a stem and a head; ends differ from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, 7), nn.Linear(7, 5)
        self.w1, self.w2 = nn.Linear(7, 9), nn.Linear(9, 7)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.stem(x.flatten(1)))

    def after(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sin(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(x + self.w2(torch.tanh(self.w1(x))))


def norms(jacobian: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(jacobian.flatten(1), 2))


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
def test_what_a_skip_carries_is_the_difference_of_both_explicit_jacobians(output: Output):
    model = seeded(Block)
    assert isinstance(model, Block)
    rows = bound_rows(model, images(), output=output)
    found = skips(rows)
    assert {layer for layer, _ in found} == {"w1"}

    def f(through_skip: torch.Tensor, through_layer: torch.Tensor) -> torch.Tensor:
        y = model.after(through_skip + model.w2(torch.tanh(model.w1(through_layer))))
        return torch.sigmoid(y) if output == "sigmoid" else y

    for i, image in enumerate(images()):
        x = model.before(image[None])[0].detach()
        skip, branch = torch.autograd.functional.jacobian(f, (x, x))
        expected = abs(norms(skip + branch) - norms(skip))
        assert expected > 1e-4
        assert found["w1", i] == pytest.approx(expected, rel=1e-9)


def test_eq_17_has_both_sides_of_its_layer_and_holds():
    """||d f / d W1||_F / ||x|| = ||J_l||_F, with one position per layer."""
    model, x = seeded(Block), images(4)
    checks = checks_of(model, x)
    assert [c.layer for c in checks.every if c.bound == "17"] == ["w1"] * 3
    found = skips(bound_rows(model, x))
    norm = float(torch.linalg.matrix_norm(model.get_parameter("w1.weight").detach(), 2))
    slopes = []
    model.requires_grad_()
    for image in x:
        total = 0.0
        y = model(image[None])[0]
        for k in range(5):
            (g,) = torch.autograd.grad(y[k], model.get_parameter("w1.weight"), retain_graph=True)
            total += float(g.square().sum())
        inside = model.before(image[None]).detach().norm()  # type: ignore[operator]
        slopes.append(math.sqrt(total) / float(inside))
    for kind in ("untied", "printed", "direct"):
        check = checks("17", kind, "w1")
        assert check.left == pytest.approx(sum(found.values()) / 4, rel=1e-9)
        assert check.right == pytest.approx(norm * sum(slopes) / 4, rel=5e-9)
        assert check.holds
        assert check.is_theorem
        assert check.conditions_met


@pytest.mark.parametrize("build", [mlp, cnn, tiny_vit])
def test_networks_without_a_bare_skip_have_no_rows(build: Callable[[], nn.Module]):
    """Branches of a pre-norm transformer read a normalised copy."""
    assert skips(bound_rows(seeded(build), images(2))) == {}


def test_every_block_of_a_residual_network_has_a_row():
    found = skips(bound_rows(seeded(Residual), images()))
    assert found.keys() == {(f"blocks.{k}", i) for k in range(2) for i in range(3)}


class Overwritten(nn.Module):
    """The activation that a layer reads is changed behind it, hardly, in place or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1))
        y = self.layer(x)
        x = x.mul_(1 + 1e-6) if self.in_place else x * (1 + 1e-6)
        return self.head((x + y).tanh())


@pytest.mark.parametrize("in_place", [True, False])
def test_an_activation_that_is_overwritten_in_place_is_left_out(in_place: bool):
    """Its tensor stands for what came after: its gradient is not that of what the layer read."""
    subject = make_subject(seeded(lambda: Overwritten(in_place=in_place)), images())
    batch = subject.batch(range(3))
    graph = layer_graph(subject.model, batch.inputs, subject.output)
    found = skip_sigmas(subject, batch, graph, None, memory_gib=1.0)
    assert found.keys() == (set() if in_place else {"layer"})


class Shared(nn.Module):
    """The same weight in two blocks, each with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1))
        for _ in range(2):
            x = x + self.layer(x).tanh()
        return self.head(x)


def test_every_call_of_a_shared_layer_has_its_own_row():
    model, x = seeded(Shared), images()
    found = skips(bound_rows(model, x))
    assert found.keys() == {(name, i) for name in ("layer", "layer#2") for i in range(3)}
    weight, head = (model.get_parameter(f"{n}.weight").detach() for n in ("layer", "head"))
    for i, image in enumerate(x):
        with torch.no_grad():
            inside = model.get_submodule("stem")(image.flatten()[None])
            z = model.get_submodule("layer")(inside)
            second = inside + z.tanh()
            slopes = [1 - s.tanh().square()[0] for s in (z, model.get_submodule("layer")(second))]
        branches = [s[:, None] * weight for s in slopes]
        eye = torch.eye(6).double()
        last = abs(norms(head @ (eye + branches[1])) - norms(head))
        behind = head @ (eye + branches[1])
        first = abs(norms(behind @ (eye + branches[0])) - norms(behind))
        assert found["layer#2", i] == pytest.approx(last, rel=1e-9)
        assert found["layer", i] == pytest.approx(first, rel=1e-9)


class Nothing(nn.Module):
    """x + W x with W = 0: the layer carries nothing, the skip everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(64, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x.flatten(1)))
        return self.head(x + self.layer(x))


class Scalar(nn.Module):
    """x + tanh(v x) in one dimension, where Eq. 17 is an equality."""

    def __init__(self, v: float) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.layer.weight.data.fill_(v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return x + self.layer(x).tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("v", [0.0, 1e-12, 1e-9, 1e-7, 3e-4, 0.3])
def test_rounding_of_two_norms_is_not_taken_for_a_difference(v: float, dtype: torch.dtype):
    """Of 1 + v and 1, the difference is 1e-16 / v off: more than a comparison allows for."""
    x = torch.linspace(0.1, 2.0, 8, dtype=dtype).reshape(8, 1, 1, 1)
    checks = checks_of(Scalar(v).to(dtype), x)
    assert checks.broken == []
    if v >= 3e-4:
        check = checks("17", "untied", "layer")
        assert check.left == pytest.approx(
            check.right, rel=1e-4 if dtype == torch.float32 else 1e-8
        )


def total_jacobian(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Of the outputs with respect to what the layer and the skip connection read."""
    x = torch.tanh(model.get_submodule("stem")(image.flatten())).detach()
    found = torch.autograd.functional.jacobian(
        lambda h: model.get_submodule("head")(h + model.get_submodule("layer")(h)), x
    )
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e-4])
def test_the_derivative_at_the_activation_breaks_eq_5_and_the_one_through_the_layer_does_not(
    size: float, dtype: torch.dtype
):
    """A branch that starts near zero: its layer's norm is small, what the skip carries is not."""
    model = seeded(Nothing)
    model.get_parameter("layer.weight").data.mul_(size)
    weight = model.get_parameter("layer.weight").detach()
    head = model.get_parameter("head.weight").detach()
    total = norms(total_jacobian(model, images(1)[0]))
    right = float(torch.linalg.matrix_norm(weight, 2) * head.norm())  # Eq. 5: T ||J||_F
    assert total > 0.1 > right
    path = path_jacobians(model, images(1)[0], "identity")["layer"]
    assert norms(torch.from_numpy(path)) <= right
    checks = checks_of(model.to(dtype), images().to(dtype))
    assert checks("17", "direct", "layer").right == pytest.approx(right, rel=1e-4)
    assert checks("12", "untied").holds is True
    assert checks.broken == []


def test_memory_changes_the_passes_and_not_the_numbers(monkeypatch: pytest.MonkeyPatch):
    model, x = seeded(Residual), images()
    expected = skips(bound_rows(model, x))
    monkeypatch.setattr(
        tasks.skips, "_groups", lambda layers, *_: [[k] for k in layers]
    )  # as where memory holds one layer
    assert skips(bound_rows(model, x)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_finds_the_same_layers(dtype: torch.dtype):
    model = seeded(Residual)
    exact = skips(bound_rows(model, images()))
    found = skips(bound_rows(model.to(dtype), images().to(dtype)))
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5)
