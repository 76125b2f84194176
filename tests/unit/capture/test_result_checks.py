"""Operators that check their own results: the check survives capture, and a bad matrix is no silent answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import shardc
from shardc.errors import CaptureError
from shardc.runtime import RankError


def _solved(x: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(torch.linalg.inv(x), b).square().sum()


def _matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64) + 6 * torch.eye(6, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(4, 6, 2, generator=generator, dtype=torch.float64).requires_grad_()


def test_inverse_and_solve_equal_the_single_device() -> None:
    x, b = _matrices()
    sharded = shardc.shard(_solved, mesh="a=2")
    made = sharded(x, b)
    torch.testing.assert_close(made, _solved(x, b))
    mine = torch.autograd.grad(made, (x, b))
    torch.testing.assert_close(mine, torch.autograd.grad(_solved(x, b), (x, b)))


def test_a_singular_matrix_raises() -> None:
    x, b = _matrices()
    sharded = shardc.shard(_solved, mesh="a=2")
    sharded(x, b)
    singular = x.detach().clone()
    singular[3] = 0
    with pytest.raises(RankError, match="singular"):
        sharded(singular.requires_grad_(), b)


def test_a_check_of_what_is_not_used_goes() -> None:
    x, _ = _matrices()
    sharded = shardc.shard(lambda x: (torch.linalg.inv(x), x * 2)[1], mesh="a=2")
    torch.testing.assert_close(sharded(x.detach()), x.detach() * 2)


def test_other_effects_are_refused() -> None:
    def prints(x: Tensor) -> Tensor:
        torch.ops.aten._print("hello")
        return x * 2

    with pytest.raises(CaptureError, match="_print"):
        shardc.shard(prints, mesh="a=2")(torch.ones(4))
