"""Autocast during a trace: what torch's autocast does to an operator, done for what is traced in the operator's place.

    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.scaled_dot_product_attention(q, k, v)    # computes in bfloat16, also where q and k are float32

torch casts where it dispatches, and knows its own operators only. Operators of torch need nothing of this on the CPU.

A model on CUDA is traced on the CPU, too, where torch's autocast for CUDA does nothing. So that of the CPU runs in its
place, and operators on CUDA's list for float32 get their operands in float32 (`as_on_cuda`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc.runtime.execute.ambient import Surroundings

Given = TypeVar("Given", Tensor, Tensor | None)


def lowered(value: Given) -> Given:
    """An operand as the operators on torch's list for lower precision see it."""
    return _cast(value, torch.get_autocast_dtype("cpu"))


def widened(value: Given) -> Given:
    """An operand as the operators on torch's list for float32 see it."""
    return _cast(value, torch.float32)


def off() -> torch.autocast:
    """Without autocast, as the body of an operator runs that torch has on a list."""
    return torch.autocast("cpu", enabled=False)


def _cast(value: Given, dtype: torch.dtype) -> Given:
    if value is None or not torch.is_autocast_enabled("cpu"):
        return value
    eligible = value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible and value.dtype != dtype else value


# "CUDA Ops that can autocast to float32", https://docs.pytorch.org/docs/stable/amp.html
_WIDE_ON_CUDA = frozenset(
    """
    __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss
    cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss
    layer_norm log log10 log1p log2 log_softmax margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
    nll_loss norm normalize pdist poisson_nll_loss pow prod reciprocal renorm rsqrt sinh smooth_l1_loss
    soft_margin_loss softmax softmin softplus sum tan triplet_margin_loss
""".split()  # noqa: SIM905  (as a list it would be fifty lines)
)


def as_on_cuda(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as autocast for CUDA makes them, where that is on."""
    name = getattr(function, "__name__", "")
    if name not in _WIDE_ON_CUDA or not torch.is_autocast_enabled("cuda") or kwargs.get("dtype") is not None:
        return args, kwargs
    return pytree.tree_map_only(Tensor, widened, (args, kwargs))


@contextmanager
def traced_on_the_cpu(module: nn.Module) -> Generator[None]:
    """While a model for CUDA is traced, autocast for CUDA is that of the CPU, also where forward switches it."""
    on_cuda = any(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers()))
    if not on_cuda and not torch.is_autocast_enabled("cuda"):
        yield
        return
    set_enabled, set_dtype = torch.set_autocast_enabled, torch.set_autocast_dtype

    def both(setter: Callable[..., None]) -> Callable[..., None]:
        def set_(*of: Any) -> None:
            if of[0] != "cpu":
                setter(*of)
                setter("cpu", of[-1])

        return set_

    with Surroundings().again(), ExitStack() as stack:
        set_enabled("cpu", torch.is_autocast_enabled("cuda"))
        set_dtype("cpu", torch.get_autocast_dtype("cuda"))
        # torch.autocast calls these two, whoever enters it
        stack.enter_context(patch.object(torch, "set_autocast_enabled", both(set_enabled)))
        stack.enter_context(patch.object(torch, "set_autocast_dtype", both(set_dtype)))
        yield
