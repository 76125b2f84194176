"""What a program checks of its values while it runs, and what happens when it does not hold."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


@torch.library.custom_op("shardc::checked", mutates_args=())
def checked(x: Tensor, info: Tensor, name: str, is_matrix: bool) -> Tensor:
    """`x`, a result of the factorisation called `name`, whose `info` says per matrix whether it worked.

    Raises torch.linalg.LinAlgError, as the operator itself does, where it did not. `is_matrix`: `x` is no batch.
    """
    aten._linalg_check_errors(info, name, is_matrix=is_matrix)
    return x.clone()


@checked.register_fake
def _checked_fake(x: Tensor, info: Tensor, name: str, is_matrix: bool) -> Tensor:
    return torch.empty_like(x)
