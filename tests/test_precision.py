"""Networks that compute parts of themselves in fewer digits than their weights have."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from torch import nn

from tasks.jacobian import forward
from tasks.measurement import MeasurementError
from tasks.precision import shortest_dtype
from tasks.self_test import self_test


class Cast(nn.Module):
    """Rounds what goes through it to another type, and back."""

    def __init__(self, dtype: torch.dtype, how: str = "to") -> None:
        super().__init__()
        self.dtype, self.how = dtype, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        casts = {"to": lambda: x.to(self.dtype), "type": lambda: x.type(self.dtype),
                 "float": x.float, "keyword": lambda: x.to(dtype=self.dtype)}  # fmt: skip
        return casts[self.how]().to(x.dtype)


def network(cast: nn.Module) -> nn.Module:
    model = oracles.mlp()
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(model[:3], cast, model[3:])


def images(count: int = 2) -> torch.Tensor:
    return oracles.digits()[0][:count]


@pytest.mark.parametrize("how", ["to", "type", "float", "keyword"])
def test_float64_networks_ignore_their_casts(how: str):
    model = network(Cast(torch.float32, how)).double()
    x = images().double().requires_grad_()
    logits = forward(model, x)
    assert torch.equal(logits, oracles.mlp().double()(x))
    assert not torch.equal(model(x), logits)
    assert shortest_dtype(logits) == torch.float64
    assert shortest_dtype(model(x)) == torch.float32


def test_float32_networks_keep_theirs_and_integers_are_cast_as_ever():
    model = network(Cast(torch.bfloat16))
    assert torch.equal(forward(model, images()), model(images()))
    counted = nn.Sequential(nn.Flatten(), oracles.Linear(torch.ones(2, 64, dtype=torch.float64)))
    whole = torch.arange(64).reshape(1, 1, 8, 8)
    assert forward(counted, whole.to(torch.float64)).tolist() == [[2016.0, 2016.0]]

    class Mask(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = (x > 0).float()
            assert mask.dtype == torch.float32
            assert x.to(torch.int64).dtype == torch.int64
            return (x * mask).flatten(1)

    assert forward(Mask(), images().double()).dtype == torch.float64


def test_a_float32_part_is_refereed_by_a_copy_that_is_float64_throughout():
    """Otherwise the copy would round where the network does, and hide it."""
    plain = self_test(oracles.make_subject(oracles.mlp(), images()))
    found = self_test(oracles.make_subject(network(Cast(torch.float32)), images()))
    assert found == plain
    exact = self_test(oracles.make_subject(network(Cast(torch.float32)).double(), images()))
    assert exact.defect == 1e-13


class Hidden(torch.autograd.Function):
    """A cast that no mode sees, linear and so twice differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._to_copy(x, dtype=torch.float32)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.double()

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor) -> torch.Tensor:
        return tangent.float()


class HiddenCast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Hidden.apply(x).double() if x.dtype == torch.float64 else x


def test_a_float32_part_that_stays_is_told_and_widens_the_certificates():
    found = self_test(oracles.make_subject(network(HiddenCast()).double(), images()))
    assert found.defect == 2e-5
    assert "torch.float32 whatever its weights are" in found.float64_note


def test_a_part_in_sixteen_bits_is_refused_with_its_type():
    model = network(Cast(torch.bfloat16))
    with pytest.raises(MeasurementError, match=r"a part of itself in torch\.bfloat16"):
        self_test(oracles.make_subject(copy.deepcopy(model), images()))
