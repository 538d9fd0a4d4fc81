"""How fast the machines of a run are: rates fitted to its finished units.

Seconds are a sum over operations, bytes and operators, each at a rate (pipeline/cost.py), so units
of small and large networks of several families tell the rates apart. The fit is least squares of
log(predicted / measured), with the device class's rates as prior: rates stay positive, what the
units do not tell stays as the class has it, and a single odd unit moves little.

Predictions never change a number, so a few records, read without checking their digests, will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import scipy.optimize

from pipeline.cost import Rates, block_work, set_up_work
from pipeline.shards import ShardName, peek_record
from pipeline.specs import Spec
from pipeline.store import Store
from tasks.work import Work

MAX_RECORDS = 60  # records read for a plan: chosen, a few hundredths of a second
# How far, as a factor, each rate may be from its class before the fit notices: flops, bytes,
# operators, unit; chosen. Units count as known within UNIT_SPREAD beyond the rates.
PRIOR = (2.0, 2.0, 2.0, 2.0)
UNIT_SPREAD = 1.3
PRIOR_NETWORKS = 4  # networks that weigh as much as the class's own range; chosen
EIGHTY_PERCENT = 1.28  # standard deviations on each side of the middle 80 % of a normal


class Observation(NamedTuple):
    """One finished unit: what it did, on which share of a device, in how many seconds."""

    network: str
    work: Work
    num_images: int
    share: float
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """Rates, and how sure they are.

    Attributes:
        rates: Seconds per operation, byte, operator and unit.
        spread: Factor below and above a prediction that holds 80 % of networks.
        num_units: Units that the rates rest on.
        num_networks: Their networks.
    """

    rates: Rates
    spread: float
    num_units: int = 0
    num_networks: int = 0

    def range(self, seconds: float) -> tuple[float, float, float]:
        """Low, middle and high of predicted seconds."""
        return seconds / self.spread, seconds, seconds * self.spread


def finished_units(
    store: Store,
    specs: Mapping[str, Spec],
    present: Mapping[str, Sequence[ShardName]],
    *,
    is_gpu: bool,
    share: float = 1.0,
) -> Iterator[Observation]:
    """Up to ``MAX_RECORDS`` successful units of these specs on this kind of device.

    Args:
        store: The run folder.
        specs: By key.
        present: Shards by key.
        is_gpu: Whether units on GPUs are asked for, or those on CPUs.
        share: A slot's part of a GPU; units on CPUs know their threads.
    """
    names = [n for key in sorted(specs) for n in present.get(key, ()) if n.generation is None]
    step = max(1, -(-len(names) // MAX_RECORDS))
    for name in names[step // 2 :: step]:
        record = peek_record(store, name.key)
        if record is None or record.device.startswith("cpu") == is_gpu:
            continue
        spec = specs[name.spec_key]
        work = block_work(spec, name.block, record.batch_size or 1)
        if record.self_tested:
            work += set_up_work(spec)
        seconds = record.seconds - (record.load_seconds or 0.0)
        if seconds > 0 and work.flops > 0:
            images = 0 if spec.entry is None else len(name.block.samples)
            cores = share if is_gpu else float(record.threads)
            yield Observation(spec.checkpoint, work, images, cores, seconds)


def calibrate(observations: Iterable[Observation], nominal: Rates, *, spread: float) -> Calibration:
    """Fit rates to finished units.

    Args:
        observations: Finished units.
        nominal: Rates of the device class.
        spread: Its factor of uncertainty.
    """
    found = list(observations)
    if not found:
        return Calibration(nominal, spread)
    start = np.log(astuple(nominal))
    measured = np.log([o.seconds for o in found])

    def residuals(rates: np.ndarray) -> np.ndarray:
        error = (_log_seconds(rates, found) - measured) / math.log(UNIT_SPREAD)
        # Square root of a loss that is quadratic for small errors and linear for large ones.
        robust = np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
        return np.concatenate([robust, (rates - start) / np.log(PRIOR)])

    solution = scipy.optimize.least_squares(residuals, start).x
    error = _log_seconds(solution, found) - measured
    networks = {o.network for o in found}
    seen = EIGHTY_PERCENT * float(np.sqrt(np.mean(error**2)))
    known = math.log(spread) * PRIOR_NETWORKS + seen * len(networks)
    return Calibration(
        rates=Rates(*np.exp(solution).tolist()),
        spread=math.exp(known / (PRIOR_NETWORKS + len(networks))),
        num_units=len(found),
        num_networks=len(networks),
    )


def _log_seconds(rates: np.ndarray, found: Sequence[Observation]) -> np.ndarray:
    by = Rates(*np.exp(rates).tolist())
    return np.log([by.seconds(o.work, num_images=o.num_images, share=o.share) for o in found])
