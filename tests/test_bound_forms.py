"""Right sides with weights shared by tokens or patches, formula by formula, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bound_oracles import (
    FORMS,
    checks_of,
    near,
    reference_terms,
)
from oracles import cnn, digits
from torch import nn


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
