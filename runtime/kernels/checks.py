"""Checks of values while the program runs: each returns its operand, or raises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["checked"]

aten = torch.ops.aten


@torch.library.custom_op("shardc::checked", mutates_args=())
def checked(x: Tensor, info: Tensor, name: str, is_matrix: bool) -> Tensor:
    """`x`, a result of the factorisation called `name`. Its `info` is an integer per matrix, 0 if it worked.

    Raises torch.linalg.LinAlgError, as the operator itself does, if it failed. `is_matrix` says that `x` is not a
    batch.
    """
    aten._linalg_check_errors(info, name, is_matrix=is_matrix)
    return x.clone()


@torch.library.custom_op("shardc::confirmed", mutates_args=())
def confirmed(x: Tensor, good: Tensor, message: str) -> Tensor:
    """`x` if `good`, a single boolean, is true. Raises ValueError with `message` if not."""
    if not bool(good):
        raise ValueError(message)
    return x.clone()


@confirmed.register_fake
def _confirmed_fake(x: Tensor, good: Tensor, message: str) -> Tensor:
    return torch.empty_like(x)


def _same(_: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


def _same_of_checked(_: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


@checked.register_fake
def _checked_fake(x: Tensor, info: Tensor, name: str, is_matrix: bool) -> Tensor:
    return torch.empty_like(x)


confirmed.register_autograd(_same)
checked.register_autograd(_same_of_checked)
