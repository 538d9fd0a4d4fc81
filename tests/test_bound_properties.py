"""No random network breaks an inequality whose conditions it meets."""

from __future__ import annotations

import torch
from bound_oracles import (
    Checks,
    checks_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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
