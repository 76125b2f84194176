"""Sample calls of what networks are built of: norms, windows, pools, losses, bags of embeddings, attention, experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples.calls.sample import Sample, boolean, real, whole

aten = torch.ops.aten


def norms() -> Iterator[Sample]:
    layer = aten.native_layer_norm.default
    for x, weight in ((real(6, 2, 12), real(12)), (real(6, 12), None)):
        yield Sample(aten._fused_rms_norm.default, (x, [12], weight, 1e-5))
    yield Sample(layer, (real(6, 2, 12), [12], real(12), real(12), 1e-5))
    yield Sample(layer, (real(6, 12), [12], None, None, 1e-5))
    yield Sample(layer, (real(6, 12), [12], real(12), None, 1e-5))
    yield Sample(layer, (real(6, 2, 3), [2, 3], real(2, 3), real(2, 3), 1e-5))
    yield Sample(layer, (real(6), [6], real(6), real(6), 1e-5))
    for x, size, affine, mask in (
        (real(6, 2, 12), [12], 2, [True, True, True]),
        (real(6, 12), [12], 0, [True, False, False]),
        (real(6, 12), [12], 1, [True, True, False]),
        (real(6, 2, 3), [2, 3], 2, [False, True, True]),
        (real(6), [6], 2, [True, True, True]),
    ):
        weight, bias = (real(*size) if affine > 0 else None), (real(*size) if affine > 1 else None)
        _, mean, inverse = aten.native_layer_norm(x, size, weight, bias, 1e-5)
        arguments = (real(*x.shape), x, size, mean, inverse, weight, bias, mask)
        yield Sample(aten.native_layer_norm_backward.default, arguments, values=[i for i in range(3) if mask[i]])


def windows() -> Iterator[Sample]:
    for x, weight, bias, stride, padding, dilation, transposed, extra, groups in (
        (real(6, 2, 5, 5), real(6, 2, 3, 3), real(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        (real(2, 6, 7), real(12, 6, 3), None, [2], [0], [2], False, [0], 1),
        (real(6, 3, 4, 4), real(6, 3, 2, 2), real(6), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
        (real(2, 6, 4, 4), real(6, 1, 3, 3), real(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 6),
        (real(2, 6, 4, 4), real(12, 2, 3, 3), real(12), [1, 1], [1, 1], [1, 1], False, [0, 0], 3),
        (real(2, 6, 4, 4), real(6, 3, 3, 3), real(3), [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        (real(2, 6, 5), real(6, 1, 3), real(6), [1], [0], [1], True, [0], 6),
        (real(1, 1, 4, 4), real(6, 1, 2, 2), real(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        (real(6, 2, 3, 3, 3), real(2, 2, 1, 1, 1), None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1),
        (real(2, 6, 1, 4), real(12, 1, 1, 3), real(12), [1, 1], [0, 0], [1, 1], False, [0, 0], 6),
    ):
        more = (stride, padding, dilation, transposed, extra, groups)
        yield Sample(aten.convolution.default, (x, weight, bias, *more))
        out = real(*aten.convolution(x, weight, bias, *more).shape)
        sizes = [out.shape[1]] if bias is not None else None
        mask = [True, True, bias is not None]
        yield Sample(
            aten.convolution_backward.default, (out, x, weight, sizes, *more, mask), values=[0, 1, 2][: 2 + mask[2]]
        )
    x = real(2, 6, 4, 4)
    pooled, where = aten.max_pool2d_with_indices(x, [2, 2])
    yield Sample(aten.max_pool2d_with_indices.default, (x, [2, 2]))
    yield Sample(aten.max_pool2d_with_indices.default, (real(6, 4, 6), [3, 3], [1, 1], [1, 1]))
    yield Sample(
        aten.max_pool2d_with_indices_backward.default,
        (real(*pooled.shape), x, [2, 2], [2, 2], [0, 0], [1, 1], False, where),
    )
    yield Sample(aten.avg_pool2d.default, (x, [2, 2]))
    yield Sample(aten.avg_pool2d.default, (real(6, 4, 6), [4, 6]))
    yield Sample(aten.avg_pool2d_backward.default, (real(2, 6, 2, 2), x, [2, 2], [2, 2], [0, 0], False, True, None))
    yield Sample(aten._adaptive_avg_pool2d.default, (x, [2, 3]))
    yield Sample(aten._adaptive_avg_pool2d_backward.default, (real(2, 6, 2, 3), x))
    wide = real(2, 6, 8, 8)
    yield Sample(aten.upsample_nearest2d.vec, (x, None, [2.0, 2.0]))
    yield Sample(aten.upsample_nearest2d.default, (x, [8, 8]))
    yield Sample(aten.upsample_nearest2d_backward.default, (wide, [8, 8], [2, 6, 4, 4]))
    for operator in (
        aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa
    ):  # fmt: skip
        yield Sample(operator.vec, (x, [8, 6], False, None))
        yield Sample(operator.default, (x, [8, 6], False))
        backward = getattr(aten, f"{operator.__name__}_backward").default
        yield Sample(backward, (wide, [8, 8], [2, 6, 4, 4], False))
    yield from _upsamples()


def grids() -> Iterator[Sample]:
    for x, grid, forward, backward in (
        (real(2, 6, 3, 4), real(2, 3, 6, 2) / 2, aten.grid_sampler_2d, aten.grid_sampler_2d_backward),
        (real(2, 3, 2, 3, 4), real(2, 3, 1, 6, 3) / 2, aten.grid_sampler_3d, aten.grid_sampler_3d_backward),
    ):
        yield Sample(forward.default, (x, grid, 0, 1, True))
        made = forward(x, grid, 0, 0, False)
        yield Sample(backward.default, (real(*made.shape), x, grid, 0, 0, False, [True, True]))
        yield Sample(backward.default, (real(*made.shape), x, grid, 0, 0, False, [False, True]), values=[1])


def _upsamples() -> Iterator[Sample]:
    line, cube = real(2, 6, 4), real(2, 6, 2, 4, 4)
    wide_line, wide_cube = real(2, 6, 8), real(2, 6, 4, 8, 8)
    for kind in ("upsample_nearest", "_upsample_nearest_exact"):
        yield Sample(getattr(aten, f"{kind}1d").vec, (line, None, [2.0]))
        yield Sample(getattr(aten, f"{kind}1d").default, (line, [8]))
        yield Sample(getattr(aten, f"{kind}1d_backward").default, (wide_line, [8], [2, 6, 4]))
        yield Sample(getattr(aten, f"{kind}3d").vec, (cube, [4, 8, 8], None))
        yield Sample(getattr(aten, f"{kind}3d").default, (cube, [4, 8, 8]))
        yield Sample(getattr(aten, f"{kind}3d_backward").default, (wide_cube, [4, 8, 8], [2, 6, 2, 4, 4]))
    flat, wide = real(2, 6, 4, 4), real(2, 6, 8, 8)
    yield Sample(aten._upsample_nearest_exact2d.vec, (flat, None, [2.0, 2.0]))
    yield Sample(aten._upsample_nearest_exact2d.default, (flat, [8, 8]))
    yield Sample(aten._upsample_nearest_exact2d_backward.default, (wide, [8, 8], [2, 6, 4, 4]))
    yield Sample(aten.upsample_linear1d.vec, (line, [8], True, None))
    yield Sample(aten.upsample_linear1d.default, (line, [8], False))
    yield Sample(aten.upsample_linear1d_backward.default, (wide_line, [8], [2, 6, 4], False))
    yield Sample(aten.upsample_trilinear3d.vec, (cube, [4, 8, 8], False, None))
    yield Sample(aten.upsample_trilinear3d.default, (cube, [4, 8, 8], True))
    yield Sample(aten.upsample_trilinear3d_backward.default, (wide_cube, [4, 8, 8], [2, 6, 2, 4, 4], False))


def pools() -> Iterator[Sample]:
    flat, solid = real(2, 6, 4, 4), real(2, 6, 4, 4, 3)
    for x, target, backward, given in (
        (flat, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default, ([2, 3],)),
        (flat[0], aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default, ([2, 1],)),
        (solid, aten.adaptive_max_pool3d.default, aten.adaptive_max_pool3d_backward.default, ([2, 3, 1],)),
    ):
        yield Sample(target, (x, *given))
        made, where = target(x, *given)
        yield Sample(backward, (real(*made.shape), x, where))
    made, where = aten.max_pool3d_with_indices(solid, [2, 2, 2])
    yield Sample(aten.max_pool3d_with_indices.default, (solid, [2, 2, 2]))
    more = ([2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False, where)
    yield Sample(aten.max_pool3d_with_indices_backward.default, (real(*made.shape), solid, *more))
    back = (aten.fractional_max_pool2d_backward.default, aten.fractional_max_pool3d_backward.default)
    forward = (aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default)
    for x, spatial in ((flat, 2), (solid, 3), (flat[1], 2)):
        target, backward = forward[spatial - 2], back[spatial - 2]
        samples = torch.rand(*(x.shape[:2] if x.dim() == spatial + 2 else (1, 6)), spatial, dtype=torch.float64)
        size = [2, 2, 1][:spatial]
        yield Sample(target, (x, [2] * spatial, size, samples))
        made, where = target(x, [2] * spatial, size, samples)
        yield Sample(backward, (real(*made.shape), x, [2] * spatial, size, where))
    pooled, where = aten.max_pool2d_with_indices(flat, [2, 2])
    yield Sample(aten.max_unpool2d.default, (pooled, where, [4, 4]))
    pooled, where = aten.max_pool3d_with_indices(solid, [2, 2, 2])
    yield Sample(aten.max_unpool3d.default, (pooled, where, [4, 4, 3], [2, 2, 2], [0, 0, 0]))
    yield Sample(aten.avg_pool3d.default, (solid, [2, 2, 1]))
    more = ([2, 2, 1], [2, 2, 1], [0, 0, 0], False, True, None)
    yield Sample(aten.avg_pool3d_backward.default, (real(2, 6, 2, 2, 3), solid, *more))
    yield Sample(aten._adaptive_avg_pool3d.default, (solid, [2, 3, 1]))
    yield Sample(aten._adaptive_avg_pool3d_backward.default, (real(2, 6, 2, 3, 1), solid))


def margins() -> Iterator[Sample]:
    x, target = real(6, 4), torch.stack([torch.randperm(5)[:4] - 1 for _ in range(6)])
    for logits, wanted, reduction in ((x, target, 0), (x, target, 1), (x[0], target[0], 2)):
        yield Sample(aten.multilabel_margin_loss_forward.default, (logits, wanted, reduction))
        made, hits = aten.multilabel_margin_loss_forward(logits, wanted, reduction)
        arguments = (real(*made.shape), logits, wanted, reduction, hits)
        yield Sample(aten.multilabel_margin_loss_backward.default, arguments)


def bags() -> Iterator[Sample]:
    table, indices, offsets = real(6, 2), whole(6, 12), torch.tensor([0, 3, 7])
    for target in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
        yield Sample(target, (table, indices, offsets, True), values=[0])
    _, bag_of, sizes, won = aten._embedding_bag(table, indices, offsets, True)
    more = (6, True, 0, False, None, -1)
    yield Sample(aten._embedding_bag_backward.default, (real(3, 2), indices, offsets, bag_of, sizes, won, *more))


def attentions() -> Iterator[Sample]:
    forward, backward = torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default
    for batch, heads, rows, columns, inner, outer, mask, causal in (
        (2, 6, 6, 6, 4, 4, None, True),
        (6, 2, 3, 6, 4, 4, None, False),
        (2, 3, 6, 4, 4, 2, real(2, 1, 6, 4), False),
        (2, 6, 6, 4, 4, 4, boolean(6, 4), False),
        (6, 2, 6, 4, 4, 4, real(6, 2, 1, 4), False),
        (1, 6, 1, 4, 2, 2, None, False),
        (2, 2, 6, 6, 2, 2, real(1, 1, 6, 6), True),
    ):
        q, k, v = (
            real(batch, heads, rows, inner),
            real(batch, heads, columns, inner),
            real(batch, heads, columns, outer),
        )
        yield Sample(forward, (q, k, v, mask, None, None, causal, 0.5, 0, 0.0, 0.0))
        out, total = forward(q, k, v, mask, None, None, causal, 0.5, 0, 0.0, 0.0)
        yield Sample(backward, (real(*out.shape), q, k, v, mask, None, None, out, total, causal, 0.5, 0, 0.0, 0.0))


def whole_only() -> Iterator[Sample]:
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    low = torch.bfloat16
    yield Sample(aten._grouped_mm.default, (real(6, 128).to(low), real(2, 128, 16).to(low), offsets), tolerance=0.02)
    for left, right in (((2, 16, 128), (128, 8)), ((128, 8), (8, 128))):
        yield Sample(aten._grouped_mm.default, (real(*left).to(low), real(*right).to(low), offsets + 2), tolerance=0.02)
    yield Sample(aten.histc.default, (whole(6, 12).double(), 6, 0, 5))
    import transformers.integrations.moe  # noqa: F401  (defines the operators)

    fallback = torch.ops.transformers
    x, weight = real(6, 12), real(2, 12, 6)
    yield Sample(fallback.grouped_mm_fallback.default, (x, weight, offsets))
    yield Sample(fallback.grouped_mm_fallback_backward.default, (x, weight, offsets, real(6, 6)))


def mixtures() -> Iterator[Sample]:
    """Experts: with and without gates, biases and gradients of weights; 6 of 6, which is balanced, and 2 of 6."""
    forward, backward = torch.ops.shardc.experts.default, torch.ops.shardc.experts_backward.default
    gated = "mul(silu(gate), up)", "silu_backward(mul(grad, up), gate), mul(grad, silu(gate))"
    plain = "relu(up)", "threshold_backward(grad, up, 0)"
    for k, g, bias in ((6, 2, True), (2, 1, False), (2, 2, True)):
        x, scores, told = real(12, 4), real(12, k), gated if g == 2 else plain
        ids = torch.stack([real(6).argsort()[:k] for _ in range(12)])
        biases = (real(6, g, 6), real(6, 4)) if bias else (None, None)
        weights = real(6, g, 6, 4), biases[0], real(6, 4, 6), biases[1]
        yield Sample(forward, (x, ids, scores, *weights, *told))
        yield Sample(backward, (real(12, 4), x, ids, scores, *weights, *told, k == 6), {"capacity": 0.5})
