"""Training of small networks: one settings object in, one network with its history out.

The paper trains by plain SGD on the mean squared error (Sec. 5 of arXiv 2310.01770); AdamW and
cross-entropy are there to make populations that differ. No augmentation. Unlike the authors' code,
every pass is shuffled, the first one too. Equal settings on one machine give equal bits: the
initialisation and every shuffle come from generators keyed by the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.datasets import DatasetError, ImageDataset, sample_order, tensors
from tasks.measurement import MeasurementError, Row
from tasks.random import generator
from tasks.training_network import build, network_for
from tasks.training_settings import TrainSettings

__all__ = ["TrainSettings", "Trained", "train"]

EVALUATION_BATCH = 500  # images per forward of an evaluation: memory, no number depends on it


@dataclass(frozen=True)
class Trained:
    """A trained network and everything ``save_checkpoint`` needs.

    ``rows`` holds losses and accuracies (fractions) over the training: with ``step`` on at most
    ``eval_samples`` images, without ``step`` at the end on all; ``generalization_gap`` is the final
    train minus test accuracy in percentage points.
    """

    model: nn.Module
    architecture: str
    model_args: dict[str, Any]
    data_config: dict[str, Any]
    rows: list[Row]


def train(
    settings: TrainSettings,
    train_set: ImageDataset,
    test_set: ImageDataset,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train a network.

    Args:
        settings: What to train, and how.
        train_set: Images to train on, or to draw ``train_samples`` from.
        test_set: Images to evaluate on, with the same classes.
        device: Where to train.
        progress: Called with (updates done, updates in all) after every update.

    Returns:
        The network in eval mode on the CPU, and its history.

    Raises:
        MeasurementError: If the loss becomes NaN or infinite.
        DatasetError: If the network does not fit the images, or the sets do not fit each other.
    """
    if test_set.class_names != train_set.class_names:
        raise DatasetError(
            f"the test images have classes {test_set.class_names[:12]}, the training images "
            f"{train_set.class_names[:12]}. Take two splits of one data set."
        )
    architecture, model_args, data_config = network_for(settings, train_set)
    order = sample_order(train_set.identity(), seed=settings.seed, length=len(train_set))
    if settings.train_samples is not None and settings.train_samples > len(train_set):
        raise DatasetError(
            f"train_samples = {settings.train_samples}, but {train_set.name} has {len(train_set)}"
        )
    chosen = order[: settings.train_samples]
    train_data = _to(device, tensors(train_set, data_config, indices=chosen))
    test_data = _to(device, tensors(test_set, data_config))
    with _deterministic(settings.seed, device):
        model = build(architecture, model_args).to(device)
        rows = _optimize(settings, model, train_data, test_data, progress)
        final = {
            name: _evaluate(settings, model, data)
            for name, data in (("train", train_data), ("test", test_data))
        }
    model.zero_grad(set_to_none=True)
    for name, (loss, accuracy) in final.items():
        _check_converging(settings, loss, settings.steps)
        rows += [Row(f"{name}_loss", loss), Row(f"{name}_accuracy", accuracy)]
    gap = 100 * (final["train"][1] - final["test"][1])
    rows.append(Row("generalization_gap", gap))
    return Trained(model.cpu(), architecture, model_args, data_config, rows)


def _optimize(
    settings: TrainSettings,
    model: nn.Module,
    train_data: tuple[torch.Tensor, torch.Tensor],
    test_data: tuple[torch.Tensor, torch.Tensor],
    progress: Callable[[int, int], None] | None,
) -> list[Row]:
    inputs, labels = train_data
    targets = nn.functional.one_hot(labels, _num_outputs(model)).to(inputs.dtype)
    optimizer = _optimizer(settings, model)
    batches = _batches(settings, len(inputs))
    rows: list[Row] = []
    for step in range(settings.steps):
        if settings.eval_every and step % settings.eval_every == 0:
            rows += _history(settings, model, train_data, test_data, step)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(settings, step)
        indices = next(batches).to(inputs.device)
        loss = _loss(settings, model(inputs[indices]), targets[indices]).mean()
        _check_converging(settings, loss.item(), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, settings.steps)
    return rows


def _check_converging(settings: TrainSettings, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise MeasurementError(
            f"training diverged: the loss is {loss} at step {step} of {settings.steps} with "
            f"learning_rate = {settings.learning_rate}. Lower learning_rate, or raise "
            "warmup_steps."
        )


def _batches(settings: TrainSettings, num_samples: int) -> Iterator[torch.Tensor]:
    """Indices of batches without end; each pass is a permutation, its last batch may be short."""
    epoch = 0
    while True:
        keyed = generator(settings.seed, "training batches", epoch)
        yield from torch.randperm(num_samples, generator=keyed).split(settings.batch_size)
        epoch += 1


def _schedule(settings: TrainSettings, step: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant or a half cosine to zero."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _loss(settings: TrainSettings, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of each image, (B,): squared errors are means over outputs, as ``nn.MSELoss``."""
    if settings.loss == "cross_entropy":
        return nn.functional.cross_entropy(logits, targets, reduction="none")
    outputs = torch.sigmoid(logits) if settings.loss == "sigmoid_mse" else logits
    return (outputs - targets).square().mean(1)


def _optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    decay, rate = settings.weight_decay, settings.learning_rate
    if settings.optimizer == "sgd":
        assert settings.momentum is not None
        return torch.optim.SGD(
            model.parameters(), lr=rate, momentum=settings.momentum, weight_decay=decay
        )
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)


def _history(
    settings: TrainSettings,
    model: nn.Module,
    train_data: tuple[torch.Tensor, torch.Tensor],
    test_data: tuple[torch.Tensor, torch.Tensor],
    step: int,
) -> list[Row]:
    rows: list[Row] = []
    for name, (inputs, labels) in (("train", train_data), ("test", test_data)):
        n = settings.eval_samples
        loss, accuracy = _evaluate(settings, model, (inputs[:n], labels[:n]))
        rows.append(Row(f"{name}_loss", loss, step=step))
        rows.append(Row(f"{name}_accuracy", accuracy, step=step))
    return rows


@torch.no_grad()
def _evaluate(
    settings: TrainSettings, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Mean loss and accuracy, summed in float64."""
    model.eval()
    loss, correct = 0.0, 0
    for inputs, labels in zip(*(part.split(EVALUATION_BATCH) for part in data), strict=True):
        logits = model(inputs)
        targets = nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        loss += float(_loss(settings, logits, targets).double().sum())
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(data[1]), correct / len(data[1])


def _num_outputs(model: nn.Module) -> int:
    num_classes: Any = model.num_classes
    return num_classes


def _to(
    device: torch.device | str, data: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return data[0].to(device), data[1].to(device)


@contextmanager
def _deterministic(seed: int, device: torch.device | str) -> Iterator[None]:
    """Seed torch's global generators for initialisation and dropout, and put them back after.

    Layers and dropout take no generator argument, so their draws come from the global one.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    with (
        torch.random.fork_rng(devices=[device] if cuda else []),
        torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False),
        # On CUDA the fused backward adds in an order of its own; on the CPU it does not.
        sdpa_kernel(SDPBackend.MATH) if cuda else nullcontext(),
    ):
        torch.manual_seed(generator(seed, "training").initial_seed())
        yield
