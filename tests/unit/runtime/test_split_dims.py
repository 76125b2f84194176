"""Bodies of operators along a split dim, where the dim does not divide: the padding holds nan, or what hurts most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shardc.runtime import Part, VirtualMesh
from shardc.runtime.kernels import exponentials, extremes, norms, scans

aten = torch.ops.aten
MESHES: list[dict[str, int]] = [{"a": 2}, {"a": 4}, {"a": 2, "b": 2}, {"a": 2, "b": 3}]
SIZES = (5, 7, 9)
HARM = (float("nan"), float("inf"), float("-inf"))


def piece(x: Tensor, dim: int, part: Part, harm: float) -> Tensor:
    """The running rank's part of the global `x`, padded with `harm`."""
    own = x.narrow(dim, min(part.start, x.shape[dim]), part.valid)
    shape = list(x.shape)
    shape[dim] = part.length - part.valid
    padding = torch.full(shape, harm, dtype=x.dtype) if x.is_floating_point() else torch.ones(shape, dtype=x.dtype)
    return torch.cat([own, padding], dim)


def check(size: int, dim: int, tensors: Sequence[Tensor], run: Callable[..., Any], expected: Any) -> None:
    """`run(part, *local)` on every rank; its results are whole, or parts of `expected` along `dim`."""
    whole = [expected] if isinstance(expected, Tensor) else list(expected)
    for axes in MESHES:
        part, mesh = Part(tuple(axes), size), VirtualMesh(axes)
        for harm in HARM:

            def work(part: Part = part, harm: float = harm) -> list[tuple[Tensor, Tensor]]:
                made = run(part, *(piece(x, dim, part, harm) if x.dim() > dim else x for x in tensors))
                made = [made] if isinstance(made, Tensor) else list(made)
                pairs: list[tuple[Tensor, Tensor]] = []
                for one, right in zip(made, whole, strict=True):
                    split = right.dim() > dim and right.shape[dim] == size
                    own, start = part.valid if split else None, min(part.start, size)
                    pairs.append(
                        (one, right) if own is None else (one.narrow(dim, 0, own), right.narrow(dim, start, own))
                    )
                return pairs

            for pairs in mesh.run(work, lambda _: ()):
                for one, right in pairs:
                    torch.testing.assert_close(one, right, equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
def test_softmax(size: int) -> None:
    x, grad = torch.randn(3, size, 2), torch.randn(3, size, 2)
    for body, operator in (
        (exponentials.softmax, aten._softmax), (exponentials.log_softmax, aten._log_softmax),
    ):  # fmt: skip
        check(size, 1, [x], lambda s, x, body=body: body(x, 1, False, s=s), operator(x, 1, False))
    check(size, 1, [x], lambda s, x: exponentials.safe_softmax(x, 1, s=s), aten._safe_softmax(x, 1))
    check(size, 1, [x], lambda d1, x: exponentials.logsumexp(x, [1], d1=d1), torch.logsumexp(x, 1))
    out = torch.softmax(x, 1)
    right = aten._softmax_backward_data(grad, out, 1, torch.float32)
    check(size, 1, [grad, out], lambda s, g, o: exponentials.softmax_backward(g, o, 1, torch.float32, s=s), right)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_extremes(size: int, dtype: torch.dtype) -> None:
    x = torch.randint(-3, 3, (3, size, 2)).to(dtype)
    for largest in (True, False):
        along, place = (
            (extremes.max_along, extremes.argmax) if largest else (extremes.min_along, extremes.argmin)
        )  # fmt: skip
        operator = torch.max if largest else torch.min
        check(size, 1, [x], lambda s, x, along=along: along(x, 1, s=s), operator(x, 1))
        check(size, 1, [x], lambda d1, x, place=place: place(x, 1, d1=d1), operator(x, 1)[1])
        flat = x.argmax() if largest else x.argmin()
        check(size, 1, [x], lambda d1, x, place=place: place(x, d1=d1), flat)
        distinct = torch.randperm(3 * size * 2).view(3, size, 2).to(dtype)
        best = torch.topk(distinct, 2, 1, largest)
        check(size, 1, [distinct], lambda s, x, largest=largest: extremes.topk(x, 2, 1, largest, s=s), best)


@pytest.mark.parametrize("size", SIZES)
def test_scans(size: int) -> None:
    x = torch.randn(3, size, 2)
    for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"):
        body, operator = getattr(scans, name), getattr(torch, name)
        check(size, 1, [x], lambda s, x, body=body: body(x, 1, s=s), operator(x, 1))


@pytest.mark.parametrize("size", SIZES)
def test_norms(size: int) -> None:
    x, weight = torch.randn(3, size), torch.randn(3, size)
    out = aten.native_layer_norm(x, [size], weight[0], None, 1e-5)
    check(size, 1, [x, weight], lambda d1, x, w: norms.layer_norm(x, [size], w[0], None, 1e-5, d1=d1), out)
    right = aten._fused_rms_norm(x, [size], weight[0], 1e-5)
    check(size, 1, [x, weight], lambda d1, x, w: norms.rms_norm(x, [size], w[0], 1e-5, d1=d1), right)
    grad, mask = torch.randn(3, size), [True, False, False]
    right = aten.native_layer_norm_backward(grad, x, [size], out[1], out[2], weight[0], None, mask)[0]

    def backward(d1: Part, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        made = norms.layer_norm_backward(grad, x, [size], out[1], out[2], weight[0], None, mask, d1=d1)[0]
        assert made is not None
        return made

    check(size, 1, [grad, x, weight], backward, right)
