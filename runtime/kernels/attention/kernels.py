"""The fused kernels of torch that attention calls on pieces, whatever the device: each returns a log-sum-exp.

Shapes of this file: q and out `[batch, heads, q_length, ...]`, k and v `[batch, kv_heads, length, ...]`, where heads
are a multiple of kv_heads; bias None or `[1 or batch, 1 or heads, q_length, length]`, in the type of q, with contiguous
rows. The causal mask is that of as many queries as keys.

Kernels on CUDA drop weights themselves: which, they draw from the seed of the device's default generator, and backward
draws them again from the seed that it is given.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from shardc.runtime.kernels.streams import mixed

__all__: list[str] = []

aten = torch.ops.aten
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Drop:
    """The probability with which a kernel drops a weight, and the seed from which it draws."""

    probability: float
    seed: int

    def of_member(self, member: int) -> Drop:
        """The same for one of several calls that share it."""
        return Drop(self.probability, mixed(self.seed, member))

    @contextmanager
    def drawn(self, device: torch.device) -> Generator[None]:
        """While a kernel runs forward: the device's default generator, from which it draws, stands at the seed."""
        if not self.probability:
            yield
            return
        generator = default_generator(device)
        with _ONE_AT_A_TIME:
            before = generator.get_state()
            try:
                generator.manual_seed(self.seed)
                yield
            finally:
                generator.set_state(before)


KEEP = Drop(0.0, 0)
"""Nothing is dropped."""


def default_generator(device: torch.device) -> torch.Generator:
    """The generator of a CUDA device from which torch's kernels draw."""
    return torch.cuda.default_generators[device.index]


class Kernel(Protocol):
    """One fused kernel and its backward."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, drop: Drop = KEEP
    ) -> tuple[Tensor, Tensor]:
        """The result and the log-sum-exp `[batch, heads, q_length]`."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None,
        causal: bool, scale: float, drop: Drop = KEEP,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of q, k and v."""
        ...


def kernel_for(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, dropout: float = 0.0
) -> Kernel | None:
    """The kernel that takes these operands, as scaled_dot_product_attention chooses; None if only the mathematics. The
    CPU's drops nothing."""
    if min(q.numel(), k.numel(), v.numel()) == 0:  # the CPU's kernel divides by zero
        return None
    if q.device.type == "cpu":
        return _CpuFlash() if q.dtype.is_floating_point and not dropout else None
    return cuda_kernel(q, k, v, bias, causal, dropout) if q.device.type == "cuda" else None


def cuda_kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, dropout: float = 0.0
) -> Kernel | None:
    """The kernel for operands on CUDA."""
    shared, chosen = k.shape[1] != q.shape[1], _chosen(q, k, v, bias, causal, dropout)
    if not shared or chosen == SDPBackend.FLASH_ATTENTION.value:
        return _CUDA.get(chosen)
    # only flash shares keys; torch itself repeats them for the others
    kernel = _CUDA.get(_chosen(q[:, :: _group(q, k)], k, v, bias, causal, dropout))
    return kernel and _Groups(kernel)


def _chosen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, dropout: float) -> int:
    """What scaled_dot_product_attention would call for training: some kernels have no backward for some widths. With
    dropout another one than cuDNN's, to which no seed can be given again."""
    with torch.enable_grad():
        chosen = aten._fused_sdp_choice(
            q.detach().requires_grad_(), k, v, bias, dropout, causal, enable_gqa=k.shape[1] != q.shape[1]
        )
    if dropout and chosen == SDPBackend.CUDNN_ATTENTION.value:  # which takes no wider rows than flash does
        flash = bias is None and q.shape[-1] == v.shape[-1]
        return (SDPBackend.FLASH_ATTENTION if flash else SDPBackend.EFFICIENT_ATTENTION).value
    return chosen


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1]


def _rows(x: Tensor) -> Tensor:
    """`x` with the elements of a row side by side in memory. The flash kernels read out of bounds otherwise."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _wide(x: Tensor, width: int) -> Tensor:
    """`x` with zeros behind each row, up to `width` elements."""
    return _rows(x if x.shape[-1] == width else F.pad(x, [0, width - x.shape[-1]]))


def _narrow(x: Tensor, width: int) -> Tensor:
    """The first `width` elements of each row."""
    return x if x.shape[-1] == width else x[..., :width]


def _by_position(x: Tensor) -> Tensor:
    """`x` with the heads of a position side by side, and nothing between positions."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias for the memory-efficient kernel, which asks for all dims, and for rows that start at a multiple of 16
    elements."""
    if bias is None:
        return None
    steps = [step for size, step in zip(bias.shape[:-1], bias.stride(), strict=False) if size > 1]
    if any(place % 16 for place in (bias.storage_offset(), *steps)):
        bias = F.pad(bias, [0, -bias.shape[-1] % 16])[..., : bias.shape[-1]]
    return bias.expand(*q.shape[:3], k.shape[2])


# the kernels themselves: torch's objects for them find out at every call which overload is meant
_CPU_FLASH: Any = aten._scaled_dot_product_flash_attention_for_cpu.default._op  # pyright: ignore[reportPrivateUsage]
_CPU_FLASH_BACKWARD: Any = aten._scaled_dot_product_flash_attention_for_cpu_backward.default._op  # pyright: ignore


class _CpuFlash:
    """The CPU's kernel. It takes rows of one width only: zeros behind the narrower ones change nothing."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, drop: Drop = KEEP
    ) -> tuple[Tensor, Tensor]:
        width = max(q.shape[-1], v.shape[-1])
        out, logsumexp = _CPU_FLASH(
            _wide(q, width), _wide(k, width), _wide(v, width), 0.0, causal, attn_mask=bias, scale=scale
        )
        return _narrow(out, v.shape[-1]), logsumexp

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None,
        causal: bool, scale: float, drop: Drop = KEEP,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        width = max(q.shape[-1], v.shape[-1])
        given = (_wide(x, width) for x in (grad, q, k, v, out))
        grads = _CPU_FLASH_BACKWARD(*given, logsumexp.contiguous(), 0.0, causal, attn_mask=bias, scale=scale)
        return _narrow(grads[0], q.shape[-1]), _narrow(grads[1], q.shape[-1]), _narrow(grads[2], v.shape[-1])


class _CudaFlash:
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, drop: Drop = KEEP
    ) -> tuple[Tensor, Tensor]:
        width = -(-q.shape[-1] // 8) * 8  # as torch pads rows for this kernel
        given = (_wide(x, width) for x in (q, k, v))
        with drop.drawn(q.device):
            out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(
                *given, drop.probability, causal, False, scale=scale
            )
        return _narrow(out, v.shape[-1]), logsumexp

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None,
        causal: bool, scale: float, drop: Drop = KEEP,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        width, seed = -(-q.shape[-1] // 8) * 8, torch.tensor([drop.seed, 0], dtype=torch.uint64, device=q.device)
        given = (_wide(x, width) for x in (grad, q, k, v, out))
        grads = aten._scaled_dot_product_flash_attention_backward(
            *given, logsumexp.contiguous(), None, None, q.shape[2], k.shape[2], drop.probability, causal, seed, seed,
            scale=scale,
        )  # fmt: skip
        return _narrow(grads[0], q.shape[-1]), _narrow(grads[1], k.shape[-1]), _narrow(grads[2], v.shape[-1])


class _CudaEfficient:
    """The memory-efficient kernel. Its log-sum-exp has a multiple of 32 queries. Backward takes for granted that the
    result lies in memory as forward makes it."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, drop: Drop = KEEP
    ) -> tuple[Tensor, Tensor]:
        with drop.drawn(q.device):
            out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(
                _rows(q), _rows(k), _rows(v), _aligned(bias, q, k), True, drop.probability, causal, scale=scale
            )
        return out, logsumexp[..., : q.shape[2]]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None,
        causal: bool, scale: float, drop: Drop = KEEP,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        padded = F.pad(logsumexp, [0, -q.shape[2] % 32], value=float("inf")).contiguous()
        seed, offset = torch.tensor(drop.seed), torch.tensor(0)  # it reads them on the CPU
        grads = aten._scaled_dot_product_efficient_attention_backward(
            *map(_rows, (grad, q, k, v)), _aligned(bias, q, k), _by_position(out), padded, seed, offset,
            drop.probability, [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        return grads[0], grads[1], grads[2]


class _CudaCudnn:
    """The kernel of cuDNN, which does not take a single key. Its log-sum-exp has one more dim."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, drop: Drop = KEEP
    ) -> tuple[Tensor, Tensor]:
        if k.shape[2] == 1:
            return _CudaEfficient().forward(q, k, v, bias, causal, scale)
        out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
            _rows(q), _rows(k), _rows(v), bias, True, 0.0, causal, False, scale=scale
        )
        return out, logsumexp.reshape(q.shape[:3])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None,
        causal: bool, scale: float, drop: Drop = KEEP,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if k.shape[2] == 1:
            return _CudaEfficient().backward(grad, q, k, v, out, logsumexp, bias, causal, scale)
        nothing = torch.zeros((), dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(
            *map(_rows, (grad, q, k, v, out)), logsumexp.unsqueeze(-1).contiguous(), nothing, nothing, bias, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip


class _Groups:
    """A kernel that wants as many heads of keys as of queries, called once for every query of a group."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, drop: Drop = KEEP
    ) -> tuple[Tensor, Tensor]:
        count = _group(q, k)
        made = [
            self.kernel.forward(q[:, i::count], k, v, _of_heads(bias, i, count), causal, scale, drop.of_member(i))
            for i in range(count)
        ]
        return _joined([out for out, _ in made]), _joined([logsumexp for _, logsumexp in made])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None,
        causal: bool, scale: float, drop: Drop = KEEP,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        count = _group(q, k)
        grads: list[Tensor] = []
        wide = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for i in range(count):
            upper, ours, result, total = (x[:, i::count] for x in (grad, q, out, logsumexp))
            of_bias = _of_heads(bias, i, count)
            given = upper, ours, k, v, result, total, of_bias, causal, scale, drop.of_member(i)
            of_q, of_k, of_v = self.kernel.backward(*given)
            grads.append(of_q)
            grad_k += of_k
            grad_v += of_v
        return _joined(grads), grad_k.to(k.dtype), grad_v.to(v.dtype)


_CUDA: dict[int, Kernel] = {
    SDPBackend.FLASH_ATTENTION.value: _CudaFlash(),
    SDPBackend.EFFICIENT_ATTENTION.value: _CudaEfficient(),
    SDPBackend.CUDNN_ATTENTION.value: _CudaCudnn(),
}


def _of_heads(bias: Tensor | None, first: int, step: int) -> Tensor | None:
    return bias if bias is None or bias.shape[1] == 1 else bias[:, first::step]


def _joined(parts: list[Tensor]) -> Tensor:
    """Heads of every query of a group, back in their order."""
    return torch.stack(parts, 2).flatten(1, 2)
