"""Sharpness of Eq. 3 against explicit parameter Jacobians and Hessians, in float64."""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cnn, columns, digits, make_subject, mlp, tiny_vit, worked_example
from test_layer_graph import Odd
from test_parameter_norms import convolutions
from torch import nn

from tasks.block import Block
from tasks.exact_norms import jacobian_norms
from tasks.head import find_head
from tasks.layer_graph import layer_graph
from tasks.measurement import Estimate, Output, Row, Status, Subject
from tasks.outline import LayerOutline, Outline
from tasks.sharpness import Sharpness


def relu_net(seed: int = 0, *, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, 7, bias=bias), nn.ReLU(), nn.Linear(7, 6, bias=bias), nn.ReLU()),
            nn.Linear(6, 4, bias=bias),
        ).double()


def wide_headed(seed: int = 0) -> nn.Module:
    """Forty outputs from eight features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(),
            nn.Linear(8, 40),
        ).double()  # fmt: skip


class BiasBehind(nn.Module):
    """A bias of its own behind the linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias = wide_headed(), nn.Parameter(torch.zeros(40).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.bias


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "vit": partial(tiny_vit, depth=1, embed_dim=16), "relu": relu_net,
    "wide": wide_headed, "behind": BiasBehind, "odd": Odd, "convolutions": convolutions,
}  # fmt: skip


def subject(model: nn.Module, count: int = 3, output: Output = "sigmoid") -> Subject:
    model(digits()[0][:1].to(next(model.parameters()).dtype)) if any(
        isinstance(m, nn.LazyLinear) for m in model.modules()
    ) else None
    return make_subject(model.double(), digits()[0][:count], output=output, batch_size=4)


def explicit(model: nn.Module, image: torch.Tensor, output: Output) -> dict[str, float]:
    """||d f / d p||_F^2 for every parameter p, row by row of the outputs."""
    model = copy.deepcopy(model).requires_grad_(True)
    logits = model(image[None])[0]
    f = logits.sigmoid() if output == "sigmoid" else logits
    parameters = dict(model.named_parameters())
    norms = dict.fromkeys(parameters, 0.0)
    for value in f:
        gradients = torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, g in zip(parameters, gradients, strict=True):
            norms[name] += 0.0 if g is None else g.square().sum().item()
    return norms


def estimates(rows: list[Row]) -> dict[str, Estimate]:
    found = Sharpness().summarize(columns(rows))
    return {e.quantity if e.layer is None else f"{e.quantity} {e.layer}": e for e in found}


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_sharpness_is_the_sum_over_outputs_and_parameters(name: str, output: Output):
    subject_ = subject(NETWORKS[name](), output=output)
    rows = Sharpness(method="exact").measure(subject_, Block(range(3)))
    for sample in range(3):
        norms = explicit(subject_.model, subject_.batch([sample]).inputs[0], output)
        for row in rows:
            if row.sample != sample:
                continue
            if row.quantity == "sharpness":
                assert row.value == pytest.approx(sum(norms.values()), rel=1e-9)
                assert row.lower == row.value == row.upper
            if row.quantity == "layer_sharpness":
                assert row.value == pytest.approx(norms[f"{row.layer}.weight"], rel=1e-9)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_the_heads_basis_gives_the_norms_of_all_outputs(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
        model = timm.create_model(name, num_classes=50, **changes).double()
        for head in (model.head, getattr(model, "head_dist", None)):
            if head is not None:
                nn.init.normal_(head.weight, std=0.2)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    s = make_subject(model, images)
    graph = layer_graph(s.model, s.batch([0, 1]).inputs, "sigmoid", parameters=True)
    head = find_head(s.model, s.batch([0, 1]).inputs)
    assert head is not None
    few, all_ = jacobian_norms(graph, head), jacobian_norms(graph, None, at_once=10)
    assert (few.num_rows, all_.num_rows) == (head.weight.shape[1], 50)
    assert few.num_rows < 50
    for part in ("weights", "outputs", "per_position", "total"):
        torch.testing.assert_close(getattr(few, part), getattr(all_, part), rtol=1e-9, atol=1e-20)


def test_a_parameter_behind_the_head_asks_for_all_outputs():
    s = subject(BiasBehind())
    images = s.batch([0, 1]).inputs
    graph = layer_graph(s.model, images, "sigmoid", parameters=True)
    head = find_head(s.model, images)
    assert head is not None
    assert jacobian_norms(graph, head).num_rows == 40


def test_worked_examples():
    weight = worked_example()[0].weight.detach()
    images = worked_example()[1]
    one = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).double()
    two = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
    ).double()
    with torch.no_grad():
        one[1].weight.copy_(weight)
        two[1].weight.copy_(weight)
        two[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    for model, sharpness, matrix_normalized in ((one, 34.0, 17.492856), (two, 304.0, 62.820595)):
        s = make_subject(model, images, output="identity")
        found = estimates(Sharpness().measure(s, Block(range(2))))
        assert found["sharpness"].value == pytest.approx(sharpness, rel=1e-12)
        assert found["sharpness_sqrt"].value == pytest.approx(sharpness**0.5, rel=1e-12)
        assert found["untied_sharpness"].value == pytest.approx(sharpness, rel=1e-12)
        assert found["matrix_normalized_sharpness"].value == pytest.approx(
            matrix_normalized, rel=1e-7
        )


class Twice(nn.Module):
    """One layer called twice, or two with equal weights."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, self.last = nn.Linear(64, 64), nn.Linear(64, 3)
        self.layers = nn.ModuleList([first, first if tied else copy.deepcopy(first)])
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


def test_intervals_hold_the_float64_value_or_are_not_claimed():
    of_dtype = {
        dtype: Sharpness(method="exact").measure(
            make_subject(tiny_vit().to(dtype), digits()[0][:2]), Block(range(2))
        )
        for dtype in (torch.float32, torch.float64)
    }
    for row, true in zip(of_dtype[torch.float32], of_dtype[torch.float64], strict=True):
        assert row.lower is None or row.lower <= true.value <= (row.upper or 0.0)
    assert np.isnan(estimates(of_dtype[torch.float32])["sharpness"].error_bound)
    assert estimates(of_dtype[torch.float64])["sharpness"].error_bound == 0


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_untied_sharpness_counts_a_layer_that_is_called_twice_in_both_of_its_calls(method):
    tied, untied = (
        estimates(Sharpness(method=method).measure(subject(Twice(tied=tied)), Block(range(3))))
        for tied in (True, False)
    )
    assert tied["untied_sharpness"].value == pytest.approx(
        untied["untied_sharpness"].value, rel=1e-12
    )


def test_it_is_the_trace_of_the_hessian_for_a_relu_network_with_any_labels():
    s = subject(relu_net(), count=4, output="identity")
    batch = s.batch(range(4))
    names = [name for name, _ in s.model.named_parameters()]
    targets = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).double()

    def loss(*values: torch.Tensor) -> torch.Tensor:
        f = torch.func.functional_call(
            s.model, dict(zip(names, values, strict=True)), (batch.inputs,)
        )
        return (f - targets).square().sum() / (2 * len(f))

    values = tuple(p.detach().clone() for p in s.model.parameters())
    blocks = torch.autograd.functional.hessian(loss, values)
    trace = sum(
        blocks[k][k].reshape(v.numel(), v.numel()).trace().item() for k, v in enumerate(values)
    )
    found = estimates(Sharpness().measure(s, Block(range(4))))
    assert found["sharpness"].value == pytest.approx(trace, rel=1e-9)


def test_probes_agree_with_the_exact_value_within_their_error():
    s = subject(mlp(), count=8)
    exact = estimates(Sharpness(method="exact").measure(s, Block(range(8))))
    sampled = estimates(Sharpness(method="hutchinson", num_probes=64).measure(s, Block(range(8))))
    for name in ("sharpness", "untied_sharpness", "layer_sharpness 3"):
        difference = abs(sampled[name].value - exact[name].value)
        assert 0 < difference < 4 * sampled[name].stderr_draws
        assert sampled[name].num_probes == 8 * 64
        assert np.isnan(exact[name].stderr_draws)


def test_the_probes_error_is_their_spread():
    """Over 40 seeds, deviations from the exact value in units of the stated error are near one."""
    model = mlp(outputs=4)
    exact = None
    scores = []
    for seed in range(40):
        s = make_subject(model.double(), digits()[0][:4], seed=seed)
        if exact is None:
            rows = Sharpness(method="exact").measure(s, Block(range(4)))
            exact = estimates(rows)["sharpness"].value
        rows = Sharpness(method="hutchinson", num_probes=24).measure(s, Block(range(4)))
        found = estimates(rows)["sharpness"]
        scores.append((found.value - exact) / found.stderr_draws)
    # mean square of 40 standard scores: 1 +- 4 sqrt(2 / 40); their mean within 4 / sqrt(40)
    assert 0.1 < np.mean(np.square(scores)) < 1 + 4 * (2 / 40) ** 0.5
    assert abs(np.mean(scores)) < 4 / 40**0.5


def test_numbers_do_not_depend_on_batches_or_units():
    model = cnn().double()
    images = digits()[0][:6]
    whole = Sharpness(method="hutchinson").measure(
        make_subject(model, images, batch_size=6), Block(range(6))
    )
    parts = [
        row
        for block in (Block(range(2)), Block(range(2, 6)))
        for row in Sharpness(method="hutchinson").measure(
            make_subject(model, images, batch_size=2), block
        )
    ]
    key = lambda r: (r.sample, r.quantity, r.layer or "")  # noqa: E731
    for one, other in zip(sorted(whole, key=key), sorted(parts, key=key), strict=True):
        assert key(one) == key(other)
        assert one.value == pytest.approx(other.value, rel=1e-9)


def test_layers_without_a_norm_of_their_own_say_so():
    found = estimates(Sharpness().measure(subject(Odd()), Block(range(3))))
    assert found["matrix_normalized_sharpness"].status is Status.OWN_WEIGHT
    assert np.isnan(found["matrix_normalized_sharpness"].value)
    assert found["sharpness"].status is Status.OK


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 10.0), st.integers(0, 10_000))
def test_scaling_the_outputs_scales_sharpness_with_its_square(c: float, seed: int):
    plain = measured(relu_net(seed))
    scaled = relu_net(seed)
    with torch.no_grad():
        scaled[5].weight *= c
        scaled[5].bias *= c
    scaled_net = measured(scaled)
    for layer in ("1", "3"):  # the head's own gradient does not see its own scale
        assert scaled_net[f"layer_sharpness {layer}"] == pytest.approx(
            c**2 * plain[f"layer_sharpness {layer}"], rel=1e-9
        )
    assert scaled_net["layer_sharpness 5"] == pytest.approx(plain["layer_sharpness 5"], rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 10.0), st.integers(0, 10_000))
def test_rescaling_relu_layers_changes_sharpness_but_not_its_matrix_normalised_form(
    a: float, seed: int
):
    plain = measured(relu_net(seed))
    model = relu_net(seed)
    with torch.no_grad():
        model[1].weight *= a
        model[1].bias *= a
        model[3].weight /= a
    rescaled = measured(model)
    name = "matrix_normalized_sharpness"
    assert rescaled[name] == pytest.approx(plain[name], rel=1e-7)
    for layer, factor in (("1", a**-2), ("3", a**2), ("5", 1.0)):
        assert rescaled[f"layer_sharpness {layer}"] == pytest.approx(
            factor * plain[f"layer_sharpness {layer}"], rel=1e-9
        )


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 5.0), st.integers(0, 10_000))
def test_scaling_weights_of_a_bias_free_relu_network(a: float, seed: int):
    plain = measured(relu_net(seed, bias=False))
    model = relu_net(seed, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= a
    scaled = measured(model)
    assert scaled["sharpness"] == pytest.approx(a**4 * plain["sharpness"], rel=1e-9)
    name = "matrix_normalized_sharpness"
    assert scaled[name] == pytest.approx(a**3 * plain[name], rel=1e-7)


def test_permuting_hidden_units_changes_nothing():
    model, order = relu_net(), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    plain = measured(relu_net())
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[order])
        model[1].bias.copy_(model[1].bias[order])
        model[3].weight.copy_(model[3].weight[:, order])
    for name, value in measured(model).items():
        assert value == pytest.approx(plain[name], rel=1e-7)


def test_the_plan_tells_which_method_it_takes():
    def network(rows: int) -> Outline:
        layers = (LayerOutline("head", 5 * rows, 1000, 1),)
        return Outline({}, rows, 0, 0, layers)

    assert "exact: 10 backward passes" in Sharpness().note(network(10))
    assert "hutchinson: 2 random vectors" in Sharpness().note(network(1000))
    assert Sharpness(method="exact").note(network(1000)) == ""
    costs = [Sharpness(method=m).forward_equivalents(network(1000)) for m in ("exact", "auto")]
    assert costs[0] > 100 * costs[1]


def measured(model: nn.Module) -> dict[str, float]:
    s = make_subject(model, digits()[0][:3], output="identity")
    return {n: e.value for n, e in estimates(Sharpness().measure(s, Block(range(3)))).items()}
