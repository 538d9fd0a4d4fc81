"""Adaptive sharpness: antithetic group draws against the published recipe, error beside cost.

The recipe is 100 images with 50 one-sided draws each, one image at a time. Two questions:

``population``: work for the same standard error of the mean over the image population. ``forwards``
counts image-forwards, ``speedup`` seconds with one thread, the published loop against ours.
``fixed images``: image-forwards for the same Monte-Carlo error with the images held fixed, every
image with its own draws, so that just the estimators are compared.

Variances come from one pilot with many images; the ratios' standard errors from resampling its
groups. The recipe's standard error is what the pilot predicts for it on average.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import torch
from rich.table import Table as Display
from torch import nn

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.anova import Table, VarianceComponents, variance_components
from tasks.block import Block
from tasks.measurement import Batch, Row, Subject

from . import networks

RECIPE_IMAGES, RECIPE_DRAWS = 100, 50
RECIPE_FORWARDS = RECIPE_IMAGES * (RECIPE_DRAWS + 1)
PILOT_IMAGES, PILOT_DRAWS = 1600, 2
FIXED_DRAWS = 32
RHOS = (0.1, 0.03, 0.01)
RESAMPLES = 200


def run(checkpoints: Sequence[Path], dataset: str) -> list[dict[str, Any]]:
    """Compare at every rho.

    Args:
        checkpoints: Checkpoint folders.
        dataset: Where the images come from.

    Returns:
        One dictionary per network, question, rho and number of our draws.
    """
    rows = []
    for path in checkpoints:
        network = networks.load(path, dataset, num_images=PILOT_IMAGES)
        subject = _subject(network)
        for rho in RHOS:
            if rho >= 0.03:
                rows += [{"network": network.name, **row} for row in _population(subject, rho)]
            rows.append({"network": network.name, **_fixed_images(subject, rho)})
    return rows


def table(rows: list[dict[str, Any]]) -> Display:
    """The rows for reading."""
    title = f"Sharpness: against {RECIPE_IMAGES} images x {RECIPE_DRAWS} draws, batch 1, one thread"
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
    return display


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


def _subject(network: networks.Network) -> Subject:
    """Endless images: few of a small test set are taken several times."""
    subject = oracles.make_subject(network.model, network.images, network.labels, batch_size=8)

    def batch(samples: Sequence[int]) -> Batch:
        found = subject.batch([i % len(network.images) for i in samples])
        return dataclasses.replace(found, samples=tuple(samples))

    return dataclasses.replace(subject, batch=batch)
