"""What a unit of a measurement does, and the memory that it takes: predictions from outlines.

Work is counted in three currencies, because machines have three limits: floating-point operations,
bytes written by operators, and operators started one by one. A measurement says how many forwards
it does (``forward_equivalents``), ``tasks.counting`` what a forward does; the table below adds what
is not proportional to forwards: weight noise, the self-test, what is held at once.

Predictions only: no number of a measurement depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tasks.jacobian import JVP_COST, VJP_COST
from tasks.measurement import Measurement
from tasks.outline import Outline


@dataclass(frozen=True)
class Work:
    """Operations, bytes written, operators started."""

    flops: float = 0.0
    num_bytes: float = 0.0
    operators: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.flops + other.flops,
            self.num_bytes + other.num_bytes,
            self.operators + other.operators,
        )


@dataclass(frozen=True)
class _Needs:
    """What a measurement holds beside one copy of the weights.

    Attributes:
        graphs: Per image of a batch: 0 none, 1 that of a Jacobian, 2 with that of its backward; 3
            is 2 with as much again for a third derivative pass.
        weights: Copies of the weights in all.
        is_tested: Whether the self-test comes first.
        is_noisy: Whether weight noise is drawn for each group of images.
        held: Memory of the graphs over what is counted for them: vmapped rows, gradients at every
            layer, third derivatives. Measured on a CPU (November 2026) with vit_base, maxvit_tiny,
            crossvit_15, nextvit_small and efficientvit_b2; single networks differ by up to 25 %.
    """

    graphs: int
    weights: int = 1
    is_tested: bool = False
    is_noisy: bool = False
    held: float = 1.0


_NEEDS = {
    "accuracy": _Needs(0),
    "generalization_gap": _Needs(0),
    "relative_flatness": _Needs(0),
    "adaptive_sharpness": _Needs(0, weights=4, is_noisy=True),
    "adaptive_sharpness_limit": _Needs(3, weights=6, is_noisy=True, held=2.7),
    "hessian_trace": _Needs(3, weights=3, is_noisy=True, held=3.0),
    "normalized_mls": _Needs(2, is_tested=True, held=1.35),
    "local_dimensionality": _Needs(2, is_tested=True, held=1.35),
    "input_invariant_mls": _Needs(2, is_tested=True, held=1.35),
    "nmls": _Needs(2, is_tested=True, held=2.0),
    "volume": _Needs(1, is_tested=True, held=3.5),
    "sharpness": _Needs(1, weights=2, held=3.5),
    "bounds": _Needs(1, weights=2, is_tested=True, held=5.0),
}
# A measurement that the table does not know is taken for the most demanding of the usual ones.
_UNKNOWN = _Needs(2, is_tested=True)

# Writes of all weights per draw and group: normal numbers cost two, each of two signs one.
_NOISE_WRITES = 4
_SELF_TEST_FORWARDS = 30.0  # of its two images each, a float64 copy counting twice; counted
_SELF_TEST_IMAGES = 2
_LIVE = 3  # outputs of the largest operator alive at once in a forward without graph; chosen


def unit_work(
    measurement: Measurement,
    network: Outline,
    *,
    num_samples: int,
    num_draws: int,
    batch_size: int,
) -> Work:
    """Work of one unit, self-test not included.

    Args:
        measurement: What is measured.
        network: Of which network.
        num_samples: Images of the unit.
        num_draws: Weight draws of each.
        batch_size: Images at once, at most.
    """
    needs = _NEEDS.get(measurement.metric, _UNKNOWN)
    batch = images_at_once(measurement, batch_size=batch_size, num_samples=num_samples)
    forwards = measurement.forward_equivalents(network) * num_samples * num_draws
    work = _passes(network, forwards, batch, graphs=needs.graphs)
    if needs.is_noisy:
        draws = num_draws * num_samples / batch
        work += Work(num_bytes=_NOISE_WRITES * network.weight_bytes * draws)
    return work


def self_test_work(measurement: Measurement, network: Outline) -> Work:
    """Work of the self-test, done once per loaded network; nothing where none is done."""
    if not _NEEDS.get(measurement.metric, _UNKNOWN).is_tested:
        return Work()
    forwards = _SELF_TEST_FORWARDS * _SELF_TEST_IMAGES
    return _passes(network, forwards, _SELF_TEST_IMAGES, graphs=2)


def images_at_once(measurement: Measurement, *, batch_size: int, num_samples: int) -> int:
    """Images of one batch: groups that share weight noise are batches of their own."""
    noisy = _NEEDS.get(measurement.metric, _UNKNOWN).is_noisy
    return max(1, min(num_samples, measurement.alignment if noisy else batch_size))


def peak_bytes(
    measurement: Measurement, network: Outline, *, batch_size: int, itemsize: int
) -> float:
    """Memory of a batch beside the process itself: weights, graphs, rows, self-test.

    Args:
        measurement: What is measured.
        network: Of which network.
        batch_size: Images at once, at most.
        itemsize: Bytes of a number: 4 in float32.
    """
    needs = _NEEDS.get(measurement.metric, _UNKNOWN)
    batch = images_at_once(measurement, batch_size=batch_size, num_samples=batch_size)
    graph = (
        _LIVE * network.largest_bytes,
        network.graph_bytes,
        network.double_graph_bytes,
        2 * network.double_graph_bytes,
    )[needs.graphs]
    rows = getattr(measurement, "memory_gib", 0.0) * 2**30
    live = _LIVE * network.largest_bytes
    held = needs.weights * network.weight_bytes + batch * (needs.held * graph + live)
    tested = 0.0
    if needs.is_tested:
        # Graphs of both images, and float64 copies of network and graphs.
        tested = 3 * network.weight_bytes + 3 * _SELF_TEST_IMAGES * network.double_graph_bytes
    return max(held * itemsize / 4 + rows, tested)


def _passes(network: Outline, forwards: float, batch: int, *, graphs: int) -> Work:
    """Work in units of forwards, which measurements with a graph spend on products with it."""
    back = Work(network.backward_flops, network.backward_bytes, network.backward_operators)
    tangent = Work(network.tangent_flops, network.tangent_bytes, network.tangent_operators)
    one, unit = Work(network.forward_flops, network.operator_bytes, network.num_operators), 1.0
    if graphs == 1 and back.operators:
        one, unit = back, VJP_COST
    elif graphs > 1 and back.operators:
        one, unit = back + tangent, VJP_COST + JVP_COST
    count = forwards / unit
    return Work(one.flops * count, one.num_bytes * count, one.operators * count / batch)
