"""Small networks, a Subject from tensors, and exact float64 references for tests of tasks/."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tasks.measurement import Batch, Output, Row, Subject
from tasks.preparation import prepare

NUM_CLASSES = 10


def make_subject(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    output: Output = "sigmoid",
    seed: int = 0,
    batch_size: int = 8,
) -> Subject:
    """Subject that serves these images; labels default to class 0, targets are one-hot.

    The model is put in eval mode with frozen parameters; images are cast to its dtype.
    """
    model = prepare(model)
    dtype = next((p.dtype for p in model.parameters()), images.dtype)
    images = images.to(dtype)
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    with torch.no_grad():
        num_outputs = model(images[:1].clone()).shape[1]
    targets = nn.functional.one_hot(labels, num_outputs).to(dtype)

    def batch(samples: Sequence[int]) -> Batch:
        index = list(samples)
        return Batch(images[index], targets[index], tuple(index))

    return Subject(
        model=model,
        output=output,
        batch=batch,
        seed=seed,
        batch_size=batch_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def tiny_vit(seed: int = 0, **changes: object) -> VisionTransformer:
    """timm ViT for 8 x 8 grey images and 10 classes, math attention, LayerNorms off identity."""
    settings: dict[str, object] = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": NUM_CLASSES,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(**(settings | changes))  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.1)
                nn.init.normal_(module.bias, 0.0, 0.1)
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
    return model.eval()


def mlp(
    seed: int = 0, *, inputs: int = 64, hidden: int = 48, outputs: int = NUM_CLASSES
) -> nn.Module:
    """Three-layer tanh network on flattened images."""
    return _seeded(
        seed,
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, outputs),
        ),
    )


def cnn(seed: int = 0, *, outputs: int = NUM_CLASSES) -> nn.Module:
    """Convolutions, batch norm with statistics off the identity, in-place ReLU, average pool."""

    def build() -> nn.Module:
        norm = nn.BatchNorm2d(12)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            norm,
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(96, outputs),
        )

    return _seeded(seed, build)


class Linear(nn.Module):
    """y = W x on flattened images, no bias: the network whose every metric has a closed form."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.mT


def worked_example(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """W = [[2, 1, 2], [1, 0, -1]] with the images (1, 2, 2) and (0, 3, 4): sigma = 3, sqrt 2."""
    weight = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, -1.0]], dtype=dtype)
    images = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]], dtype=dtype)
    return Linear(weight), images.reshape(2, 1, 1, 3)


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """sklearn's 1797 digits as standardised (n, 1, 8, 8) float32 images, and labels; shuffled."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32))[:, None]
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(data.target)[order]


def trained(build: Callable[[], nn.Module], *, epochs: int = 8, seed: int = 0) -> nn.Module:
    """Fresh copy of ``build()`` trained on 1500 digits with binary cross-entropy (seconds).

    ``build`` must be a module-level function or a cached partial: it is the cache's key.
    """
    return copy.deepcopy(_trained(build, epochs, seed))


@functools.cache
def _trained(build: Callable[[], nn.Module], epochs: int, seed: int) -> nn.Module:
    model = build().train()
    images, labels = digits()
    images, labels = images[:1500], labels[:1500]
    targets = nn.functional.one_hot(labels, model(images[:1]).shape[1]).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(50):
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(images[index]), targets[index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def exact_sigmas(model: nn.Module, images: torch.Tensor, output: Output) -> np.ndarray:
    """Largest singular value of each image's Jacobian: float64 autograd rows, dense SVD.

    Independent of tasks/: plain autograd on a float64 copy, the sigmoid inside the graph.
    """
    reference = copy.deepcopy(model).double().eval()
    sigmas = []
    for image in images.double():
        jacobian = torch.autograd.functional.jacobian(
            lambda x: _outputs(reference(x[None])[0], output), image
        )
        sigmas.append(torch.linalg.svdvals(jacobian.flatten(1))[0].item())
    return np.array(sigmas)


def columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows as the columns that ``summarize`` takes; missing numbers are NaN, as when stored."""
    names = Row.__dataclass_fields__
    numeric = {"value", "stderr", "lower", "upper"}
    return {
        name: np.array(
            [getattr(row, name) for row in rows], dtype=np.float64 if name in numeric else object
        )
        for name in names
    }


def _outputs(logits: torch.Tensor, output: Output) -> torch.Tensor:
    return torch.sigmoid(logits) if output == "sigmoid" else logits


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


class Times(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x
