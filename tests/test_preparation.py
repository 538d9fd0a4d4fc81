"""Networks compute the same after preparation, and their gradients are those of differences."""

import copy

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from tasks.preparation import prepare


def randomised(name: str) -> nn.Module:
    """A timm network in float64 with batch statistics and attention biases off their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        for parameter_name, parameter in model.named_parameters():
            if "attention_biases" in parameter_name:
                nn.init.normal_(parameter)
    return model


@pytest.fixture
def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, 224, 224, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "vit_tiny_r_s16_p8_224"])
def test_the_function_stays_and_its_gradient_is_right(name: str, image: torch.Tensor):
    plain = randomised(name)
    prepared = prepare(copy.deepcopy(plain))
    x = image.requires_grad_()
    logits = prepared(x.clone())
    with torch.no_grad():
        torch.testing.assert_close(logits, plain(image), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    step = 1e-7 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        difference = (prepared(image + step).sum() - prepared(image - step).sum()) / 2
    assert (gradient * step).sum().item() == pytest.approx(difference.item(), rel=1e-4)


def test_torchs_own_batch_norm_has_the_defect_that_is_worked_around():
    """If this fails, torch has mended it and the affine forward can go."""
    norm = nn.BatchNorm2d(8).double().eval()
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    x.requires_grad_()
    weights = torch.randn(1, 25, 8, generator=torch.Generator().manual_seed(1)).double()

    def gradient(norm: nn.Module) -> torch.Tensor:
        (found,) = torch.autograd.grad((norm(x).flatten(2).transpose(1, 2) * weights).sum(), x)
        return found

    right = weights.mT.reshape(x.shape) / (1 + norm.eps) ** 0.5
    assert (gradient(norm) - right).abs().max() > 0.1
    torch.testing.assert_close(gradient(prepare(norm)), right, rtol=1e-12, atol=0)


def test_batch_norm_with_an_activation_keeps_it():
    norm = BatchNormAct2d(4, act_layer=nn.SiLU).eval()
    nn.init.normal_(norm.running_mean, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    expected = norm(x)
    torch.testing.assert_close(prepare(norm)(x), expected)
    assert copy.deepcopy(norm).forward.__self__ is not norm  # type: ignore[attr-defined]


def test_attention_biases_are_read_at_every_forward(image: torch.Tensor):
    model = prepare(randomised("levit_128s"))
    with torch.no_grad():
        before = model(image)
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.mul_(2)
        assert not torch.equal(model(image), before)
