"""Adaptive sharpness: antithetic group draws against the published recipe, error beside cost.

    python tests/benchmarks/bench_adaptive_sharpness.py [CHECKPOINT_FOLDER ...]

Without arguments, a small ViT is trained for a minute on Fashion-MNIST (or digits). The recipe is
100 images with 50 one-sided draws each, one image at a time. Two questions:

``population``: work for the same standard error of the mean over the image population. ``forwards``
counts image-forwards, ``speedup`` seconds with one thread, the published loop against ours.
``fixed images``: image-forwards for the same Monte-Carlo error with the images held fixed, every
image with its own draws, so that just the estimators are compared.

Variances come from one pilot with many images; the ratios' standard errors from resampling its
groups. The recipe's standard error is what the pilot predicts for it on average.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Display
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import oracles

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.anova import Table, VarianceComponents, variance_components
from tasks.block import Block
from tasks.checkpoints import describe_local, load_checkpoint
from tasks.datasets import preprocessing, tensors
from tasks.images import DatasetError, load_dataset
from tasks.measurement import Row, Subject

RECIPE_IMAGES, RECIPE_DRAWS = 100, 50
RECIPE_FORWARDS = RECIPE_IMAGES * (RECIPE_DRAWS + 1)
PILOT_IMAGES, PILOT_DRAWS = 1600, 2
FIXED_DRAWS = 32
RHOS = (0.1, 0.03, 0.01)
RESAMPLES = 200
GREY = {
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def run(checkpoints: list[Path] | None = None, dataset: str | None = None) -> list[dict[str, Any]]:
    """Compare at every rho.

    Args:
        checkpoints: Checkpoint folders; None trains a network.
        dataset: Where the images come from; None takes Fashion-MNIST where it is installed.

    Returns:
        One dictionary per network, question, rho and number of our draws.
    """
    if dataset is None:
        dataset = "fashion-mnist" if _has_fashion_mnist() else "digits"
    if checkpoints is None:
        subjects = [("vit_64_x4", _trained(dataset))]
    else:
        subjects = [(path.name, _loaded(path, dataset)) for path in checkpoints]
    rows = []
    for name, subject in subjects:
        for rho in RHOS:
            if rho >= 0.03:
                rows += [{"network": name, **row} for row in _population(subject, rho)]
            rows.append({"network": name, **_fixed_images(subject, rho)})
    return rows


def _population(subject: Subject, rho: float) -> list[dict[str, Any]]:
    """Equal standard error of the population mean."""
    pilot_settings = AdaptiveSharpness(rho=rho)
    pilot = pilot_settings.measure(subject, Block(range(PILOT_IMAGES), range(PILOT_DRAWS)))
    ours, theirs = _tables(pilot, rho)
    size = pilot_settings.group_size

    def ratio(groups: np.ndarray | None, draws: int) -> tuple[float, float, float]:
        """Forwards ratio, our images, and the recipe's relative standard error."""
        a, b = (variance_components(_resample(table, groups)) for table in (ours, theirs))
        image = max(a.image, 0.0)  # the same for both, and less noisy from ours
        recipe = (image + (b.draw + b.residual) / RECIPE_DRAWS) / RECIPE_IMAGES
        needed = (image + (size * a.draw + a.residual) / draws) / recipe
        mean = _resample(ours, groups).values.mean()
        return RECIPE_FORWARDS / (needed * (2 * draws + 1)), needed, recipe**0.5 / abs(mean)

    rng = np.random.default_rng(0)
    num_groups = int(ours.groups.max()) + 1
    found = []
    for draws in (1, 2):
        forwards, needed, relative = ratio(None, draws)
        spread = [
            ratio(rng.integers(0, num_groups, num_groups), draws)[0] for _ in range(RESAMPLES)
        ]
        num_images = min(PILOT_IMAGES, max(2 * size, round(needed / size) * size))
        measurement = AdaptiveSharpness(rho=rho, min_draws=draws)
        recipe_seconds, our_seconds, rows = _race(subject, measurement, num_images, draws)
        result = measurement.summarize(oracles.columns(rows))[0]
        found.append(
            {
                "question": "population",
                "rho": rho,
                "draws": draws,
                "images": num_images,
                "recipe_relative_stderr": relative,
                "relative_stderr": result.stderr / abs(float(ours.values.mean())),
                "value": result.value,
                "forwards": forwards,
                "forwards_stderr": float(np.std(spread)),
                "recipe_seconds": recipe_seconds,
                "seconds": our_seconds,
                "speedup": recipe_seconds / our_seconds,
            }
        )
    return found


def _fixed_images(subject: Subject, rho: float) -> dict[str, Any]:
    """Equal Monte-Carlo error on the recipe's images, each with draws of its own."""
    measurement = AdaptiveSharpness(rho=rho, group_size=1)
    block = Block(range(RECIPE_IMAGES), range(FIXED_DRAWS))
    ours, theirs = _tables(measurement.measure(subject, block), rho)

    def ratio(groups: np.ndarray | None) -> tuple[float, float]:
        a, b = (variance_components(_resample(table, groups)) for table in (ours, theirs))
        pairs = RECIPE_DRAWS * a.residual / b.residual
        return (RECIPE_DRAWS + 1) / (2 * pairs + 1), b.residual / (2 * a.residual)

    rng = np.random.default_rng(0)
    spread = [ratio(rng.integers(0, RECIPE_IMAGES, RECIPE_IMAGES))[1] for _ in range(RESAMPLES)]
    with_base, forwards = ratio(None)
    residual: VarianceComponents = variance_components(theirs)
    error = (residual.residual / RECIPE_DRAWS / RECIPE_IMAGES) ** 0.5
    return {
        "question": "fixed images",
        "rho": rho,
        "draws": FIXED_DRAWS,
        "images": RECIPE_IMAGES,
        "recipe_relative_stderr": error / abs(ours.values.mean()),
        "value": float(ours.values.mean()),
        "forwards": forwards,
        "forwards_stderr": float(np.std(spread)),
        "forwards_with_unperturbed": with_base,
    }


def _race(
    subject: Subject, measurement: AdaptiveSharpness, num_images: int, draws: int
) -> tuple[float, float, list[Row]]:
    """Seconds of the published loop and of ours, in turns, so that neighbours disturb both."""
    rounds = 5
    cuts = [num_images * k // rounds // 8 * 8 for k in range(rounds)] + [num_images]
    recipe = ours = 0.0
    rows: list[Row] = []
    subject.cache.clear()
    for k in range(rounds):
        started = time.perf_counter()
        images = RECIPE_IMAGES // rounds
        _published_loop(subject, measurement.rho, range(k * images, (k + 1) * images))
        middle = time.perf_counter()
        if cuts[k] < cuts[k + 1]:
            rows += measurement.measure(subject, Block(range(cuts[k], cuts[k + 1]), range(draws)))
        recipe, ours = recipe + middle - started, ours + time.perf_counter() - middle
    return recipe, ours, rows


def _published_loop(subject: Subject, rho: float, samples: range) -> float:
    """The published recipe as its script runs it: a list of noise tensors, one image a forward."""
    model = subject.model
    original = {name: p.clone() for name, p in model.named_parameters()}
    noisy = copy.deepcopy(model)
    noise = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    loss_of = nn.MSELoss(reduction="sum")
    changes = []
    with torch.no_grad():
        for sample in samples:
            batch = subject.batch([sample])
            base = loss_of(model(batch.inputs).sigmoid(), batch.targets).item()
            for _ in range(RECIPE_DRAWS):
                for name in noise:
                    noise[name] = torch.randn_like(noise[name])
                for name in noise:
                    noise[name] *= rho * original[name].abs()
                for name, parameter in noisy.named_parameters():
                    parameter.data = original[name] + noise[name]
                changes.append(loss_of(noisy(batch.inputs).sigmoid(), batch.targets).item() - base)
    return float(np.mean(changes)) / rho**2


def _tables(rows: list[Row], rho: float) -> tuple[Table, Table]:
    """Antithetic values, and one-sided values of the same draws."""
    rows = [row for row in rows if row.quantity == "adaptive_sharpness"]
    sample, draw, group = (
        np.array([getattr(row, name) for row in rows]) for name in ("sample", "draw", "group")
    )
    both = np.array([row.value for row in rows])
    plus = np.array([row.loss_change_plus for row in rows]) / rho**2
    return Table(both, sample, draw, group), Table(plus, sample, draw, group)


def _resample(table: Table, groups: np.ndarray | None) -> Table:
    """The table with these groups, each a new one where it is chosen again."""
    if groups is None:
        return table
    order = np.argsort(table.groups, kind="stable")
    per_group = len(order) // (int(table.groups.max()) + 1)
    chosen = order.reshape(-1, per_group)[groups]
    values, samples, draws, _ = (column[chosen] for column in table)
    new = np.arange(len(groups))[:, None]
    samples = samples + (int(table.samples.max()) + 1) * new
    return Table(*(a.reshape(-1) for a in (values, samples, draws, new + 0 * draws)))


def _trained(dataset: str) -> Subject:
    """A ViT trained for a minute, and images that it was trained on, as in the recipe."""
    size = 28 if dataset == "fashion-mnist" else 8
    data_config = GREY | {"input_size": (1, size, size)}
    train = load_dataset(dataset, split="train")
    images, labels = tensors(train, data_config, indices=range(min(12000, len(train))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = oracles.tiny_vit(
            img_size=size, patch_size=max(2, size // 4), embed_dim=64, depth=4
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    order, epochs, batch_size = torch.Generator().manual_seed(0), 8, 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=epochs * -(-len(images) // batch_size)
    )
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(batch_size):
            targets = nn.functional.one_hot(labels[index], 10).float()
            loss = (model(images[index]).sigmoid() - targets).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return _subject(model, images[:PILOT_IMAGES], labels[:PILOT_IMAGES])


def _loaded(path: Path, dataset: str) -> Subject:
    """A checkpoint and test images in the form that it takes."""
    loaded = load_checkpoint(describe_local(path))
    test = load_dataset(dataset, split="test")
    transform = preprocessing(loaded.data_config)
    indices = range(min(PILOT_IMAGES, len(test)))
    images = torch.stack([transform(test.image(i)) for i in indices])
    return _subject(loaded.model, images, torch.tensor([test.label(i) for i in indices]))


def _subject(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Subject:
    """Endless images: few of a small test set are taken several times."""
    subject = oracles.make_subject(model, images, labels, batch_size=8)

    def batch(samples):
        found = subject.batch([i % len(images) for i in samples])
        return dataclasses.replace(found, samples=tuple(samples))

    return dataclasses.replace(subject, batch=batch)


def _has_fashion_mnist() -> bool:
    try:
        load_dataset("fashion-mnist", split="test")
    except DatasetError:
        return False
    return True


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--dataset")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(arguments.checkpoints or None, arguments.dataset)
    title = f"against {RECIPE_IMAGES} images x {RECIPE_DRAWS} draws, batch 1, one thread"
    display = Display("network", "question", title=title)
    for column in (
        "rho", "draws", "images", "recipe stderr", "our stderr",
        "forwards ratio", "recipe s", "our s", "time ratio",
    ):  # fmt: skip
        display.add_column(column, justify="right")
    for row in rows:
        display.add_row(
            row["network"],
            row["question"],
            f"{row['rho']}",
            f"{row['draws']}",
            f"{row['images']}",
            f"{row['recipe_relative_stderr']:.1%}",
            f"{row['relative_stderr']:.1%}" if "seconds" in row else "the same",
            f"{row['forwards']:.1f} ± {row['forwards_stderr']:.1f}",
            *(f"{row[key]:.1f}" if key in row else "" for key in ("recipe_seconds", "seconds")),
            f"{row['speedup']:.0f}" if "speedup" in row else "",
        )
    Console(width=130).print(display)


if __name__ == "__main__":
    main()
