"""Terms of the bounds where rounding or the split into batches could decide what is said."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import nn

from tasks.block import Block
from tasks.bounds import Bounds
from tasks.measurement import Check, Row


def checks(rows: list[Row], bound: str) -> list[Check]:
    return [c for c in Bounds().checks(oracles.columns(rows)) if c.bound == bound]


class Cancelling(nn.Module):
    """f = <w, x_1> - <w, x_2> of six tokens: no gradient in w where x_1 = x_2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x[:, 0])
        return z[:, 0] - z[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_equal_tokens_are_dependent_whatever_rounding_makes_of_their_gram_matrix(seed, dtype):
    """The gram form would be a theorem that fails: its right side is 0 over rounding."""
    x = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[1:, :, 1] = x[1:, :, 0]
    of = oracles.make_subject(Cancelling().to(dtype), x, output="identity")
    rows = Bounds().measure(of, Block(range(3)))
    least = [r.value for r in rows if r.quantity == "least_gram"]
    expected = torch.linalg.eigvalsh(x[0, 0].double() @ x[0, 0].double().mT)[0].item()
    assert least == [pytest.approx(expected, rel=1e-9), 0.0, 0.0]
    (found,) = (c for c in checks(rows, "11") if c.kind == "gram")
    assert not found.conditions_met
    assert "dependent positions on 2 images" in found.conditions


class Residual(nn.Module):
    """f = ReLU(h + tanh(0.05 W h)) with h = x, whose Jacobian is 0 for negative images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.normal_(self.layer.weight, 0, 0.02, generator=torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return torch.relu(x + torch.tanh(self.layer(x)))


def test_images_without_a_gradient_count_in_both_sides_of_the_skip_bound():
    """Alone in their batch they show no skip connection; the left side is a mean over them too."""
    x = torch.ones(40, 1, 2, 2, dtype=torch.float64)
    x[1:] *= -1
    left = []
    for batch_size in (1, 40):
        of = oracles.make_subject(Residual().double(), x, output="identity", batch_size=batch_size)
        found = checks(Bounds().measure(of, Block(range(40))), "17")
        assert found
        assert all(c.holds for c in found)
        left.append([c.left for c in found])
    assert left[0] == pytest.approx(left[1], rel=1e-12)


def test_rows_of_skip_connections_stay_within_the_memory_and_do_not_depend_on_it(monkeypatch):
    sizes: list[int] = []
    norm = torch.linalg.matrix_norm

    def watched(rows: torch.Tensor, order: int) -> torch.Tensor:
        sizes.append(rows.numel() * rows.element_size())
        return norm(rows, order)

    monkeypatch.setattr(torch.linalg, "matrix_norm", watched)
    x = torch.rand(7, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of = oracles.make_subject(Residual().double(), x, output="identity")
    found = []
    for num_bytes in (2**30, 800):  # of one image: two kinds of 4 x 4 numbers
        sizes.clear()
        rows = Bounds(memory_gib=num_bytes / 2**30).measure(of, Block(range(7)))
        assert 0 < 2 * max(sizes) <= num_bytes
        found.append([r.value for r in rows if r.quantity == "skip_sigma"])
    assert len(found[0]) == 7
    assert found[0] == pytest.approx(found[1], rel=1e-12)
