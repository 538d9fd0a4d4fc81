"""What a measurement is: settings, the rows it produces, and how rows become an estimate.

A measurement is a frozen settings object with two pure methods: ``measure`` turns a block of
samples and draws of one checkpoint into rows, ``summarize`` turns rows into estimates. Everything
between (who runs which block, where rows are stored) is the pipeline's business and cannot change
a number.

**Blocks.** Work is addressed by samples (positions in the frozen, seeded order of the data set) and
weight draws. Rows depend on their sample, their draw and the settings alone, so blocks may be cut,
repeated, retried and reordered freely, and larger ``samples`` only adds blocks.

**Stages.** ``stages`` lists growing blocks; when one is complete, ``finished`` looks at exactly its
rows and says whether they suffice. That makes sequential stopping a pure function of the stored
rows: it never depends on scheduling, retries or resumes.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pydantic
import torch

from tasks.block import Block

if TYPE_CHECKING:
    from tasks.outline import Outline

Output = Literal["sigmoid", "identity"]
Columns = Mapping[str, np.ndarray]


class Status(enum.StrEnum):
    """Outcome of a row or an estimate; ``sentence`` is what the user reads."""

    OK = "ok"
    NOT_CONVERGED = "not_converged"
    TARGET_NOT_REACHED = "target_not_reached"
    LIMITED_BY_SAMPLES = "limited_by_samples"
    NOT_FINITE = "not_finite"
    UNCLEAR_RANK = "unclear_rank"
    RANK_VARIES = "rank_varies"
    CONSTANT_INPUT = "constant_input"
    OWN_WEIGHT = "own_weight"
    CONDITIONS_UNMET = "conditions_unmet"
    NOT_MEASURED = "not_measured"
    INCOMPLETE = "incomplete"

    @property
    def sentence(self) -> str:
        """What happened, the likely cause and the next thing to try."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.OK: "The stated tolerance or target was reached.",
    Status.NOT_CONVERGED: (
        "The iteration limit came before the tolerance; the interval is valid but wide. "
        "Raise max_iterations or tolerance."
    ),
    Status.TARGET_NOT_REACHED: (
        "The draw budget ended before the target standard error; the error bar is right but wide. "
        "Raise max_draws or samples, or relax target_relative_stderr."
    ),
    Status.LIMITED_BY_SAMPLES: (
        "The error bar is almost all spread between images, which further draws cannot reduce. "
        "Raise samples or max_samples, or relax target_relative_stderr."
    ),
    Status.NOT_FINITE: (
        "The network gave NaN or infinity for this sample, or the measurement overflowed. "
        "Check the weights and the preprocessing, or use dtype = 'float64'."
    ),
    Status.UNCLEAR_RANK: (
        "Singular values lie near the rounding of the network's products, with no gap of a decade "
        "to cut at: rank and volume depend on where the cut falls. Use dtype = 'float64'."
    ),
    Status.RANK_VARIES: (
        "Images differ in the rank of their Jacobians, so volumes of different dimension are "
        "averaged. Look at the ranks first; volume = 'full' counts deficient images as 0."
    ),
    Status.CONSTANT_INPUT: (
        "The layer's input does not depend on the image (a table of relative positions, for "
        "example), so it has no sensitivity to it and is left out of sums over layers."
    ),
    Status.OWN_WEIGHT: (
        "A layer changes its weight in its forward or applies it twice, so it has no norm or no "
        "gradient of its own, and sums of them over layers are not defined for this network."
    ),
    Status.CONDITIONS_UNMET: (
        "This network does not meet the conditions under which the right side bounds anything; the "
        "table bounds says which. Read it as a number of its own, or take another kind."
    ),
    Status.NOT_MEASURED: "The measurement's settings leave this quantity out.",
    Status.INCOMPLETE: "Some planned samples have no result yet. Run: flatcensus resume RUN",
}


class Settings(pydantic.BaseModel):
    """Base of every settings object: immutable, no unknown keys, no silent conversions."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One number with everything needed to trust it; one line of the ``measurements`` table.

    ``lower``/``upper`` enclose the value of this row (numerical certificate), ``stderr`` is its
    random error; each is None where it does not apply. ``forward_equivalents`` counts the work in
    units of one no-grad forward of one image, ``num_probes`` random vectors or weight draws. Every
    row belongs to a sample; what depends on the weights alone (a norm of a layer's matrix) is
    attached to sample 0.
    """

    quantity: str
    value: float
    sample: int | None = None
    draw: int | None = None
    group: int | None = None
    layer: str | None = None
    step: int | None = None
    stderr: float | None = None
    lower: float | None = None
    upper: float | None = None
    loss_change_plus: float | None = None
    loss_change_minus: float | None = None
    status: Status = Status.OK
    num_iterations: int = 0
    num_probes: int = 0
    forward_equivalents: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """One quantity of one checkpoint: value with every error that is known.

    ``stderr`` is the standard error of ``value`` as a mean over the image population (images and
    draws), ``stderr_draws`` its part from random draws with the images held fixed (NaN where it
    cannot be told apart or does not exist), ``error_bound`` the mean half width of the rows'
    certificates (0 where the rows are exact, NaN where they have none). The interval is 95 %.
    ``layer`` names the layer of a layer-wise estimate, None is the whole network.
    """

    quantity: str
    value: float
    stderr: float
    ci_low: float
    ci_high: float
    num_samples: int
    num_rows: int
    stderr_draws: float = float("nan")
    error_bound: float = float("nan")
    num_probes: int = 0
    forward_equivalents: float = 0.0
    status: Status = Status.OK
    layer: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """Both sides of one inequality left <= right of one checkpoint; a line of the ``bounds`` table.

    Attributes:
        bound: Which inequality, by the paper's equation: ``"11"``, ``"12b"``, ``"48 A<=B"``.
        kind: Which form of it where weights are shared between positions (``printed``,
            ``untied``, ...), empty where there is only one.
        left: Left side, in units of the quantity that is bounded.
        right: Right side in the same units; infinite or NaN where it is not defined.
        holds: Whether left <= right up to rounding; None where a side is not defined.
        is_theorem: Whether it must hold for every network that meets the conditions.
        conditions_met: Whether this checkpoint meets them.
        conditions: What the conditions are, and which of them are not met on how many images.
        layer: For a layer-wise inequality, its layer.
        num_samples: Images that both sides are means over.
    """

    bound: str
    kind: str
    left: float
    right: float
    holds: bool | None
    is_theorem: bool
    conditions_met: bool
    conditions: str
    num_samples: int
    layer: str | None = None

    @property
    def slack_log10(self) -> float:
        """log10(right / left): orders of magnitude to spare, negative where it fails."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.log10(np.float64(self.right)) - np.log10(np.float64(self.left)))


@dataclass(frozen=True, slots=True)
class Batch:
    """Some images in the form the network takes.

    ``inputs`` (B, C, H, W), ``targets`` (B, N) one-hot (NaN where labels are not read), ``samples``
    the B positions in the frozen order of the data set.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    samples: tuple[int, ...]

    def part(self, images: slice | np.ndarray) -> Batch:
        """Some of its images, by a slice or by their indices in the batch."""
        samples = np.array(self.samples)[images].tolist()
        return Batch(self.inputs[images], self.targets[images], tuple(samples))


@dataclass(frozen=True)
class Subject:
    """A live checkpoint: what measurements see. Lives in one worker, is never serialised.

    Attributes:
        model: In eval mode, parameters frozen, fused attention off, on its device.
        output: The map from logits to the outputs f that all quantities refer to.
        batch: Loads the images at these positions of the frozen order, on the model's device.
        seed: The manifest's seed; every random number derives from it and from indices.
        batch_size: Images per batch. Changes memory and rounding, nothing else.
        num_parameters: Trainable scalars.
        training_batch: As ``batch``, from the training split in an order of its own; None unless
            the measurement says ``needs_training_images``.
        cache: For work shared by the ranges of one checkpoint (the self-test, for example).
    """

    model: torch.nn.Module
    output: Output
    batch: Callable[[Sequence[int]], Batch]
    seed: int
    batch_size: int
    num_parameters: int
    training_batch: Callable[[Sequence[int]], Batch] | None = None
    cache: dict[Any, Any] = field(default_factory=dict)


class MeasurementError(RuntimeError):
    """The checkpoint cannot be measured, now or later: a named cause, never retried."""


class Measurement(Settings, ABC):
    """Interface of a measurement. Subclasses are leaves.

    Defaults are those of a measurement without sequential stopping: one stage, units cut anywhere,
    nothing to note and no inequality to check.

    ``quantities`` are those of the whole network, one estimate each. Layer-wise estimates may come
    beside them.
    """

    metric: ClassVar[str]
    version: ClassVar[int]  # bump it when numbers change: those units run again, only those
    quantities: ClassVar[tuple[str, ...]]
    # Fields that say how much is wanted but cannot change any row; they stay out of the key.
    coverage_fields: ClassVar[frozenset[str]] = frozenset()
    # Whether it takes images of the training split too; their identity is then in the key.
    needs_training_images: ClassVar[bool] = False
    # Whether rows depend on the targets. Where labels are not read, targets are NaN, and only
    # measurements that need none are allowed.
    needs_labels: ClassVar[bool] = False

    @property
    def alignment(self) -> int:
        """Unit boundaries are multiples of this many samples.

        Here any: a boundary that cuts a batch changes rounding only.
        """
        return 1

    def stages(self, num_samples: int, available: int) -> list[Block]:
        """Growing blocks, for the manifest's ``samples`` out of ``available`` images.

        Here one: every sample once, without weight draws.
        """
        return [Block(range(num_samples))]

    def finished(self, rows: Columns) -> bool:
        """Whether the rows of a complete stage suffice. Not asked after the last stage."""
        return True

    @abstractmethod
    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Measure a block. Raises MeasurementError if the checkpoint cannot be measured."""

    @abstractmethod
    def summarize(self, rows: Columns) -> list[Estimate]:
        """Reduce the rows of the final stage to one estimate per quantity."""

    @abstractmethod
    def forward_equivalents(self, network: Outline) -> float:
        """Predicted cost of one sample and draw in no-grad forwards of one image."""

    def note(self, network: Outline) -> str:
        """What a user should know before it runs on this network: method chosen, memory needed."""
        return ""

    def checks(self, rows: Columns) -> list[Check]:
        """Inequalities evaluated on the rows of the final stage."""
        return []

    def key_fields(self) -> dict[str, Any]:
        """The settings that determine rows, defaults filled in."""
        settings = self.model_dump(mode="json", exclude=set(self.coverage_fields))
        return {"metric": self.metric, "version": self.version, **settings}
