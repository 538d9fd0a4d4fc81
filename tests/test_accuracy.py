"""Accuracy and losses against float64 references, closed forms, symmetries and a training."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tasks.accuracy import Accuracy
from tasks.block import Block
from tasks.datasets import load_dataset, tensors
from tasks.measurement import Estimate, MeasurementError, Row, Status, Subject
from tasks.squared_error import squared_errors
from tasks.training import train
from tasks.training_settings import TrainSettings

COUNT = 24
NETWORKS = {
    "vit": lambda: oracles.trained(oracles.tiny_vit),
    "mlp": lambda: oracles.trained(oracles.mlp),
    "cnn": lambda: oracles.trained(oracles.cnn, epochs=1),  # many wrong answers
}


@functools.cache
def network(name: str) -> nn.Module:
    return NETWORKS[name]()


def subject(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> Subject:
    images, labels = oracles.digits()
    model = copy.deepcopy(network(name)).to(dtype)
    return oracles.make_subject(model, images[-COUNT:], labels[-COUNT:], **changes)  # type: ignore[arg-type]


def rows_of(of: Subject, samples: range = range(COUNT)) -> list[Row]:
    return Accuracy().measure(of, Block(samples))


def values(rows: list[Row], quantity: str) -> np.ndarray:
    return np.array([row.value for row in rows if row.quantity == quantity])


def estimates(rows: list[Row]) -> dict[str, Estimate]:
    return {e.quantity: e for e in Accuracy().summarize(oracles.columns(rows))}


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_number_is_that_of_a_plain_loop_over_images(name: str, output: str):
    images, labels = oracles.digits()
    model = copy.deepcopy(network(name)).double()
    rows = rows_of(subject(name, output=output))
    assert [(r.quantity, r.sample) for r in rows[:4]] == [
        ("accuracy", 0), ("loss", 0), ("cross_entropy", 0), ("accuracy", 1),
    ]  # fmt: skip
    expected = []
    for image, label in zip(images[-COUNT:].double(), labels[-COUNT:].tolist(), strict=True):
        with torch.no_grad():
            z = model(image[None])[0].tolist()
        f = [1 / (1 + math.exp(-t)) for t in z] if output == "sigmoid" else z
        loss = sum((t - (k == label)) ** 2 for k, t in enumerate(f)) / 2
        entropy = math.log(sum(math.exp(t) for t in z)) - z[label]
        expected.append((float(max(z) == z[label]), loss, entropy))
    for column, quantity in enumerate(("accuracy", "loss", "cross_entropy")):
        truth = np.array(expected)[:, column]
        np.testing.assert_allclose(values(rows, quantity), truth, rtol=1e-9, atol=1e-12)
        found = estimates(rows)[quantity]
        assert found.value == pytest.approx(truth.mean(), rel=1e-9)
        assert found.stderr == pytest.approx(truth.std(ddof=1) / COUNT**0.5, rel=1e-9)
        assert (found.num_samples, found.status) == (COUNT, Status.OK)
    if name == "cnn":
        assert 0.1 < estimates(rows)["accuracy"].value < 0.9, "both kinds of answers are tested"


def test_closed_form_of_the_linear_example():
    """W x = (8, -1) and (11, -4); with labels 0 and 1 the losses are (49 + 1) / 2 and 146 / 2."""
    model, x = oracles.worked_example()
    of = oracles.make_subject(model, x, torch.tensor([0, 1]), output="identity")
    rows = rows_of(of, range(2))
    np.testing.assert_array_equal(values(rows, "accuracy"), [1, 0])
    np.testing.assert_allclose(values(rows, "loss"), [25, 73], rtol=1e-14)
    entropies = [math.log1p(math.exp(-9)), 15 + math.log1p(math.exp(-15))]
    np.testing.assert_allclose(values(rows, "cross_entropy"), entropies, rtol=1e-12)
    accuracy = estimates(rows)["accuracy"]
    assert (accuracy.value, accuracy.stderr) == (0.5, 0.5)
    # Wilson's interval of 1 out of 2 is symmetric: 1/2 +- z / (2 sqrt(n + z^2)).
    half = 1.959963984540054 / (2 * math.sqrt(2 + 1.959963984540054**2))
    assert (accuracy.ci_low, accuracy.ci_high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-12)


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
def test_the_loss_is_half_of_the_squared_error_that_sharpness_starts_from(output: str):
    of = subject("vit", torch.float32, output=output)
    errors = squared_errors(of, of.batch(range(8)))
    np.testing.assert_allclose(values(rows_of(of, range(8)), "loss"), errors / 2, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), scale=st.floats(0.1, 10), order=st.permutations(range(10)))
def test_symmetries_of_the_logits(shift: float, scale: float, order: list[int]):
    """A constant on all logits keeps accuracy and cross-entropy, a positive factor the accuracy,
    a permutation of the classes everything."""
    images, labels = oracles.digits()
    images, labels = images[-8:].double(), labels[-8:]
    model = copy.deepcopy(network("mlp")).double()
    shifted, scaled, permuted = (copy.deepcopy(model) for _ in range(3))
    inverse = torch.argsort(torch.tensor(order))
    with torch.no_grad():
        shifted[-1].bias += shift
        for parameter in scaled[-1].parameters():
            parameter *= scale
        for parameter in permuted[-1].parameters():
            parameter.copy_(parameter[order])

    def numbers(model: nn.Module, labels: torch.Tensor) -> dict[str, np.ndarray]:
        rows = rows_of(oracles.make_subject(model, images, labels), range(8))
        return {name: values(rows, name) for name in Accuracy.quantities}

    before, after = numbers(model, labels), numbers(shifted, labels)
    np.testing.assert_array_equal(after["accuracy"], before["accuracy"])
    np.testing.assert_allclose(
        after["cross_entropy"], before["cross_entropy"], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_array_equal(numbers(scaled, labels)["accuracy"], before["accuracy"])
    for name, found in numbers(permuted, inverse[labels]).items():
        np.testing.assert_allclose(found, before[name], rtol=1e-9, atol=1e-12)


def test_cross_entropy_of_confident_logits_neither_overflows_nor_vanishes():
    model = oracles.Linear(torch.tensor([[1000.0], [0.0]], dtype=torch.float64))
    of = oracles.make_subject(model, torch.ones(2, 1, 1, 1).double(), torch.tensor([0, 1]))
    np.testing.assert_array_equal(values(rows_of(of, range(2)), "cross_entropy"), [0, 1000])


def test_of_equal_logits_the_first_counts_as_in_training():
    model = oracles.Linear(torch.ones(3, 1).double())
    of = oracles.make_subject(model, torch.ones(3, 1, 1, 1).double(), torch.tensor([0, 1, 2]))
    np.testing.assert_array_equal(values(rows_of(of, range(3)), "accuracy"), [1, 0, 0])


def strip(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(r.quantity, r.sample, r.value, r.status) for r in rows]


def test_rows_are_bit_equal_when_a_range_is_cut_at_batches_and_taken_in_any_order():
    whole = rows_of(subject("vit", torch.float32, batch_size=4))
    of = subject("vit", torch.float32, batch_size=4)
    last, first = rows_of(of, range(12, COUNT)), rows_of(of, range(12))
    assert strip(whole) == strip(first + last)


def test_rows_agree_to_rounding_whatever_the_batches_and_the_cut():
    whole = rows_of(subject("vit", batch_size=8))
    of = subject("vit", batch_size=5)
    cut = rows_of(of, range(7)) + rows_of(of, range(7, COUNT))
    for name in Accuracy.quantities:
        np.testing.assert_allclose(values(cut, name), values(whole, name), rtol=1e-9, atol=1e-12)


def test_estimates_are_the_same_for_every_order_of_the_rows():
    rows = rows_of(subject("mlp", torch.float32))
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert str(estimates(rows)) == str(estimates(shuffled))


def test_logits_that_are_not_finite_are_refused_with_their_samples():
    of = subject("mlp", torch.float32)
    bias = of.model[-1].bias  # type: ignore[index]
    with torch.no_grad():
        bias[3] = float("nan")
    with pytest.raises(MeasurementError, match=r"samples \[4, 5\]: NaN or infinite logits"):
        rows_of(of, range(4, 6))


def test_an_overflow_of_the_loss_is_a_row_and_makes_the_estimate_not_finite():
    model = oracles.Linear(torch.tensor([[1e200], [0.0]], dtype=torch.float64))
    of = oracles.make_subject(model, torch.ones(2, 1, 1, 1).double(), output="identity")
    rows = rows_of(of, range(2))
    assert {r.quantity: r.status for r in rows} == {
        "accuracy": Status.OK, "loss": Status.NOT_FINITE, "cross_entropy": Status.OK,
    }  # fmt: skip
    assert all(math.isnan(v) for v in values(rows, "loss"))
    found = estimates(rows)
    assert found["loss"].status is Status.NOT_FINITE
    assert math.isnan(found["loss"].value)
    assert found["accuracy"].status is Status.OK


@pytest.mark.parametrize("loss", ["cross_entropy", "sigmoid_mse"])
def test_over_all_test_images_they_are_what_the_training_says_of_its_network(loss: str):
    test = load_dataset("digits", split="test")
    settings_ = TrainSettings(network="mlp", width=16, depth=1, steps=60, loss=loss, eval_every=0)  # type: ignore[arg-type]
    trained = train(settings_, load_dataset("digits", split="train"), test)
    final = {row.quantity: row.value for row in trained.rows}
    inputs, labels = tensors(test, trained.data_config)
    of = oracles.make_subject(trained.model, inputs, labels, batch_size=500)
    found = estimates(rows_of(of, range(len(labels))))
    assert found["accuracy"].value == final["test_accuracy"]
    # sigmoid_mse is the mean over 10 outputs of what Eq. 1 halves and sums.
    same = found["cross_entropy"] if loss == "cross_entropy" else found["loss"]
    factor = 1 if loss == "cross_entropy" else 10 / 2
    assert same.value == pytest.approx(factor * final["test_loss"], rel=1e-5)


def test_its_work_is_one_forward_for_each_image():
    rows = rows_of(subject("mlp"))
    assert sum(row.forward_equivalents for row in rows) == COUNT
    assert Accuracy().stages(COUNT, 10**6) == [Block(range(COUNT))]
    assert Accuracy().finished(oracles.columns(rows))
