"""Sample calls of operators that work along a dim which may be split, by a body of the runtime."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples.calls.attentions import attentions as attentions_of_many_kinds
from samples.calls.sample import Group, Sample, View, boolean, positive, real, whole

aten = torch.ops.aten
INFINITY = float("inf")


def _rare(x: Tensor) -> Tensor:
    """A row of nothing but -inf, one with inf and one with nan, in a tensor of at least three rows."""
    x = x.clone()
    x[0], x[1, 0], x[2, 1] = -INFINITY, INFINITY, float("nan")
    return x


def reductions() -> Iterator[Sample]:
    yield Sample(aten.logsumexp.default, (_rare(real(6, 12)), [1], True))
    yield Sample(aten.logsumexp.default, (real(6, 1, 12), [0, 1, -1]))
    yield Sample(aten.logsumexp.default, (whole(5, 6, 6), [0]), tolerance=1e-6)
    yield Sample(aten.logsumexp.default, (real(6, 6).to(torch.complex128), [0]))
    yield Sample(aten._safe_softmax.default, (_rare(real(6, 12))[[0, 1, 3, 4, 5, 0]], 1), tolerance=1e-6)
    yield Sample(aten._safe_softmax.default, (_rare(real(6, 12))[[0, 3]].float(), 1, torch.float64), tolerance=1e-6)
    for operator in (aten.max.dim, aten.min.dim):
        yield Sample(operator, (whole(3, 6, 12), 1))
        yield Sample(operator, (boolean(6, 12), 0))
        yield Sample(operator, (_rare(real(6, 12)), 1, True))
        yield Sample(operator, (_rare(real(6, 12)).half(), 0))
    for operator in (aten.argmax.default, aten.argmin.default):
        yield Sample(operator, (whole(3, 6, 1, 12), 2))
        yield Sample(operator, (whole(3, 6, 12),))
        yield Sample(operator, (_rare(real(6, 12)), None, True))
        yield Sample(operator, (torch.full((6, 12), -INFINITY),))
        yield Sample(operator, (_rare(real(6, 12)), 1))
    for operator in (aten.any.dims, aten.all.dims):
        yield Sample(operator, (boolean(6, 2, 12), [0, -1]))
        yield Sample(operator, (whole(2, 6, 12), None, True))
    for operator in (aten.any.dim, aten.all.dim):
        yield Sample(operator, (whole(3, 6, 12).to(torch.uint8), 1))
        yield Sample(operator, (_rare(real(6, 12)), 0))
    yield Sample(aten.topk.default, (real(2, 12), 6, 1, False))
    yield Sample(aten.topk.default, (torch.cat([real(6, 2), torch.full((6, 10), -INFINITY)], 1), 5), values=[0])
    yield Sample(aten.topk.default, (real(12, 2), 7, 0))
    yield Sample(aten.topk.default, (whole(2**40, 6, 12), 2))


def scans() -> Iterator[Sample]:
    for operator in (aten.cumsum.default, aten.cumprod.default):
        yield Sample(operator, (real(6, 12), 1))
        yield Sample(operator, (whole(4, 6, 2), 0))
        yield Sample(operator, (real(12, 2).bfloat16(), -2), tolerance=0.1)
        yield Sample(operator, (real(6, 12).float(), 0), {"dtype": torch.float64}, tolerance=1e-6)
    yield Sample(aten.logcumsumexp.default, (real(6, 12), -1))
    yield Sample(aten.logcumsumexp.default, (torch.full((6, 2), -INFINITY), 0))
    for operator in (aten.cummax.default, aten.cummin.default):
        yield Sample(operator, (_rare(real(6, 12)), 1))
        yield Sample(operator, (_rare(real(6, 12)), -2))
        yield Sample(operator, (whole(3, 6, 12), 1))


def norms() -> Iterator[Sample]:
    low = torch.bfloat16
    yield Sample(aten.native_layer_norm.default, (real(6, 12), [6, 12], real(6, 12), None, 1e-5))
    x, scale = real(6, 12).to(low), real(12).float()
    yield Sample(aten.native_layer_norm.default, (x, [12], scale, None, 1e-5), tolerance=0.02)
    yield Sample(aten.native_layer_norm.default, (real(6, 12).float(), [12], None, None, 1e-5), tolerance=1e-5)
    for weight in (None, real(2, 6)):
        yield Sample(aten._fused_rms_norm.default, (real(6, 2, 6), [2, 6], weight, None))
    yield Sample(aten._fused_rms_norm.default, (1e-4 * x, [12], scale.to(low), None), tolerance=0.02)
    for weight, mask in ((real(2, 6), [True, False, False]), (None, [True, False, False]), (real(2, 6), [True] * 3)):
        x = real(6, 2, 6)
        _, mean, inverse = aten.native_layer_norm(x, [2, 6], weight, weight, 1e-5)
        arguments = (real(6, 2, 6), x, [2, 6], mean, inverse, weight, weight, mask)
        yield Sample(aten.native_layer_norm_backward.default, arguments, values=[i for i in range(3) if mask[i]])


def softmaxes() -> Iterator[Sample]:
    yield Sample(aten._softmax.default, (real(6, 12).bfloat16(), 1, False), tolerance=0.02)
    for operator in (aten._softmax.default, aten._log_softmax.default):
        yield Sample(operator, (_rare(real(6, 12)), 1, False))
        yield Sample(operator, (1000 * real(12, 2, 1), -3, False))
    yield Sample(aten._log_softmax_backward_data.default, (real(12, 2), positive(12, 2), 0, torch.float64))


def moves() -> Iterator[Sample]:
    for dtype in (torch.float64, torch.bool, torch.int64):
        x = (real(6, 12, 2) > 0).to(dtype)
        yield Sample(aten.slice.Tensor, (x, 1, 3, 11))
        yield Sample(aten.slice.Tensor, (x, 1, 1, 12, 4))
        yield Sample(aten.select.int, (x, 0, 4))
        yield Sample(aten.unbind.int, (x, 2))
        yield Sample(aten.split.Tensor, (x, 4, 0))
        yield Sample(aten.cat.default, ([x, x, (real(6, 1, 2) > 0).to(dtype)], 1))
        yield Sample(aten.stack.default, ([x, x, x], 1))
        yield Sample(aten.constant_pad_nd.default, (x, [0, 0, 1, 3, -1, 2], 1))
        yield Sample(aten.triu.default, (x[:, :, 1], 2))
    yield Sample(aten.slice_backward.default, (real(6, 3, 2), [6, 12, 2], 1, 2, 11, 3))
    yield Sample(aten.slice_backward.default, (real(6, 6), [6, 12], 1, 5, 11, 1))
    yield Sample(aten.select_backward.default, (real(6, 2), [12, 6, 2], 0, -3))
    yield Sample(aten.cat.default, ([real(6, 6).float(), real(6, 2)], 1), tolerance=1e-5)
    yield Sample(aten.cat.default, ([real(2, 2)] * 5, 0))
    yield Sample(aten.constant_pad_nd.default, (real(6, 12), [2, -3, 0, 6], 0.0))
    yield Sample(aten.tril.default, (real(2, 6, 12), -1))
    for given in ((2,), (-3, 1, 0), (12,)):
        yield Sample(aten.diagonal.default, (real(6, 12), *given))
    yield Sample(aten.diagonal_backward.default, (real(2, 5), [6, 2, 12], -1, 0, 2))
    yield Sample(aten.diagonal_backward.default, (real(2, 4), [6, 2, 12], 8, -3, -1))
    yield Sample(aten.flip.default, (real(6, 2, 12), [0, -1]))
    for by, dims in (([5], [1]), ([-7, 1], [1, 0]), ([0], [0]), ([6], [0]), ([25], [-1])):
        yield Sample(aten.roll.default, (real(6, 12), by, dims))


def factories() -> Iterator[Sample]:
    for operator in (aten.eye.m,):
        yield Sample(operator, (6, 12), {"dtype": torch.int64})
        yield Sample(operator, (1, 12))
    yield Sample(aten.arange.start_step, (12, 0, -1), {"dtype": torch.float32})
    yield Sample(aten.arange.default, (12,), {"device": "cpu"})
    yield Sample(aten.linspace.default, (2.0, -1.0, 12))


def views() -> Iterator[Sample]:
    yield Sample(aten.view.default, (View(real(6, 4, 9, 2), aten.view.default, ([6, 6, 6, 2],)), [6, 9, 4, 2]))


def convolutions() -> Iterator[Sample]:
    for x, weight, bias, stride, padding, dilation, transposed, extra, groups in (
        (real(2, 3, 12, 6), real(4, 3, 3, 3), real(4), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        (real(2, 3, 12, 12), real(2, 3, 7, 3), None, [2, 2], [3, 1], [1, 1], False, [0, 0], 1),
        (real(2, 3, 24), real(2, 3, 3), real(2), [2], [2], [2], False, [0], 1),
        (real(2, 2, 12), real(2, 2, 1), None, [3], [0], [1], False, [0], 1),
        (real(2, 2, 12), real(2, 2, 3), real(2), [4], [1], [1], False, [0], 1),
        (real(2, 6, 8, 1), real(6, 1, 5, 1), real(6), [1], [2, 0], [1], False, [0], 6),
        (real(2, 6, 6), real(12, 3, 3), real(12), [1], [1], [1], False, [0], 2),
        (real(2, 12, 6), real(6, 2, 3), None, [1], [1], [1], False, [0], 6),
        (real(2, 6, 4, 6), real(6, 2, 4, 4), real(12), [2, 2], [1, 1], [1, 1], True, [0, 0], 6),
        (real(2, 3, 6, 6), real(3, 2, 3, 2), real(2), [2, 2], [1, 0], [1, 1], True, [1, 0], 1),
        (real(2, 2, 6), real(2, 4, 1), None, [2], [0], [1], True, [1], 1),
        (real(2, 2, 4, 4, 6), real(2, 2, 3, 3, 3), None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1),
    ):
        more = (stride, padding, dilation, transposed, extra, groups)
        yield Sample(aten.convolution.default, (x, weight, bias, *more))
        out = real(*aten.convolution(x, weight, bias, *more).shape)
        sizes = [out.shape[1]] if bias is not None else None
        for mask in ([True, True, bias is not None], [True, False, False], [False, True, False]):
            arguments = (out, x, weight, sizes, *more, mask)
            yield Sample(aten.convolution_backward.default, arguments, values=[i for i in range(3) if mask[i]])


def _pools(rank: int) -> Iterator[tuple[list[int], list[int], list[int], list[int]]]:
    """Sizes, kernel, stride and padding."""
    shape, more = [8, 12, 4][:rank], [1, 0][: rank - 1]
    yield shape, [2] * rank, [], [0]
    yield shape, [3] * rank, [2], [1]
    yield shape, [3, *([1] * (rank - 1))], [1], [1, *([0] * (rank - 1))]
    yield [9, *shape[1:]], [2] * rank, [3, *([2] * (rank - 1))], [1, *more]


def pools() -> Iterator[Sample]:
    for rank, most, average in (
        (2, aten.max_pool2d_with_indices, aten.avg_pool2d), (3, aten.max_pool3d_with_indices, aten.avg_pool3d),
    ):  # fmt: skip
        most_back = getattr(aten, f"max_pool{rank}d_with_indices_backward").default
        average_back = getattr(aten, f"avg_pool{rank}d_backward").default
        for shape, kernel, stride, padding in _pools(rank):
            for ceil in (False, True):
                x = real(2, 3, *shape)
                x[0] = -INFINITY
                yield Sample(most.default, (x, kernel, stride, padding, [1], ceil))
                out, where = most(x, kernel, stride, padding, [1], ceil)
                arguments = (real(*out.shape), x, kernel, stride, padding, [1], ceil, where)
                yield Sample(most_back, arguments)
                x = real(2, 3, *shape)
                for padded, divisor in ((True, None), (False, None), (False, 5)):
                    given = (kernel, stride, padding, ceil, padded, divisor)
                    yield Sample(average.default, (x, *given))
                    yield Sample(average_back, (real(*average(x, *given).shape), x, *given))
    yield Sample(aten.max_pool2d_with_indices.default, (real(3, 12, 8), [3, 2], [3, 2], [1, 0], [2, 1]))
    yield Sample(aten.avg_pool2d.default, (real(3, 12, 8).bfloat16(), [2, 2]), tolerance=0.02)


def attentions() -> Iterator[Sample]:
    forward, backward = torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default
    blind = boolean(6, 8)
    blind[2] = False
    blind[:, :4] = False  # half of the keys is seen by nobody
    for rows, columns, mask, causal, low in (
        (6, 8, blind, False, False),
        (6, 8, blind, True, False),
        (8, 6, None, True, False),
        (6, 6, real(6, 1), True, False),
        (6, 6, None, True, True),
    ):
        dtype, tolerance = (torch.bfloat16, 0.05) if low else (torch.float64, 1e-9)
        q, k, v = (real(1, 2, n, 2).to(dtype) for n in (rows, columns, columns))
        yield Sample(forward, (q, k, v, mask, None, None, causal, 0.5, 0, 0.0, 0.0), tolerance=tolerance)
        if not low:
            out, total = forward(q, k, v, mask, None, None, causal, 0.5, 0, 0.0, 0.0)
            yield Sample(backward, (real(*out.shape), q, k, v, mask, None, None, out, total, causal, 0.5, 0, 0.0, 0.0))


PARTED: tuple[Group, ...] = (
    reductions, scans, norms, softmaxes, moves, factories, views, convolutions, pools, attentions,
    attentions_of_many_kinds,
)  # fmt: skip
