"""Operators split along the dim that they work along, over gloo, next to torch's own on whole tensors. For ranks.py."""

import itertools
import os

import torch
import torch.distributed as dist

from shardc.runtime import (
    DistributedMesh,
    Part,
    VirtualMesh,
    all_gather,
    all_reduce,
    all_reduce_bucket,
    all_to_all,
    convolution,
    flip,
    local_mesh,
    permute,
    reduce_scatter,
    reduce_scatter_bucket,
    reorder,
    roll,
    softmax,
    topk,
    wait,
)  # fmt: skip
from shardc.runtime.kernels.extremes import argmax
from shardc.runtime.kernels.scans import cummax
from shardc.runtime.kernels.windows import convolution_backward
from shardc.runtime.mesh.orders import dealt

aten = torch.ops.aten
mesh = local_mesh({"a": int(os.environ["WORLD_SIZE"])})
assert isinstance(mesh, DistributedMesh)
count = mesh.size
torch.manual_seed(0)


def same(body, operator, whole, dim, reduced=()):
    """`body(part, *own)` makes the parts along `dim` of what `operator(*whole)` makes, but for what is `reduced`."""

    def work():
        part = Part(("a",), whole[0].shape[dim])
        made = body(part, *(x.chunk(count, dim)[part.index] if x.dim() > dim else x for x in whole))
        return made if isinstance(made, (tuple, list)) else [made]

    right = operator(*whole)
    pairs = zip(mesh.run(work, lambda _: ())[0], right if isinstance(right, (tuple, list)) else [right], strict=True)
    for index, (one, other) in enumerate(pairs):
        if index in reduced:
            dist.all_reduce(one)
        elif one.shape != other.shape:
            other = other.chunk(count, dim)[mesh.rank]
        torch.testing.assert_close(one, other, equal_nan=True)


x = torch.randn(2, 3, 4 * count, 8, dtype=torch.float64)
odd = x.clone()
odd[0, 0, 5, 0] = float("nan")
same(lambda s, x: softmax(x, 2, False, s=s), lambda x: aten._softmax(x, 2, False), [x], 2)
same(lambda s, x: cummax(x, 2, s=s), lambda x: torch.cummax(x, 2), [odd], 2)
same(lambda d2, x: argmax(x, 2, d2=d2), lambda x: x.argmax(2), [odd], 2)
same(lambda s, x: topk(x, 2, 2, s=s), lambda x: torch.topk(x, 2, 2), [x], 2)
for dtype in (torch.float64, torch.bool, torch.int16):
    some = (4 * x).to(dtype)
    same(lambda d2, x: flip(x, [2], d2=d2), lambda x: x.flip(2), [some], 2)
    same(lambda d2, x: roll(x, [5], [2], d2=d2), lambda x: x.roll(5, 2), [some], 2)


def moved(collective, x, **told):
    return mesh.run(lambda: collective(x, axis="a", **told), lambda _: ())[0]


for dtype in (torch.float64, torch.bool, torch.int16):  # dims that are dealt out in other orders
    whole = (4 * torch.randn(2, 4 * count, 4 * count, dtype=torch.float64)).to(dtype)
    parts = {
        (dim, order): dealt(whole, dim, order, count, mesh.rank) for dim in (1, 2) for order in ("blocks", "folded")
    }
    for (dim, order), part in parts.items():
        other = "folded" if order == "blocks" else "blocks"
        assert torch.equal(moved(reorder, part, dim=dim, order=other), parts[dim, other]), (dim, order)
        told = {"split_dim": 3 - dim, "concat_dim": dim, "split_order": other, "concat_order": order}
        assert torch.equal(moved(all_to_all, part, **told), parts[3 - dim, other]), (dim, order)
        assert torch.equal(moved(all_gather, part, dim=dim, order=order), whole), (dim, order)

weight, more = torch.randn(2, 3, 3, 3, dtype=torch.float64), ([2, 1], [1, 1], [1, 1], False, [0, 0], 1)
same(
    lambda h0, x: convolution(x, weight, None, *more, h0=h0), lambda x: aten.convolution(x, weight, None, *more), [x], 2
)
grad = torch.randn(2, 2, 2 * count, 8, dtype=torch.float64)
same(
    lambda h0, grad, x: convolution_backward(grad, x, weight, [2], *more, [True] * 3, h0=h0),
    lambda grad, x: aten.convolution_backward(grad, x, weight, [2], *more, [True] * 3),
    [grad, x], 2, reduced=(1, 2),
)  # fmt: skip


def transported(where, width, dtype):
    """What a rank gets of each collective of a few numbers, or of many; two are awaited in the other order."""
    torch.manual_seed(1)
    given = (8 * torch.randn(count, 4 * count, width)).round().to(dtype)  # whose sums are exact in any order

    def work(x):
        kept = x.clone()
        whole, more = all_gather.start(x, dim=1, axis="a"), all_gather.start(x + 1, dim=0, axis="a")
        made = [wait(more), wait(whole), all_reduce(x, axis="a"), reduce_scatter(x, dim=0, axis="a", op="max")]
        made += all_reduce_bucket([x, x[0]], axis="a") + reduce_scatter_bucket([x, x.t()], dims=[0, 1], axis="a")
        made.append(permute(x, axis="a", sources=[(rank + 1) % count for rank in range(count)]))
        assert torch.equal(x, kept), "a collective wrote to its operand"
        return made

    return where.run(work, lambda rank: (given[rank],))


for width, dtype in itertools.product((1, 2**12 // count), (torch.int16, torch.int64, torch.bfloat16)):
    (found,) = transported(mesh, width, dtype)
    for one, other in zip(found, transported(VirtualMesh(mesh.axes), width, dtype)[mesh.rank], strict=True):
        assert torch.equal(one, other), (width, dtype)

print(f"rank {mesh.rank} is right", flush=True)
dist.destroy_process_group()
