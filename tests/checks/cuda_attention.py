"""Stand-ins for torch's attention kernels on CUDA, for machines without one.

Each computes by the mathematics, on the CPU, and demands of its operands what the kernel's source demands. Each call
goes to torch's operator first, with fake tensors on CUDA: it must take the arguments, and say the same of the results.

With dropout, a kernel draws from the seed of the default generator, and backward from the seed that it is given: flash
reads seed and offset from one tensor on the device, the memory-efficient kernel from two on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

__all__ = ["CudaKernels"]


def _shared(q: Tensor, x: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = q @ _shared(q, k).mT * scale
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf) if causal else scores


def _kept(scores: Tensor, dropout: float, seed: int) -> Tensor:
    """What weights are multiplied by."""
    if not dropout:
        return torch.ones_like(scores)
    return torch.empty_like(scores).bernoulli_(1 - dropout, generator=torch.Generator().manual_seed(seed)) / (
        1 - dropout
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, as its kernels lay it in memory, with NaN where nothing is seen, and the log-sum-exp."""
    scores = _scores(q, k, bias, causal, scale)
    out = (torch.softmax(scores, -1) * _kept(scores, dropout, seed)) @ _shared(q, v)
    return out.transpose(1, 2).contiguous().transpose(1, 2), torch.logsumexp(scores, -1)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, logsumexp: Tensor, causal: bool,
    scale: float, dropout: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = torch.exp(_scores(q, k, bias, causal, scale) - logsumexp.unsqueeze(-1))
    kept = _kept(weights, dropout, seed)
    change = weights * (kept * (grad @ _shared(q, v).mT) - (grad * out).sum(-1, keepdim=True)) * scale
    of_k, of_v = change.mT @ q, (kept * weights).mT @ grad
    of_k, of_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (of_k, of_v))
    return change @ _shared(q, k), of_k, of_v


def _rows_lie_together(*given: Tensor) -> None:
    assert all(x.stride(-1) == 1 for x in given)


class CudaKernels:
    """In place of `torch.ops.aten`. `prefer` is the order in which torch is to choose."""

    def __init__(self, *prefer: SDPBackend) -> None:
        self.prefer, self.called, self._mode = prefer, set[str](), FakeTensorMode()
        self.generator = torch.Generator().manual_seed(7)
        """The default generator of the device."""

    def _fused_sdp_choice(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, causal: bool, *, enable_gqa: bool
    ) -> int:
        assert q.requires_grad and torch.is_grad_enabled()  # or torch takes kernels without a backward for these widths
        assert enable_gqa == (q.shape[1] != k.shape[1])
        widths = q.shape[-1], v.shape[-1]
        takes = {
            SDPBackend.FLASH_ATTENTION: widths[0] == widths[1] <= 256 and bias is None,
            SDPBackend.EFFICIENT_ATTENTION: all(n % 4 == 0 for n in widths),
            SDPBackend.CUDNN_ATTENTION: all(n % 8 == 0 and n <= 128 for n in widths) and k.shape[2] != 1,
        }
        return next((one.value for one in self.prefer if takes[one]), SDPBackend.MATH.value)

    def _checked(self, name: str, args: tuple[Any, ...], scale: float, made: tuple[Tensor, ...]) -> tuple[Any, ...]:
        self.called.add(name)

        def fake(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        with self._mode:
            told = getattr(torch.ops.aten, name)(*map(fake, args), scale=scale)
        for one, other in zip(told, made, strict=False):
            assert one.shape == other.shape, name
        return made + tuple(told[len(made) :])

    def _scaled_dot_product_flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float
    ) -> tuple[Any, ...]:
        self._flash(q, k, v, causal)
        made = _forward(q, k, v, None, causal, scale, dropout, self.generator.initial_seed())
        return self._checked("_scaled_dot_product_flash_attention", (q, k, v, dropout, causal, debug), scale, made)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        assert not causal or q.shape[2] == k.shape[2]  # it aligns the diagonal to the bottom, torch to the top
        _rows_lie_together(q, k, v)

    def _scaled_dot_product_flash_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *more: Any, scale: float
    ) -> tuple[Any, ...]:
        _, _, most_q, most_k, dropout, causal, seed, _ = more
        self._flash(q, k, v, causal)
        assert grad.dtype == out.dtype == q.dtype and logsumexp.is_contiguous()
        assert (most_q, most_k) == (q.shape[2], k.shape[2]) and seed.dtype == torch.uint64
        state, offset = seed.view(torch.int64).tolist()
        assert offset == 0  # where a generator stands that was given a seed
        made = _backward(grad, q, k, v, None, out, logsumexp, causal, scale, dropout, state)
        given = (grad, q, k, v, out, logsumexp, *more)
        return self._checked("_scaled_dot_product_flash_attention_backward", given, scale, made)

    def _efficient(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        assert q.shape[1] == k.shape[1] == v.shape[1]
        _rows_lie_together(q, k, v)
        if bias is not None:
            assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2]) and bias.stride(-1) == 1
            places = [step for size, step in zip(bias.shape[:-1], bias.stride(), strict=False) if size > 1]
            assert all(place % 4 == 0 for place in (bias.storage_offset(), *places))

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sums: bool, dropout: float, causal: bool, *,
        scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        self._efficient(q, k, v, bias)
        out, logsumexp = _forward(q, k, v, bias, causal, scale, dropout, self.generator.initial_seed())
        logsumexp = torch.nn.functional.pad(logsumexp, [0, -q.shape[2] % 32], value=math.nan)
        given = q, k, v, bias, sums, dropout, causal
        return self._checked("_scaled_dot_product_efficient_attention", given, scale, (out, logsumexp))

    def _scaled_dot_product_efficient_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, logsumexp: Tensor,
        *more: Any, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        self._efficient(q, k, v, bias)
        assert out.transpose(1, 2).is_contiguous()  # it computes strides from the shape
        assert logsumexp.stride(-1) == 1 and logsumexp.shape[2] == -(-q.shape[2] // 32) * 32
        assert (logsumexp[..., q.shape[2] :] == math.inf).all()
        seed, offset, dropout, _, causal = more
        assert seed.dtype == offset.dtype == torch.int64 and seed.device.type == "cpu" and int(offset) == 0
        made = _backward(grad, q, k, v, bias, out, logsumexp[..., : q.shape[2]], causal, scale, dropout, int(seed))
        given = (grad, q, k, v, bias, out, logsumexp, *more)
        return (*self._checked("_scaled_dot_product_efficient_attention_backward", given, scale, made), None)

    def _cudnn(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> None:
        assert q.shape[1] == k.shape[1] == v.shape[1] and k.shape[2] != 1
        _rows_lie_together(q, k, v, *([] if bias is None else [bias]))

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sums: bool, dropout: float, causal: bool,
        debug: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        self._cudnn(q, k, v, bias, causal)
        out, logsumexp = _forward(q, k, v, bias, causal, scale)
        given = q, k, v, bias, sums, dropout, causal, debug
        return self._checked("_scaled_dot_product_cudnn_attention", given, scale, (out, logsumexp.unsqueeze(-1)))

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, seed: Tensor,
        offset: Tensor, bias: Tensor | None, *more: Any, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        _, _, most_q, most_k, _, causal = more
        self._cudnn(q, k, v, bias, causal)
        _rows_lie_together(grad, out)
        assert (most_q, most_k) == (q.shape[2], k.shape[2]) and logsumexp.shape == (*q.shape[:3], 1)
        made = _backward(grad, q, k, v, bias, out, logsumexp.squeeze(-1), causal, scale)
        given = (grad, q, k, v, out, logsumexp, seed, offset, bias, *more)
        return self._checked("_scaled_dot_product_cudnn_attention_backward", given, scale, made)
