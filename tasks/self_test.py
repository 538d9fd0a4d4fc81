"""Check of a network's Jacobian products before any metric that uses them. Fails closed.

On samples 0 and 1 of the frozen order, with random probes that depend on the seed alone, so the
result is the same whichever range of work asks for it. The checks and what they can catch:

- adjoint: <u, J v> = <J^T u, v>. Both sides come from one graph, so it measures rounding.
- forward_mode: J v against dual numbers, which never run the backward formulas. Catches wrong
  hand-written gradients.
- coupling: a cotangent on one image must leave the other image's gradient zero, and an image's
  logits must not depend on its neighbour. Catches batch statistics.
- repeatability: the same products from a second graph. Catches random numbers in eval mode.
- float64: products and transposed products against a float64 copy of the network, in which casts
  to shorter types are ignored.

A network that computes a part of itself in fewer digits than its images have is refused, or, in
float64, held to float32's limits.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import asdict, dataclass

import torch
from torch.autograd import forward_ad

from tasks.finite import require_finite
from tasks.jacobian import JacobianBatch, custom_functions, forward, jacobian_batch
from tasks.measurement import MeasurementError, Subject
from tasks.precision import shortest_dtype
from tasks.random import generator

# Largest relative defects that are accepted. Float32 rounding gives 1e-7 (adjoint) and 5e-7 to 2e-5
# (products) on 35 timm architectures (measured on a CPU, torch 2.14); the limits are 50 times that
# and more, and a mistake in a gradient is orders of magnitude above them. Whatever passes still
# widens every certificate, so a loose limit costs width, not truth. In float64 the same networks
# give 2e-15 and 4e-15 at most.
_LIMITS = {
    torch.float32: {
        "adjoint": 1e-5,
        "forward_mode": 1e-3,
        "coupling": 1e-3,
        "repeatability": 1e-5,
        "float64": 1e-2,  # a ReLU that flips between the two precisions costs up to 1e-3
    },
    torch.float64: {
        "adjoint": 1e-10,
        "forward_mode": 1e-8,
        "coupling": 1e-8,
        "repeatability": 1e-10,
    },
}

# Defect to assume at least where no float64 copy referees: the largest measured, see above.
_UNREFEREED = {torch.float32: 2e-5, torch.float64: 1e-13}


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Relative defects of a network's products; see the module's text for their meaning.

    Attributes:
        adjoint: |<u, J v> - <J^T u, v>| / (||u|| ||J v||).
        forward_mode: ||J v - dual J v|| / ||J v||.
        coupling: Largest leak between the two images, of gradients or logits.
        repeatability: Difference of J J^T u between two graphs.
        float64: Largest difference of J^T u and J J^T u from the float64 copy. None where the
            network is float64 already or has no working float64 copy; see ``float64_note``.
        float64_note: Why ``float64`` is None, else empty.
        defect: What certificates are widened by (times four): the largest of the rounding
            defects above. Forward mode shares the rounding of the forward pass and cannot see it,
            so without a float64 copy at least ``_UNREFEREED`` is assumed.
    """

    adjoint: float
    forward_mode: float
    coupling: float
    repeatability: float
    float64: float | None
    float64_note: str
    defect: float

    def to_dict(self) -> dict[str, float | str | None]:
        """All fields, for provenance."""
        return asdict(self)


def self_test(subject: Subject) -> SelfTest:
    """Check the network's products once per subject; later calls return the cached result.

    Args:
        subject: Needs at least two images.

    Returns:
        The defects, all within their limits.

    Raises:
        MeasurementError: If a check fails, naming the check, its value, its limit and the likely
            offender; also for NaN or infinite images, logits or products.
    """
    if "self_test" not in subject.cache:
        subject.cache["self_test"] = _run(subject)
    return subject.cache["self_test"]


def _run(subject: Subject) -> SelfTest:
    model, batch = subject.model, subject.batch((0, 1))
    images = batch.inputs.detach()
    if images.dtype not in _LIMITS:
        raise MeasurementError(
            f"self-test: expected float32 or float64 images, found {images.dtype}. Jacobians in "
            "lower precision lose whole rows; set dtype = 'float32'."
        )
    jacobian = jacobian_batch(model, images, subject.output)
    require_finite(model, images, jacobian.logits, batch.samples)
    precision = shortest_dtype(jacobian._graph_logits)
    if precision not in _LIMITS:
        raise MeasurementError(
            f"self-test: the network computes a part of itself in {precision}, whatever its "
            "weights are. Jacobians lose whole rows in it; remove the cast from its forward."
        )
    random = generator(subject.seed, "self_test")
    u = torch.randn(jacobian.logits.shape, generator=random, dtype=torch.float64)
    v = torch.randn(images.shape, generator=random, dtype=torch.float64)
    u, v = u.to(images.device), v.to(images)
    try:
        transposed, product, gram = jacobian.vjp(u), jacobian.jvp(v), jacobian.gram(u)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise  # a smaller batch may succeed: the caller's business
        raise MeasurementError(
            "self-test: the network cannot be differentiated twice: "
            f"{str(error).splitlines()[0]} {custom_functions(jacobian._graph_logits)}"
        ) from error
    finite = [torch.isfinite(t).flatten(1).all(1) for t in (transposed, product, gram)]
    bad = ~torch.stack(finite).all(0)
    if bad.any():
        names = [sample for k, sample in enumerate(batch.samples) if bad[k]]
        raise MeasurementError(
            f"samples {names}: NaN or infinite Jacobian products of finite logits. An operation "
            "has no finite gradient there (root or norm of 0, overflow). Try dtype = 'float64'."
        )

    inner = (u * product).sum(1) - (transposed.double() * v.double()).flatten(1).sum(1)
    adjoint = _ratio(inner.abs(), u.norm(dim=1) * product.norm(dim=1))
    # In this order: random numbers would fail all later checks, and coupled images the adjoint.
    again = jacobian_batch(model, images, subject.output).gram(u)
    checks = {"repeatability": _relative(again, gram)}
    _require(checks, precision, jacobian, model)
    checks["coupling"] = _coupling(model, images, jacobian, u)
    _require(checks, precision, jacobian, model)
    checks["adjoint"] = adjoint
    checks["forward_mode"] = _relative(_dual_product(model, images, jacobian, v), product)
    _require(checks, precision, jacobian, model)
    float64, note = _float64_defect(subject, images, u, transposed, gram)
    if precision != images.dtype:
        note = f"a part of the network is {precision} whatever its weights are"
    if float64 is not None:
        checks["float64"] = float64
        _require(checks, precision, jacobian, model)
    referee = _UNREFEREED[precision] if float64 is None else float64
    defect = max(adjoint, checks["repeatability"], checks["forward_mode"], referee)
    return SelfTest(
        adjoint=adjoint,
        forward_mode=checks["forward_mode"],
        coupling=checks["coupling"],
        repeatability=checks["repeatability"],
        float64=float64,
        float64_note=note,
        defect=defect,
    )


def _coupling(
    model: torch.nn.Module, images: torch.Tensor, jacobian: JacobianBatch, u: torch.Tensor
) -> float:
    """Leak of one image into the other: of its gradient, or of its presence into logits."""
    worst = 0.0
    for k in range(len(images)):
        only = torch.zeros_like(u)
        only[k] = u[k]
        norms = jacobian.vjp(only).double().flatten(1).norm(dim=1)
        worst = max(worst, _ratio(norms.sum() - norms[k], norms[k]))
        with torch.no_grad():  # its neighbour replaced by itself
            twice = forward(model, images[[k, k]])
        worst = max(worst, _relative(jacobian.logits[k : k + 1], twice[k : k + 1]))
        if math.isnan(worst):
            return worst
    return worst


def _dual_product(
    model: torch.nn.Module, images: torch.Tensor, jacobian: JacobianBatch, v: torch.Tensor
) -> torch.Tensor:
    """J v by dual numbers, (B, N) float64; the tangent is unit size, as in ``jvp``."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), forward_ad.dual_level():
            # torch scripts its own forward-mode rules at first use, and warns itself about it.
            warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
            logits = forward(model, forward_ad.make_dual(images.clone(), v))
            tangent = forward_ad.unpack_dual(logits).tangent
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise MeasurementError(
            "self-test: check 'forward_mode' could not run, so the gradients are unverified: "
            f"{str(error).splitlines()[0]} {custom_functions(jacobian._graph_logits)} "
            "Give the operation a forward-mode rule or replace it."
        ) from error
    if tangent is None:
        return torch.zeros_like(jacobian.slope)
    return jacobian.slope * tangent.double()


def _float64_defect(
    subject: Subject,
    images: torch.Tensor,
    u: torch.Tensor,
    transposed: torch.Tensor,
    gram: torch.Tensor,
) -> tuple[float | None, str]:
    """Largest difference of the products from a float64 copy's, or None and the reason."""
    if images.dtype == torch.float64:
        return None, "the network is float64"
    try:
        model = copy.deepcopy(subject.model).double()
        referee = jacobian_batch(model, images.double(), subject.output)
        defect = max(
            _relative(transposed.double(), referee.vjp(u)), _relative(gram, referee.gram(u))
        )
    except (RuntimeError, TypeError) as error:
        # Networks that build float32 tensors inside their forward clash with float64 weights, and
        # some cannot be copied. That says nothing about the float32 products.
        return None, f"no float64 copy: {str(error).splitlines()[0]}"
    return defect, ""


def _require(
    checks: dict[str, float],
    precision: torch.dtype,
    jacobian: JacobianBatch,
    model: torch.nn.Module,
) -> None:
    """Raise for the first check above its limit or not a number."""
    limits = _LIMITS[precision]
    failed = [name for name, value in checks.items() if not value <= limits[name]]
    if not failed:
        return
    name = failed[0]
    modules = _training_modules(model)
    offender = {
        "adjoint": "Overflow inside the network is the usual cause; float64 reaches further.",
        "repeatability": f"The network draws random numbers in eval mode. {modules}",
        "coupling": f"Images of a batch influence each other. {modules}",
        "forward_mode": "A backward formula is wrong. " + custom_functions(jacobian._graph_logits),
        "float64": "TF32, autocast or a float16 cast inside the network is the usual cause.",
    }[name]
    raise MeasurementError(
        f"self-test: check {name!r} of the Jacobian products failed: expected at most "
        f"{limits[name]:g}, found {checks[name]:.3g}. {offender}"
    )


def _training_modules(model: torch.nn.Module) -> str:
    """Name the modules that are in training mode."""
    names = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training
    ]
    if not names:
        return "All modules are in eval mode, so a module's own forward does it."
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"In training mode: {', '.join(names[:3])}{more}."


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest ||found - expected|| / ||expected|| over the batch."""
    difference = (found.double() - expected.double()).flatten(1).norm(dim=1)
    return _ratio(difference, expected.double().flatten(1).norm(dim=1))


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Largest part / whole, with 0 / 0 = 0; NaN if any is NaN."""
    ratio = torch.where(part == 0, torch.zeros_like(part), part / whole)
    return float(ratio.max())
