"""Words and numbers for people: names and definitions of quantities, formatted values.

Figures and report share them, so that a quantity is called the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Definition(NamedTuple):
    """Title, formula in plain Unicode and unit of a quantity, by f(x) = outputs and input."""

    title: str
    formula: str
    unit: str


DEFINITIONS = {
    "normalized_mls": Definition(
        "Normalized MLS", "mean over images of ‖x‖² σ₁(∂f/∂x)²", "outputs²"
    ),
    "mls": Definition("MLS", "mean over images of σ₁(∂f/∂x)", "outputs per input"),
    "nmls": Definition(
        "NMLS", "sum over layers of the mean over images of σ₁(∂f/∂xₗ)", "outputs per input"
    ),
    "layer_mls": Definition(
        "Layer's MLS", "mean over images of σ₁(∂f/∂xₗ)", "outputs per input of the layer"
    ),
    "log_lvr": Definition(
        "Log local volumetric ratio", "log of the mean over images of Π σₖ(∂f/∂x)", ""
    ),
    "log_nvr": Definition(
        "Log network volumetric ratio",
        "log of the sum over layers of the mean over images of Π σₖ(∂f/∂xₗ)",
        "",
    ),
    "mean_log_volume": Definition("Mean log volume", "mean over images of Σ log σₖ(∂f/∂x)", ""),
    "log_volume_top3": Definition(
        "Log volume of the top 3", "mean over images of Σ log σₖ(∂f/∂x), k ≤ 3", ""
    ),
    "jacobian_rank": Definition("Rank of the Jacobian", "mean over images of rank ∂f/∂x", ""),
    "layer_log_volume": Definition(
        "Layer's log volume", "log of the mean over images of Π σₖ(∂f/∂xₗ)", ""
    ),
    "layer_rank": Definition("Layer's rank", "mean over images of rank ∂f/∂xₗ", ""),
    "adaptive_sharpness": Definition(
        "Adaptive sharpness", "(2/ρ²) E[L(θ+δ) − L(θ)], δ ~ N(0, ρ² diag θ²)", "units of the loss"
    ),
    "adaptive_sharpness_hessian": Definition(
        "Adaptive sharpness, ρ → 0", "Σ θₖ² ∂²L/∂θₖ²", "units of the loss"
    ),
    "adaptive_sharpness_gauss_newton": Definition(
        "Adaptive sharpness, Gauss-Newton",
        "mean over images of Σ θₖ² ‖∂f/∂θₖ‖²",
        "units of the loss",
    ),
    "adaptive_sharpness_residual": Definition(
        "Adaptive sharpness, residual",
        "mean over images of Σ θₖ² ⟨f(x) − y, ∂²f/∂θₖ²⟩",
        "units of the loss",
    ),
    "adaptive_sharpness_excess": Definition(
        "Adaptive sharpness, excess at ρ",
        "(2/ρ²) E[L(θ+δ) − L(θ)] − Σ θₖ² ∂²L/∂θₖ²",
        "units of the loss",
    ),
    "hessian_trace": Definition("Trace of the Hessian", "Σ ∂²L/∂θₖ²", "units of the loss"),
    "hessian_trace_residual": Definition(
        "Trace of the Hessian, residual",
        "mean over images of Σ ⟨f(x) − y, ∂²f/∂θₖ²⟩",
        "units of the loss",
    ),
    "sharpness": Definition("Sharpness", "mean over images of ‖∂f/∂θ‖²", "outputs²"),
    "sharpness_sqrt": Definition(
        "Root sharpness", "square root of the mean over images of ‖∂f/∂θ‖²", "outputs"
    ),
    "untied_sharpness": Definition(
        "Untied sharpness", "mean over images of the sum over layers of ‖∂f/∂z‖² ‖x‖²", "outputs²"
    ),
    "matrix_normalized_sharpness": Definition(
        "Matrix-normalised sharpness",
        "sum over layers of ‖W‖₂ times the root of its sharpness",
        "outputs",
    ),
    "layer_sharpness": Definition(
        "Layer's sharpness", "mean over images of ‖∂f/∂W‖²", "outputs² per weight²"
    ),
    "local_dimensionality": Definition(
        "Local dimensionality", "mean over images of (Σ σₖ²)² / Σ σₖ⁴, σₖ of ∂f/∂x", ""
    ),
    "jacobian_norm_squared": Definition(
        "Squared Frobenius norm", "mean over images of ‖∂f/∂x‖²", "(outputs per input)²"
    ),
    "input_invariant_mls": Definition(
        "Input-invariant MLS", "mean over images of Σ xₚ² ‖∂f/∂xₚ‖²", "outputs²"
    ),
    "input_invariant_mls_jvp_x": Definition(
        "Input-invariant MLS, published code",
        "mean over images of ‖(∂f/∂x) x‖² / dim x",
        "outputs²",
    ),
    "mls_bound": Definition(
        "Bound of MLS", "right side of Eq. 11: ‖W₁‖ (mean 1/‖x‖²)^½ S^½", "outputs per input"
    ),
    "nmls_bound": Definition(
        "Bound of NMLS",
        "right side of Eq. 12: (mean of the sum over layers of ‖W‖²/‖x‖²)^½ S^½",
        "outputs per input",
    ),
    "dead_inputs": Definition(
        "Dead inputs", "pairs of layer and image in which the layer's input is zero", ""
    ),
    "accuracy": Definition("Accuracy", "share of images whose largest logit is the label's", ""),
    "loss": Definition("Loss", "mean over images of ½‖f(x) − y‖²", "outputs²"),
    "cross_entropy": Definition(
        "Cross-entropy", "mean over images of −log softmax(logits) at the label", "nats"
    ),
    "generalization_gap": Definition(
        "Generalization gap", "training minus test accuracy", "percentage points"
    ),
    "relative_flatness": Definition(
        "Relative flatness",
        "large is sharp: Σ ⟨wₛ, wₛ'⟩ Tr ∂²L/∂wₛ∂wₛ' over rows of the last layer",
        "units of the loss",
    ),
    "train_accuracy": Definition("Training accuracy", "share of right answers", ""),
    "test_accuracy": Definition("Test accuracy", "share of right answers", ""),
    "train_half_squared_error": Definition(
        "Training loss (Eq. 1)", "mean over training images of ½‖f(x) − y‖²", "outputs²"
    ),
    "test_half_squared_error": Definition(
        "Test loss (Eq. 1)", "mean over images of ½‖f(x) − y‖²", "outputs²"
    ),
    "train_cross_entropy": Definition(
        "Training cross-entropy", "mean over training images of −log softmax(logits)", "nats"
    ),
    "test_cross_entropy": Definition(
        "Test cross-entropy", "mean over images of −log softmax(logits)", "nats"
    ),
}


def definition(series: str) -> Definition:
    """What a series measures: ``quantity`` or ``quantity@label``. Unknown ones keep their name."""
    quantity, at, label = series.partition("@")
    known = DEFINITIONS.get(quantity, Definition(quantity.replace("_", " "), "", ""))
    return known._replace(title=f"{known.title} ({label})") if at else known


def axis_label(series: str, transform: str) -> str:
    """Title, unit and definition of an axis, on two lines."""
    title, formula, unit = definition(series)
    name = f"{title}, in {unit}" if unit else title
    scale = "square root of " if transform == "sqrt" else ""
    return "\n".join(part for part in (scale + name, formula) if part)


def number(value: float, digits: int = 4) -> str:
    """A value with ``digits`` significant digits, ``1.7×10⁻⁴`` if small or large; ``–`` for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if value == 0 or -4 <= int(exponent) < 6:
        text = np.format_float_positional(float(f"{value:.{digits}g}"), trim="-")
    else:
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
        text = {"1": power, "-1": f"-{power}"}.get(mantissa, f"{mantissa}×{power}")
    return text.replace("-", "−")


def coefficient(value: float) -> str:
    """A correlation coefficient with three decimals; ``–`` for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}".replace("-", "−")


def correlation_text(row: Mapping[Hashable, Any]) -> str:
    """Coefficient and interval of a row of the correlation table, in one phrase."""
    symbol = {"pearson": "Pearson r", "spearman": "Spearman ρ", "kendall": "Kendall τ"}
    name = symbol[row["method"]]
    if math.isnan(row["r"]):
        return f"{name} undefined"
    text = f"{name} = {rounded(row['r'])}"
    if math.isnan(row["ci_low"]):
        return f"{text} (no interval)"
    return f"{text} [{rounded(row['ci_low'])}, {rounded(row['ci_high'])}]"


def counted(count: int, noun: str) -> str:
    """``1 checkpoint``, ``2 checkpoints``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def rounded(value: float) -> str:
    """A coefficient with two decimals."""
    return f"{value:.2f}".replace("-", "−")


def signed(value: float) -> str:
    """A coefficient with two decimals and its sign, whichever it is."""
    return f"{value:+.2f}".replace("-", "−")
