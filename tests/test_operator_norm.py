"""Enclosures of operator norms against dense matrices made by plain autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from tasks import operator_norm as module_under_test
from tasks.convolution import Axis, convolution
from tasks.networks import lenet, vgg11
from tasks.operator_norm import authors_weight_norm, dense_operator, operator_norm

# torch says of its own convolution, the reference here, that it may copy its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

EXACT = 1e-8  # ten times the stated widening
ROUNDING = 1e-12  # of a norm from a dense float64 SVD


def matrix_by_autograd(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Jacobian of the layer's own forward on one input: the operator, whatever the layer does."""
    layer = layer.double()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: layer(x[None])[0], torch.zeros(shape, dtype=torch.float64)
    )
    return jacobian.reshape(-1, math.prod(shape))


def exact_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    return torch.linalg.svdvals(matrix_by_autograd(layer, shape))[0].item()


def conv(
    seed: int, *sizes: int | tuple[int, ...], shift: float = 0.0, **options: object
) -> nn.Conv2d:
    """Convolution with normal weights in float64; a shift of the weights gives a peaked symbol."""
    layer = nn.Conv2d(*sizes, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
        layer.weight.copy_(noise + shift)
    return layer


def same(seed: int, *sizes: int | tuple[int, ...], **options: object) -> nn.Conv2d:
    """timm's convolution that pads by the size of its input, unevenly where need be."""
    layer = Conv2dSame(*sizes, **options).double()  # type: ignore[arg-type]
    layer.load_state_dict(conv(seed, *sizes, **options).state_dict())
    return layer


@st.composite
def axes(draw: st.DrawFn, symmetric: bool = True) -> Axis:
    before = draw(st.integers(0, 4))
    axis = Axis(
        size=draw(st.integers(1, 7)),
        kernel=draw(st.integers(1, 5)),
        stride=draw(st.integers(1, 4)),
        dilation=draw(st.integers(1, 3)),
        before=before,
        after=before if symmetric else draw(st.integers(0, 4)),
    )
    assume(axis.out > 0)
    return axis


CASES: dict[str, tuple[nn.Conv2d, tuple[int, int]]] = {
    "3x3": (conv(0, 2, 3, 3, padding=1), (6, 7)),
    "3x3 with all weights positive": (conv(1, 2, 3, 3, padding=1, shift=2.0), (6, 7)),
    "padding wider than the kernel's reach": (conv(2, 2, 3, 3, padding=4), (5, 4)),
    "even kernel": (conv(3, 2, 3, 4, padding=1), (6, 6)),
    "kernel 2 x 5": (conv(4, 2, 3, (2, 5), padding=(1, 2)), (6, 8)),
    "kernel as large as the image": (conv(5, 2, 3, 5), (5, 5)),
    "stride 2": (conv(6, 2, 3, 3, padding=1, stride=2), (7, 8)),
    "stride 2 x 3, kernel 5 x 4": (conv(7, 2, 5, (5, 4), padding=2, stride=(2, 3)), (8, 9)),
    "stride beyond the kernel": (conv(8, 2, 3, 2, padding=1, stride=3), (8, 7)),
    "dilation 2": (conv(9, 2, 3, 3, padding=2, dilation=2), (7, 7)),
    "dilation 3 and stride 2": (conv(10, 2, 3, 3, padding=3, dilation=3, stride=2), (9, 8)),
    "dilation 2 and stride 2": (conv(11, 2, 3, 3, padding=2, dilation=2, stride=2), (9, 8)),
    "two groups": (conv(12, 4, 6, 3, padding=1, groups=2), (5, 6)),
    "depthwise": (conv(13, 6, 6, 5, padding=2, groups=6), (5, 6)),
    "depthwise with a multiplier, strided": (conv(14, 3, 6, 3, stride=2, groups=3), (7, 7)),
    "same padding, even kernel": (conv(15, 2, 3, 4, padding="same"), (6, 5)),
    "same padding, dilated": (conv(16, 2, 3, (3, 2), padding="same", dilation=(2, 3)), (6, 5)),
    "as much padding as the size needs": (same(22, 2, 3, 3, stride=2), (6, 7)),
    "the same, kernel 4 x 3, dilation 2": (same(23, 2, 3, (4, 3), dilation=2), (5, 6)),
    "valid padding": (conv(17, 2, 3, 3, padding="valid"), (6, 5)),
    "patch embedding": (conv(18, 3, 8, 4, stride=4), (8, 12)),
    "patch embedding of an image it does not divide": (conv(19, 3, 8, 4, stride=4), (10, 11)),
    "one pixel, only the centre tap meets it": (conv(20, 2, 3, 3, padding=1), (1, 1)),
    "1x1 with padding": (conv(21, 2, 3, 1, padding=1), (3, 3)),
}


@pytest.fixture(params=[0, 1], ids=["dense allowed", "never dense"])
def never_dense(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Run the test with small operators made dense, then by certificates and Ritz values alone."""
    entries = 0 if request.param else module_under_test._DENSE_ENTRIES
    with mock.patch.object(module_under_test, "_DENSE_ENTRIES", entries):
        yield bool(request.param)


@pytest.mark.parametrize("case", CASES)
def test_the_enclosure_holds_the_norm_of_the_dense_operator(case: str, never_dense: bool):
    layer, size = CASES[case]
    exact = exact_norm(layer, (layer.in_channels, *size))
    found = operator_norm(layer, size, name=case)
    assert found.lower <= exact * (1 + ROUNDING)
    assert found.upper >= exact * (1 - ROUNDING)
    if not never_dense:
        assert found.upper <= found.lower * (1 + EXACT)


@pytest.mark.parametrize("case", CASES)
def test_the_dense_operator_is_the_jacobian_of_the_layers_forward(case: str):
    layer, size = CASES[case]
    reference = matrix_by_autograd(layer, (layer.in_channels, *size))
    torch.testing.assert_close(
        dense_operator(layer, size, name=case), reference, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_product_and_transpose_are_the_dense_operator_and_its_transpose(case: str):
    layer, size = CASES[case]
    operator = convolution(layer, layer.weight, size, name=case)
    matrix = matrix_by_autograd(layer, (layer.in_channels, *size))
    rows, columns = operator.shape
    for group in range(layer.groups):
        block = matrix[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns]
        x = torch.randn(2, columns, dtype=torch.float64)
        y = torch.randn(2, rows, dtype=torch.float64)
        image = x.reshape(2, -1, *size)
        torch.testing.assert_close(operator.product(group, image).flatten(1), x @ block.T)
        outputs = y.reshape(2, -1, *operator.output_size)
        torch.testing.assert_close(operator.transposed(group, outputs).flatten(1), y @ block)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=axes(),
    columns=axes(),
    groups=st.integers(1, 2),
    seed=st.integers(0, 1000),
    shift=st.sampled_from([0.0, 1.0]),
)
def test_every_certificate_is_above_the_norm_of_every_group(
    rows: Axis, columns: Axis, groups: int, seed: int, shift: float
):
    layer = conv(
        seed,
        2 * groups,
        3 * groups,
        (rows.kernel, columns.kernel),
        stride=(rows.stride, columns.stride),
        padding=(rows.before, columns.before),
        dilation=(rows.dilation, columns.dilation),
        groups=groups,
        shift=shift,
    )
    size = rows.size, columns.size
    operator = convolution(layer, layer.weight, size, name="")
    exact = torch.stack([torch.linalg.svdvals(operator.dense(g))[0] for g in range(groups)])
    assert (module_under_test._symbol_bounds(operator) >= exact * (1 - ROUNDING)).all()
    block = torch.linalg.svdvals(operator.kernel.flatten(2))[:, 0]
    overlap = math.sqrt(rows.overlap * columns.overlap)
    assert (block * overlap >= exact * (1 - ROUNDING)).all()
    if rows.has_inner_patch and columns.has_inner_patch:
        assert (block <= exact * (1 + ROUNDING)).all()
    # A coarse grid needs its cosine even more.
    with mock.patch.object(module_under_test, "_GRID_SLACKS", (0.5,)):
        assert (module_under_test._symbol_bounds(operator) >= exact * (1 - ROUNDING)).all()


@settings(max_examples=500, deadline=None, derandomize=True)  # integers only: a second
@given(axis=axes(symmetric=False))
def test_the_circle_is_long_enough_and_wraps_nothing_onto_the_image(axis: Axis):
    n, stride, taps = axis.circle, axis.stride, axis.reduced_taps
    image = {(axis.before + j) // stride for j in range(axis.size)}
    assert len({m % n for m in image}) == len(image)
    assert n >= max(axis.out, taps)
    for i in range(axis.out):
        for q in range(taps):
            assert i + q in image or (i + q) % n not in {m % n for m in image}


def test_on_a_wide_image_the_symbol_is_within_two_per_cent_of_the_ritz_value():
    # Per axis: at most 0.5 % from the grid, at most 1 - cos(pi / 65) = 0.1 % from the border for
    # three taps, and 1 % in the stopping rule of the Ritz value (as eigenvalues: half of it).
    found = operator_norm(conv(30, 4, 8, 3, padding=1), (64, 64), name="wide")
    assert found.lower < found.upper <= 1.02 * found.lower


def test_a_box_filter_has_the_norm_of_its_two_tridiagonal_factors():
    # Taps (1, 1, 1) with padding 1 on n points: eigenvalues 1 + 2 cos(pi k / (n + 1)).
    layer = conv(0, 1, 1, 3, padding=1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    exact = (1 + 2 * math.cos(math.pi / 201)) * (1 + 2 * math.cos(math.pi / 101))
    found = operator_norm(layer, (200, 100), name="box")
    assert found.lower <= exact <= found.upper <= 9.0 * (1 + EXACT)
    assert found.lower >= 0.99 * exact


def test_groups_are_refined_until_the_largest_is_certain():
    layer = conv(31, 40, 40, 3, padding=1, groups=40)
    exact = exact_norm(layer, (40, 4, 4))
    found = operator_norm(layer, (4, 4), name="depthwise")
    assert found.upper <= exact * (1 + EXACT)


def test_groups_beyond_the_work_limit_keep_their_certificates():
    # On 4 x 4 with t = 1 + 2 cos(pi / 5), the box filter has certificate 9 and norm t^2 = 6.85, the
    # row 2.8 (1, 1, 1) certificate 8.4 and norm 2.8 t = 7.33: the first must not decide alone.
    layer = conv(0, 2, 2, 3, padding=1, groups=2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[1] = 0.0
        layer.weight[1, 0, 1] = 2.8
    with mock.patch.object(module_under_test, "_WORK", 16.0**3):
        found = operator_norm(layer, (4, 4), name="depthwise")
    assert found.upper == pytest.approx(8.4, rel=EXACT)
    assert found.lower == pytest.approx((1 + 2 * math.cos(math.pi / 5)) ** 2, rel=EXACT)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (1, 5), (12, 12)])
def test_a_linear_layer_has_the_spectral_norm_of_its_matrix(shape: tuple[int, int]):
    layer = nn.Linear(*shape).double()
    exact = torch.linalg.svdvals(layer.weight)[0].item()
    found = operator_norm(layer, None, name="fc")
    assert exact * (1 - EXACT) <= found.lower <= exact <= found.upper <= exact * (1 + EXACT)
    assert exact_norm(layer, (4, shape[0])) == pytest.approx(exact, rel=ROUNDING)  # 4 tokens
    assert torch.equal(dense_operator(layer, None, name="fc"), layer.weight)


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("case", ["3x3", "two groups", "patch embedding"])
def test_bounds_scale_with_the_weight(case: str, factor: float, never_dense: bool):
    layer, size = CASES[case]
    scaled = conv(0, layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups)
    scaled.stride, scaled.padding = layer.stride, layer.padding
    with torch.no_grad():
        scaled.weight.copy_(layer.weight * factor)
    one, many = operator_norm(layer, size, name=case), operator_norm(scaled, size, name=case)
    assert many.lower == pytest.approx(factor * one.lower, rel=1e-9)
    assert many.upper == pytest.approx(factor * one.upper, rel=1e-9)


def test_a_zero_weight_has_norm_zero():
    layer = conv(0, 2, 3, 3)
    with torch.no_grad():
        layer.weight.zero_()
    found = operator_norm(layer, (5, 5), name="zero")
    assert (found.lower, found.upper) == (0.0, 0.0)


def test_answers_do_not_depend_on_the_global_generator():
    layer = conv(32, 4, 8, 3, padding=1)
    torch.manual_seed(0)
    first = operator_norm(layer, (40, 40), name="conv")
    torch.manual_seed(1)
    assert operator_norm(layer, (40, 40), name="conv") == first


def test_the_authors_constant_is_above_every_certificate():
    for name, (layer, size) in CASES.items():
        found = operator_norm(layer, size, name=name)
        authors = authors_weight_norm(layer, size, linear="frobenius", name=name)
        assert found.upper <= authors * (1 + EXACT), name


def test_the_authors_constant_is_the_frobenius_norm_of_an_operator_without_padding():
    for name, (layer, size) in CASES.items():
        matrix = matrix_by_autograd(layer, (layer.in_channels, *size))
        frobenius = torch.linalg.matrix_norm(matrix).item()
        authors = authors_weight_norm(layer, size, linear="frobenius", name=name)
        if layer.padding in ((0, 0), "valid") and not isinstance(layer, Conv2dSame):
            assert authors == pytest.approx(frobenius, rel=1e-12), name
        else:
            assert authors > frobenius, name


def test_the_authors_norm_of_a_linear_layer_is_the_one_asked_for():
    weight = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, -1.0]])
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert authors_weight_norm(layer, None, linear="spectral", name="fc") == pytest.approx(3.0)
    found = authors_weight_norm(layer, None, linear="frobenius", name="fc")
    assert found == pytest.approx(math.sqrt(11.0))


@pytest.mark.parametrize(("network", "channels"), [(lenet, 1), (vgg11, 3)])
def test_power_iteration_on_the_papers_networks_never_passes_the_upper_bound(network, channels):
    model = network(in_chans=channels, img_size=32, num_classes=10).eval()
    x = torch.zeros(1, channels, 32, 32)
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            found = operator_norm(layer, (x.shape[2], x.shape[3]), name=name)
            value = power_iteration(layer, x.shape)
            assert found.lower * 0.9 <= value <= found.upper
            assert found.upper <= 1.1 * found.lower
        with torch.no_grad():
            x = layer(x)


def power_iteration(layer: nn.Conv2d, shape: torch.Size) -> float:
    """Norm of T v / ||v|| after 60 steps of autograd on a float64 copy without bias."""
    kernel = layer.weight.detach().double()
    options = {"stride": layer.stride, "padding": layer.padding}
    v = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        v = (v / v.norm()).requires_grad_()
        y = nn.functional.conv2d(v, kernel, **options)  # type: ignore[arg-type]
        (v,) = torch.autograd.grad(y.square().sum() / 2, v)
    return v.norm().sqrt().item()
