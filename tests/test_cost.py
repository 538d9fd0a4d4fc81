"""The cost model: work adds up, units last as wanted, rates come back from their own units."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import astuple

import numpy as np
import pytest

from pipeline.calibration import Calibration, Observation, calibrate
from pipeline.cost import Rates, nominal_rates, slot_share
from pipeline.device_classes import DEVICE_CLASSES, device_class
from pipeline.entries import ResourceSpec
from tasks.layer_rows import num_passes
from tasks.measurement import Measurement
from tasks.outline import LayerOutline, Outline
from tasks.registry import METRICS
from tasks.work import _NEEDS, Work, peak_bytes, self_test_work, unit_work

NETWORK = Outline(
    data_config={"input_size": (3, 224, 224)}, num_outputs=1000, num_parameters=22_000_000,
    forward_flops=9_000_000_000, layers=(LayerOutline("head", 384, 1000, 1),),
    num_operators=200, operator_bytes=110_000_000, backward_flops=10_000_000_000,
    backward_operators=220, backward_bytes=120_000_000, tangent_flops=11_000_000_000,
    tangent_operators=1700, tangent_bytes=300_000_000, largest_bytes=4_000_000,
    graph_bytes=48_000_000, double_graph_bytes=97_000_000, weight_bytes=88_000_000,
)  # fmt: skip
# Flops, bytes, operators at 50 GFLOP/s, 2 GB/s and 20 us.
TRUE = Rates(flop=2e-11, byte=5e-10, operator=2e-5, unit=0.1)
NOMINAL = nominal_rates(DEVICE_CLASSES["cpu"])


def measurement(name: str, **settings: object) -> Measurement:
    return METRICS[name](**settings)


def observations(number: int, *, noise: float, seed: int = 0) -> list[Observation]:
    """Units of networks that differ in what limits them, two measurements each."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(number):
        flops = 10 ** rng.uniform(9.5, 12.5)
        for scale in (1.0, 0.2):
            work = Work(
                scale * flops, scale * flops * 10 ** rng.uniform(-2.3, -1.0),
                scale * 10 ** rng.uniform(3, 5.5),
            )  # fmt: skip
            seconds = TRUE.seconds(work, num_images=8) * math.exp(noise * rng.standard_normal())
            found.append(Observation(f"network{k}", work, 8, 1.0, seconds))
    return found


def median_factor(rates: Rates, found: list[Observation]) -> float:
    errors = [abs(math.log(rates.seconds(o.work, num_images=8) / o.seconds)) for o in found]
    return math.exp(float(np.median(errors)))


def test_rates_come_back_from_units_that_they_made():
    fitted = calibrate(observations(30, noise=0.0), NOMINAL, spread=2.0)
    for found, true in zip(astuple(fitted.rates)[:3], astuple(TRUE)[:3], strict=True):
        assert found == pytest.approx(true, rel=0.15)  # the prior keeps a little of its own
    assert (fitted.num_units, fitted.num_networks) == (60, 30)


def test_units_never_seen_are_predicted_and_the_range_holds_most_of_them():
    fitted = calibrate(observations(12, noise=0.3), NOMINAL, spread=3.0)
    new = observations(200, noise=0.3, seed=1)
    assert median_factor(fitted.rates, new) < 1.3 < median_factor(NOMINAL, new)
    ranges = [fitted.range(fitted.rates.seconds(o.work, num_images=8)) for o in new]
    held = np.mean(
        [low <= o.seconds <= high for (low, _, high), o in zip(ranges, new, strict=True)]
    )
    assert held > 0.8


def test_one_odd_unit_moves_little():
    found = observations(12, noise=0.05)
    odd = found[3]._replace(seconds=30 * found[3].seconds)
    new = observations(50, noise=0.0, seed=1)
    spoilt = calibrate([*found[:3], odd, *found[4:]], NOMINAL, spread=2.0)
    assert median_factor(spoilt.rates, new) < 1.2


def test_without_units_a_plan_takes_the_class_and_few_units_keep_its_width():
    assert calibrate([], NOMINAL, spread=2.0) == Calibration(NOMINAL, 2.0)
    one = calibrate(observations(1, noise=0.0), NOMINAL, spread=2.0)
    many = calibrate(observations(30, noise=0.05), NOMINAL, spread=2.0)
    assert 1.0 < many.spread < one.spread < 2.0
    # A single network shifts all rates together rather than one of them to a wild value.
    for found, class_rate in zip(astuple(one.rates), astuple(NOMINAL), strict=True):
        assert 1 / 20 < found / class_rate < 20


def test_slots_of_more_cores_or_part_of_a_gpu_are_that_much_faster_or_slower():
    work = Work(1e12, 0.0, 0.0)
    one, four, half = (TRUE.seconds(work, share=share) - TRUE.unit for share in (1.0, 4.0, 0.5))
    assert (four, half) == (pytest.approx(one / 4), pytest.approx(2 * one))
    assert slot_share(ResourceSpec(num_cpus=4)) == 4
    assert slot_share(ResourceSpec(num_cpus=4, num_gpus=0.5)) == 0.5
    assert slot_share(ResourceSpec(num_gpus=2.0)) == 1, "a unit uses one GPU"


def test_every_metric_says_what_it_holds():
    assert METRICS.keys() == _NEEDS.keys()


def test_work_grows_with_images_and_draws_and_operators_fall_with_batches():
    mls, sharpness = measurement("normalized_mls"), measurement("adaptive_sharpness")

    def work(which: Measurement, samples: int, draws: int = 1, batch: int = 8) -> Work:
        return unit_work(which, NETWORK, num_samples=samples, num_draws=draws, batch_size=batch)

    assert astuple(work(mls, 32)) == pytest.approx([2 * x for x in astuple(work(mls, 16))])
    assert work(mls, 32, batch=32).operators == pytest.approx(work(mls, 32).operators / 4)
    assert work(mls, 32, batch=32).flops == work(mls, 32).flops
    double = astuple(work(sharpness, 32, draws=4))
    assert double == pytest.approx([2 * x for x in astuple(work(sharpness, 32, draws=2))])
    # Groups of 8 share a draw whatever the batch.
    assert work(sharpness, 32, batch=32) == work(sharpness, 32)
    assert self_test_work(mls, NETWORK).flops > 0
    assert self_test_work(sharpness, NETWORK) == Work()


def test_memory_follows_batches_where_graphs_are_kept_and_dtype():
    mls, sharpness = measurement("normalized_mls"), measurement("adaptive_sharpness")

    def memory(which: Measurement, batch: int, itemsize: int = 4) -> float:
        return peak_bytes(which, NETWORK, batch_size=batch, itemsize=itemsize)

    grown = memory(mls, 64) - memory(mls, 32)
    graphs = _NEEDS["normalized_mls"].held * NETWORK.double_graph_bytes
    assert grown == pytest.approx(32 * (graphs + 3 * NETWORK.largest_bytes))
    assert memory(mls, 64, 8) == 2 * memory(mls, 64)
    assert memory(sharpness, 64) == memory(sharpness, 8)
    assert memory(sharpness, 8) > 4 * NETWORK.weight_bytes
    # A small batch needs no less than the self-test of two images.
    assert memory(mls, 1) > 2 * NETWORK.double_graph_bytes


def test_rows_that_do_not_fit_together_are_predicted_as_passes():
    layers = tuple(LayerOutline(f"l{k}", 500_000, 500_000, 100) for k in range(10))
    network = dataclasses.replace(NETWORK, layers=(*layers, *NETWORK.layers))
    sizes = [layer.input_size for layer in network.layers]
    assert num_passes(sizes, 384, 100.0) == 1
    assert num_passes(sizes, 384, 2.0) == 5  # two layers of 0.72 GiB at a time
    for name in ("bounds", "volume"):
        few, many = (
            measurement(name, memory_gib=gib).forward_equivalents(network) for gib in (100.0, 2.0)
        )
        assert many > 3 * few


@pytest.mark.parametrize("device", [None, *DEVICE_CLASSES])
def test_device_classes_are_complete_and_ordered(device: str | None):
    found = device_class(device, num_gpus=1.0)
    low, middle, high = found.efficiency
    assert 0 < low < middle < high <= 1
    assert found.source
    assert found.is_gpu == (found.memory_bytes is not None)
    spec = ResourceSpec(device=device, num_gpus=float(found.is_gpu))
    assert spec.device == device


def test_devices_that_do_not_fit_their_slots_are_refused():
    with pytest.raises(ValueError, match="device = 'h100' needs num_gpus = 1"):
        ResourceSpec(device="h100")
    with pytest.raises(ValueError, match="device = 'cpu' needs num_gpus = 0"):
        ResourceSpec(device="cpu", num_gpus=1.0)
    with pytest.raises(ValueError, match="device must be one of cpu, h200"):
        ResourceSpec(device="abacus")
