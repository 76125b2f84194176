"""Attention that is one call of a fused kernel, as it mostly is: all queries and keys, and nothing but the causal mask.

Cutting it into pieces would find one piece, and take longer than the kernel on small operands. Shapes are those of
`shardc.runtime.kernels.attention`; here no query sees nothing, so there is nothing to fill.
"""

from __future__ import annotations

from torch import Tensor

from shardc.runtime.kernels.attention.kernels import Kernel, kernel_for

__all__: list[str] = []


def by_one_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor] | None:
    """The result and log-sum-exp of the operator; None where it takes more than one call of a kernel."""
    heads = _of_kernel(q)
    kernel = _kernel(heads, k, v, mask, causal, window, softcap)
    if kernel is None:
        return None
    out, logsumexp = kernel.forward(heads, k, v, None, causal, scale)
    return _like(out, q), logsumexp if q.dim() == 4 else logsumexp.unflatten(1, q.shape[1:3])


def by_one_kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, logsumexp: Tensor, causal: bool,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """The gradients of q, k and v; None where `by_one_kernel` gives None."""
    heads = _of_kernel(q)
    kernel = _kernel(heads, k, v, mask, causal, window, softcap)
    if kernel is None:
        return None
    total = logsumexp if q.dim() == 4 else logsumexp.flatten(1, 2)
    made = kernel.backward(_of_kernel(grad), heads, k, v, _of_kernel(out), total, None, causal, scale)
    return _like(made[0], q), made[1], made[2]


def _kernel(
    heads: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, window: int, softcap: float
) -> Kernel | None:
    # the causal mask of kernels is that of as many queries as keys
    if mask is not None or window or softcap or (causal and heads.shape[2] != k.shape[2]):
        return None
    return kernel_for(heads, k, v, None, causal)


def _of_kernel(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.flatten(1, 2)


def _like(x: Tensor, q: Tensor) -> Tensor:
    return x if q.dim() == 4 else x.unflatten(1, q.shape[1:3])
