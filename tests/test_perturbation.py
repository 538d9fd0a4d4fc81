"""Weight noise: what is perturbed, by how much, and that nothing of it stays."""

import pytest
import torch
from oracles import cnn, tiny_vit
from torch import nn

from tasks.measurement import MeasurementError
from tasks.perturbation import perturbable
from tasks.random import generator


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.full((5,), 2.0), requires_grad=False)
        self.register_buffer("offset", torch.ones(3))


def test_noise_has_the_stated_mean_and_standard_deviation_for_every_parameter():
    model = tiny_vit().double()
    originals = [parameter.clone() for parameter in model.parameters()]
    rho, num_draws = 0.1, 400
    total = [torch.zeros_like(parameter) for parameter in originals]
    square = [torch.zeros_like(parameter) for parameter in originals]
    with perturbable(model) as weights, torch.no_grad():
        for draw in range(num_draws):
            weights.draw(generator(draw))
            weights.perturb(rho)
            for i, parameter in enumerate(model.parameters()):
                z = (parameter - originals[i]) / (rho * originals[i].abs().clamp_min(1e-300))
                total[i] += z * (originals[i] != 0)
                square[i] += z.square() * (originals[i] != 0)
    for i, original in enumerate(originals):
        count = num_draws * int((original != 0).sum())
        if count:
            assert abs(total[i].sum() / count) < 4 * count**-0.5
            assert abs(square[i].sum() / count - 1) < 4 * (2 / count) ** 0.5


def test_plus_and_minus_are_symmetric_about_the_weights():
    model = cnn().double()
    before = [parameter.clone() for parameter in model.parameters()]
    with perturbable(model) as weights:
        weights.draw(generator(3))
        weights.perturb(0.2)
        plus = [parameter.clone() for parameter in model.parameters()]
        weights.perturb(-0.2)
        minus = [parameter.clone() for parameter in model.parameters()]
    for original, a, b in zip(before, plus, minus, strict=True):
        torch.testing.assert_close((a + b) / 2, original, rtol=1e-14, atol=1e-15)
        moved = original != 0
        assert (a != original)[moved].all()
        assert (a == original)[~moved].all()


def test_tied_and_frozen_parameters_take_part_once_and_buffers_never():
    model = Tied()
    with perturbable(model) as weights:
        weights.draw(generator(0))
        weights.perturb(0.5)
        assert model.first.weight is model.second.weight
        assert weights.noise.numel() == 32  # 9 and 5 numbers, each padded to 16
        assert (model.scale != 2.0).all()
        assert (model.offset == 1.0).all()


def test_one_key_gives_one_draw_for_both_dtypes_and_any_weights():
    draws = []
    for model in (cnn(0), cnn(1).double()):
        with perturbable(model) as weights:
            weights.draw(generator(5, "noise"))
            draws.append(weights.noise.clone())
    assert torch.equal(*draws)


@pytest.mark.parametrize("fail", [False, True])
def test_every_parameter_gets_its_very_tensor_back(fail):
    model = tiny_vit()
    before = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    try:
        with perturbable(model) as weights:
            weights.draw(generator(0))
            weights.perturb(0.3)
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fail
    for name, value in model.state_dict().items():
        tensor, copy = before[name]
        assert value.data_ptr() == tensor.data_ptr()
        assert torch.equal(value, copy)


def test_mixed_dtypes_and_networks_without_weights_are_refused_by_name():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(MeasurementError, match=r"torch\.float32 on cpu.*torch\.float64 on cpu"):
        perturbable(mixed).__enter__()
    with pytest.raises(MeasurementError, match="no parameters"):
        perturbable(nn.ReLU()).__enter__()
