"""The gap between training and other images: each number, its error, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from tasks.accuracy import Accuracy
from tasks.block import Block
from tasks.generalization_gap import GeneralizationGap
from tasks.measurement import Estimate, MeasurementError, Row, Status, Subject
from tasks.proportions import newcombe_interval, wilson_interval

COUNT = 40


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    """One pass over the first 1500 digits: many wrong answers."""
    return copy.deepcopy(oracles.trained(oracles.mlp, epochs=1)).to(dtype)


def pair(dtype: torch.dtype = torch.float64, **changes: object) -> tuple[Subject, Subject]:
    """Subjects of one network whose images are training digits, and others."""
    images, labels = oracles.digits()
    model = model_of(dtype)
    first, last = slice(0, COUNT), slice(-COUNT, None)
    return (
        oracles.make_subject(model, images[first], labels[first], **changes),  # type: ignore[arg-type]
        oracles.make_subject(model, images[last], labels[last], **changes),  # type: ignore[arg-type]
    )


def subject(dtype: torch.dtype = torch.float64, **changes: object) -> Subject:
    training, others = pair(dtype, **changes)
    return replace(others, training_batch=training.batch)


def rows_of(of: Subject, samples: range = range(COUNT)) -> list[Row]:
    return GeneralizationGap().measure(of, Block(samples))


def estimates(rows: list[Row]) -> dict[str, Estimate]:
    return {e.quantity: e for e in GeneralizationGap().summarize(oracles.columns(rows))}


def test_its_means_are_those_of_accuracy_on_either_set_of_images():
    found = estimates(rows_of(subject()))
    assert tuple(found) == GeneralizationGap.quantities
    for prefix, of in zip(("train", "test"), pair(), strict=True):
        rows = Accuracy().measure(of, Block(range(COUNT)))
        for truth in Accuracy().summarize(oracles.columns(rows)):
            name = {"loss": "half_squared_error"}.get(truth.quantity, truth.quantity)
            assert str(found[f"{prefix}_{name}"]) == str(
                replace(truth, quantity=f"{prefix}_{name}")
            )


def test_the_gap_and_its_error_are_those_of_two_independent_samples():
    images, labels = oracles.digits()
    right = (model_of()(images.double()).argmax(1) == labels).double().numpy()
    train, test = right[:COUNT], right[-COUNT:]
    gap = estimates(rows_of(subject()))["generalization_gap"]
    assert gap.value == pytest.approx(100 * (train.mean() - test.mean()), rel=1e-12)
    assert gap.value != 0
    variance = (train.var(ddof=1) + test.var(ddof=1)) / COUNT
    assert gap.stderr == pytest.approx(100 * math.sqrt(variance), rel=1e-12)
    interval = newcombe_interval(train.mean(), test.mean(), count_first=COUNT, count_second=COUNT)
    assert (gap.ci_low / 100, gap.ci_high / 100) == pytest.approx(interval, rel=1e-12)
    assert (gap.num_samples, gap.num_rows, gap.forward_equivalents) == (COUNT, 2 * COUNT, 2 * COUNT)
    assert gap.status is Status.OK


def test_a_constant_network_has_no_gap_beyond_the_labels():
    """Closed form: with logits that never change, accuracies are the shares of its class."""
    model = oracles.Linear(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    ones = torch.ones(4, 1, 1, 1).double()
    training = oracles.make_subject(model, ones, torch.tensor([1, 1, 1, 0]), output="identity")
    others = oracles.make_subject(model, ones, torch.tensor([1, 0, 0, 0]), output="identity")
    found = estimates(rows_of(replace(others, training_batch=training.batch), range(4)))
    assert found["generalization_gap"].value == 50
    assert found["generalization_gap"].stderr == pytest.approx(100 * math.sqrt(2 * 3 / 16 / 3))
    assert found["train_accuracy"].value == 0.75
    assert found["test_half_squared_error"].value == 0.75  # 0, 1, 1, 1
    low, high = wilson_interval(0.75, 4)
    assert (found["train_accuracy"].ci_low, found["train_accuracy"].ci_high) == (low, high)


def columns_of(train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of images of which only the accuracy matters."""
    names = GeneralizationGap.quantities[1:]
    rows = [
        Row(name, float(values[i]), sample=i)
        for name in names
        for values in [train if name.startswith("train") else test]
        for i in range(len(values))
    ]
    return oracles.columns(rows)


def test_the_stated_error_is_the_spread_of_the_gap_over_samples_of_images():
    """Unbiased variance: 400 samples of 25 images with true accuracies 0.9 and 0.7."""
    generator = np.random.default_rng(0)
    gaps, variances, covered = [], [], []
    for _ in range(400):
        train, test = (generator.random(25) < share for share in (0.9, 0.7))
        gap = GeneralizationGap().summarize(columns_of(train, test))[0]
        gaps.append(gap.value)
        variances.append(gap.stderr**2)
        covered.append(gap.ci_low <= 20 <= gap.ci_high)
    truth = 100**2 * (0.9 * 0.1 + 0.7 * 0.3) / 25
    count = len(gaps)
    assert abs(np.mean(gaps) - 20) < 4 * math.sqrt(truth / count)
    assert abs(np.mean(variances) - truth) < 4 * np.std(variances) / math.sqrt(count)
    assert abs(np.var(gaps) - truth) < 4 * truth * math.sqrt(2 / count)
    # Newcombe's interval covers 95 % to 98 % here (exact sums in test_proportions.py).
    assert np.mean(covered) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / count)


def test_all_right_answers_leave_an_interval_of_some_width():
    ones = np.ones(100)
    gap, train, *_ = GeneralizationGap().summarize(columns_of(ones, ones))
    assert (gap.value, gap.stderr, train.value) == (0, 0, 1)
    assert gap.ci_low < -3.5 < 3.5 < gap.ci_high
    assert train.ci_low < 0.965


def strip(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(r.quantity, r.sample, r.value, r.status) for r in rows]


def test_rows_do_not_depend_on_how_a_range_is_cut_nor_on_the_order():
    whole = rows_of(subject(torch.float32, batch_size=4))
    of = subject(torch.float32, batch_size=4)
    last, first = rows_of(of, range(12, COUNT)), rows_of(of, range(12))
    assert strip(whole) == strip(first + last)
    shuffled = [whole[i] for i in np.random.default_rng(0).permutation(len(whole))]
    assert str(estimates(whole)) == str(estimates(shuffled))
    other = rows_of(subject(batch_size=7))
    for row, again in zip(rows_of(subject(batch_size=8), range(8)), other, strict=False):
        assert (row.quantity, row.sample) == (again.quantity, again.sample)
        assert row.value == pytest.approx(again.value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("train", r"training images, samples \[3\]: NaN or infinite images"),
        ("test", r"^samples \[3\]: NaN or infinite images"),
    ],
)
def test_images_that_are_not_finite_are_refused_and_say_of_which_split(prefix: str, words: str):
    training, others = pair(torch.float32)
    images, labels = oracles.digits()
    some = (images[:COUNT] if prefix == "train" else images[-COUNT:]).clone()
    some[3, 0, 0, 0] = float("nan")
    spoiled = oracles.make_subject(model_of(torch.float32), some, labels[:COUNT])
    of = (
        replace(others, training_batch=spoiled.batch)
        if prefix == "train"
        else replace(spoiled, training_batch=training.batch)
    )
    with pytest.raises(MeasurementError, match=words):
        rows_of(of)


def test_logits_that_are_not_finite_are_refused():
    of = subject(torch.float32)
    with torch.no_grad():
        next(iter(of.model.parameters()))[0, 0] = float("nan")
    with pytest.raises(
        MeasurementError, match=r"training images, samples .* NaN or infinite logits"
    ):
        rows_of(of)


def test_a_subject_without_training_images_is_refused():
    with pytest.raises(MeasurementError, match="needs images of the training split, found none"):
        rows_of(pair()[1])


def test_an_overflow_makes_the_losses_not_finite_and_leaves_the_gap():
    model = oracles.Linear(torch.tensor([[1e200], [0.0]], dtype=torch.float64))
    of = oracles.make_subject(model, torch.ones(2, 1, 1, 1).double(), output="identity")
    found = estimates(rows_of(replace(of, training_batch=of.batch), range(2)))
    statuses = {name: e.status for name, e in found.items()}
    bad = {name for name, status in statuses.items() if status is Status.NOT_FINITE}
    assert bad == {"train_half_squared_error", "test_half_squared_error"}
    assert found["generalization_gap"].value == 0
