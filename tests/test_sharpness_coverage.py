"""The stated 95 % interval is measured: it must cover in 92 to 98 % of independent repeats.

The sequential rule is on, so the number of images depends on the data as it does in a real run.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oracles import columns, digits, make_subject, trained
from torch import nn

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.block import Block
from tasks.measurement import Columns, Estimate, Row, Subject


def run(measurement: AdaptiveSharpness, rows_of, num_samples: int, available: int) -> Estimate:
    """What the pipeline does: stage after stage until the rows suffice."""
    for block in measurement.stages(num_samples, available):
        rows = rows_of(block)
        if measurement.finished(rows):
            break
    return measurement.summarize(rows)[0]


def covered(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([e.ci_low <= truth <= e.ci_high for e in estimates]))


def skewed_population(seed: int, group_size: int):
    """Values with the skewness measured on a digits ViT at rho 0.03: images 4, single values 10.

    Image effect log-normal, draw effect shared by the group, and a chi-square of one degree of
    freedom as in the square of a random loss slope. The population mean is 1.
    """
    rng = np.random.default_rng(seed)
    most, draws = 2048, 16
    image = rng.lognormal(-0.32, 0.8, (most, 1))
    shared = 1 + 0.3 * rng.standard_normal((most // group_size, draws)).repeat(group_size, axis=0)
    values = image * shared * rng.standard_normal((most, draws)) ** 2

    def rows_of(block: Block) -> Columns:
        n, d = len(block.samples), len(block.draws)
        sample, draw = (axis.reshape(-1) for axis in np.indices((n, d)))
        return {
            "quantity": np.full(n * d, "adaptive_sharpness"),
            "value": values[:n, :d].reshape(-1),
            "sample": sample,
            "draw": draw,
            "group": sample // group_size,
        }

    return rows_of


@pytest.mark.parametrize(
    ("samples", "settings"),
    [
        (64, {"max_samples": 2048, "target_relative_stderr": 0.1}),
        (64, {"max_samples": 2048, "target_relative_stderr": 0.1, "group_size": 1}),
        (100, {"target_relative_stderr": 0.1, "max_draws": 16, "group_size": 4}),
    ],
)
def test_interval_covers_for_skewed_images(samples, settings):
    measurement = AdaptiveSharpness(**settings)
    estimates = [
        run(measurement, skewed_population(seed, measurement.group_size), samples, 10**6)
        for seed in range(1000)
    ]
    assert 0.92 <= covered(estimates, 1.0) <= 0.98


class PlainViT(nn.Module):
    """One-block vision transformer on 16 patches, in few operations: a forward takes 0.1 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(4, 16), nn.Linear(16, 48)
        self.project, self.head = nn.Linear(16, 16), nn.Linear(16, 10)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.position = nn.Parameter(0.1 * torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.embed(x) + self.position
        q, k, v = self.mix(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.project((q @ k.mT / 4).softmax(-1) @ v)
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PlainViT()


def fresh_images(subject: Subject, seed: int, population: int) -> Subject:
    """The same network on images drawn with replacement, with draws of its own."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, population, 4096)

    def batch(samples):
        found = subject.batch(chosen[list(samples)].tolist())
        return dataclasses.replace(found, samples=tuple(samples))

    return dataclasses.replace(subject, batch=batch, seed=seed, cache={})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interval_covers_on_a_trained_network():
    images, labels = digits()
    subject = make_subject(trained(build, epochs=20), images, labels, batch_size=32)
    population = AdaptiveSharpness(group_size=32)
    rows = population.measure(subject, Block(range(len(images)), range(64)))
    truth = population.summarize(columns(rows))[0]

    measurement = AdaptiveSharpness(
        group_size=2, max_samples=512, max_draws=4, target_relative_stderr=0.08
    )
    estimates = []
    for seed in range(1, 201):
        repeat = fresh_images(subject, seed, len(images))
        rows: list[Row] = []

        def rows_of(block: Block, repeat: Subject = repeat, rows: list[Row] = rows) -> Columns:
            known = len({row.sample for row in rows})
            new = Block(range(known, block.samples.stop), block.draws)
            if not len(new):
                draws = 1 + max(row.draw for row in rows if row.draw is not None)
                new = Block(block.samples, range(draws, block.draws.stop))
            rows += measurement.measure(repeat, new)
            return columns(rows)

        estimates.append(run(measurement, rows_of, 64, len(images)))
    # The truth's own error, from draws alone, would cost 0.5 % coverage at this bound.
    assert truth.stderr_draws < 0.2 * np.median([e.stderr for e in estimates])
    assert len({e.num_samples for e in estimates}) > 1  # the rule did stop at different times
    assert 0.92 <= covered(estimates, truth.value) <= 0.98
