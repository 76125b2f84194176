"""Sample calls of operators on plain tensors: products, reductions, shapes, indices, factories and random draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples.calls.sample import Sample, View, boolean, positive, real, whole
from shardc.runtime.kernels import random
from shardc.runtime.kernels.parts import addend_of_microbatch, part_of_microbatch

aten = torch.ops.aten


def contraction() -> Iterator[Sample]:
    x = real(6, 6)
    yield Sample(aten.mm.default, (real(6, 12), real(12, 2)))
    yield Sample(aten.mm.default, (real(1, 6), real(6, 3)))
    yield Sample(aten.mm.default, (x, x))
    yield Sample(aten.mm.default, (x, View(x, aten.permute.default, ([1, 0],))))
    yield Sample(aten.mm.default, (View(real(2, 6, 3), aten.view.default, ([12, 3],)), real(3, 6)))
    yield Sample(aten.bmm.default, (real(6, 2, 3), real(6, 3, 12)))
    yield Sample(aten.dot.default, (real(6), real(6)))
    yield Sample(aten.mv.default, (real(6, 12), real(12)))
    yield Sample(aten.addmm.default, (real(6), real(12, 3), real(3, 6)))
    yield Sample(aten.addmm.default, (real(12, 1), real(12, 3), real(3, 6)))
    yield Sample(aten.addmm.default, (real(12, 6), real(12, 3), real(3, 6)), {"beta": 0.5, "alpha": 2})
    yield Sample(aten.addmm.default, (real(1), real(12, 3), real(3, 6)))
    yield Sample(aten.baddbmm.default, (real(6, 1, 3), real(6, 2, 6), real(6, 6, 3)))
    yield Sample(aten.baddbmm.default, (real(2, 3), real(6, 2, 6), real(6, 6, 3)), {"beta": 2.0})


def microbatches() -> Iterator[Sample]:
    for dim, turn in ((0, (1, 2)), (1, (2, 3)), (-1, (0, 2))):
        yield Sample(part_of_microbatch, (real(6, 12, 2),), {"dim": dim % 3, "count": turn[1]}, turn=turn)
    for turn in ((0, 2), (1, 2)):
        yield Sample(addend_of_microbatch, (real(6, 12),), turn=turn)


def reductions() -> Iterator[Sample]:
    for dims, keep in (([0], False), ([1, -1], True), ([], False), (None, False), ([-2], False)):
        yield Sample(aten.sum.dim_IntList, (real(6, 2, 12), dims, keep))
    yield Sample(aten.sum.dim_IntList, (real(), []))
    yield Sample(aten.sum.dim_IntList, (whole(9, 6, 3), [0]))
    yield Sample(aten.sum.dim_IntList, (boolean(6, 3), [0]))
    yield Sample(aten.sum.dim_IntList, (real(1, 6), [0]))
    yield Sample(aten.sum.dim_IntList, (real(6, 6), [0], False), {"dtype": torch.float32}, tolerance=1e-5)
    yield Sample(aten.sum.dim_IntList, (View(real(6, 1), aten.expand.default, ([6, 12],)), [1]))
    yield Sample(aten.sum.default, (real(6, 2),))
    for operator in (aten.amax.default, aten.amin.default):
        yield Sample(operator, (real(6, 12), [1], True))
        yield Sample(operator, (real(6, 1, 3), [-1, 0]))
        yield Sample(operator, (real(6, 3), []))
    yield Sample(aten.prod.dim_int, (real(6, 12), -1))
    yield Sample(aten.argmax.default, (real(6, 12), -1, True))
    yield Sample(aten.argmax.default, (real(6, 2),))
    yield Sample(aten.argmin.default, (real(6, 12), 0))
    for operator in (aten.any.dim, aten.all.dim):
        yield Sample(operator, (boolean(6, 12), 1, True))
    for operator in (aten.any.default, aten.all.default):
        yield Sample(operator, (boolean(6, 2),))
        for truth in (torch.zeros, torch.ones):  # what padding holds decides neither
            yield Sample(operator, (truth(5, 7).bool(),))
    for operator in (aten.max.dim, aten.min.dim):
        yield Sample(operator, (real(6, 12), -1))
        yield Sample(operator, (real(6, 12), 0, True))
    for operator in (aten._softmax.default, aten._log_softmax.default):
        yield Sample(operator, (real(6, 12), -1, False))
    yield Sample(aten._softmax.default, (real(6, 2, 3), 0, False))
    yield Sample(aten._safe_softmax.default, (real(6, 12), -1))
    yield Sample(aten.cumsum.default, (real(6, 12), -1))
    yield Sample(aten.cumsum.default, (whole(5, 6, 2), 0), {"dtype": torch.int32})
    for operator in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default):
        yield Sample(operator, (real(6, 12), positive(6, 12), 1, torch.float64))
    yield Sample(aten.cumsum.default, (boolean(6, 2), 0))
    yield Sample(aten.cumprod.default, (real(6, 2), 0))
    yield Sample(aten.logcumsumexp.default, (real(6, 2), 1))
    for operator in (aten.cummax.default, aten.cummin.default):
        yield Sample(operator, (real(6, 2), 0))
    yield Sample(aten.logsumexp.default, (real(6, 2, 12), [0, -1]))
    yield Sample(aten.logsumexp.default, (real(6, 2), [1], True))
    yield Sample(aten.sort.default, (real(6, 12),))
    yield Sample(aten.sort.default, (real(6, 12), 0, True))
    yield Sample(aten.sort.stable, (whole(3, 6, 2),), {"stable": True, "dim": 0, "descending": False})
    yield Sample(aten.sort.stable, (real(6, 12),), {"stable": False})
    yield Sample(aten.topk.default, (real(6, 12), 3))
    yield Sample(aten.topk.default, (real(6, 12), 1, 0))


def shapes() -> Iterator[Sample]:
    for given in ((0, 1, 5), (1, -4, None), (-1, 0, 12, 2), (1, 2, 3), (0, 0, 6), (1, 0, 9223372036854775807)):
        yield Sample(aten.slice.Tensor, (real(6, 12, 12), *given))
    yield Sample(aten.slice_backward.default, (real(6, 4), [6, 12], 1, 2, 6, 1))
    yield Sample(aten.slice_backward.default, (real(6, 1), [6, 12], -1, 2, 3, 1))
    yield Sample(aten.slice_backward.default, (real(6, 12), [6, 12], 1, 0, 12, 1))
    yield Sample(aten.select.int, (real(6, 12, 2), -2, -1))
    yield Sample(aten.select_backward.default, (real(6, 2), [6, 12, 2], 1, 3))
    yield Sample(aten.select_backward.default, (real(6, 2), [6, 2, 1], -1, 0))
    yield Sample(aten.cat.default, ([real(6, 2), real(6, 12), real(6, 1)], -1))
    yield Sample(aten.cat.default, ([real(6, 6), real(6, 6)],))
    x = real(6, 6)
    yield Sample(aten.cat.default, ([x, x, real(0)], 1))
    yield Sample(aten.cat.default, ([real(6, 1), real(6, 1)], 0))
    yield Sample(aten.split.Tensor, (real(6, 12), 5, -1))
    yield Sample(aten.split.Tensor, (real(6, 12), 2))
    yield Sample(aten.split_with_sizes.default, (real(6, 12), [1, 5, 6], 1))
    yield Sample(aten.unbind.int, (real(6, 3, 2), 1))
    yield Sample(aten.stack.default, ([real(6, 2), real(6, 2)], -1))
    yield Sample(aten.stack.default, ([x, x], 0))
    yield Sample(aten.stack.default, ([real(6)], 0))
    yield Sample(torch.ops.shardc.retile.default, (real(6, 12), [0]))
    yield Sample(torch.ops.shardc.checked.default, (real(6, 12, 12), whole(1, 6).int(), "linalg.inv", False))
    yield Sample(torch.ops.shardc.confirmed.default, (real(6, 12), torch.tensor(True), "it is"))
    yield Sample(torch.ops.shardc.checked.default, (real(6, 12), torch.tensor(0).int(), "linalg.inv", True))
    yield Sample(aten.constant_pad_nd.default, (real(6, 12), [1, 2]))
    yield Sample(aten.constant_pad_nd.default, (real(6, 12), [0, -1, 0, 0], 0.0))
    yield Sample(aten.constant_pad_nd.default, (real(6, 12, 2), [1, 0, 0, 2], 3.0))
    yield Sample(aten.constant_pad_nd.default, (whole(5, 6, 1), [0, 5], -100))
    yield Sample(aten.flip.default, (real(6, 12), [1]))
    yield Sample(aten.roll.default, (real(6, 12), [2], [-1]))
    yield Sample(aten.roll.default, (real(6, 2), [2]))
    yield Sample(aten.tril.default, (real(6, 2, 12),))
    yield Sample(aten.triu.default, (real(6, 12), -1))
    yield Sample(aten.view.default, (View(real(6, 4, 9), aten.view.default, ([6, 6, 6],)), [6, 9, 4]))
    yield Sample(aten.repeat.default, (real(6, 2), [3, 1, 2]))
    yield Sample(aten.diagonal.default, (real(6, 6, 2),))
    yield Sample(aten.unfold.default, (real(6, 12), -1, 3, 2))
    yield Sample(aten.unfold_backward.default, (real(6, 5, 3), [6, 12], -1, 3, 2))
    yield Sample(aten.diagonal_backward.default, (real(2, 6), [6, 6, 2], 0, 0, 1))


def indices() -> Iterator[Sample]:
    yield Sample(aten.embedding.default, (real(12, 6), whole(12, 2, 3)))
    yield Sample(aten.embedding.default, (real(12, 1), whole(12, 6), 0))
    yield Sample(aten.embedding.default, (real(12, 2), whole(12)))
    yield Sample(aten.embedding.default, (real(1, 6), whole(1, 6)))
    yield Sample(aten.embedding_dense_backward.default, (real(2, 6, 6), whole(12, 2, 6), 12, -1, False))
    yield Sample(aten.embedding_dense_backward.default, (real(6, 2), whole(12, 6), 12, 3, False))
    yield Sample(aten.embedding_dense_backward.default, (real(6, 2), whole(12, 6), 12, -1, True))
    yield Sample(aten.gather.default, (real(6, 12), 1, whole(12, 6, 2)))
    yield Sample(aten.gather.default, (real(6, 12), -1, whole(12, 4, 6)))
    yield Sample(aten.gather.default, (real(6, 12), 0, whole(6, 1, 12)))
    yield Sample(aten.gather.default, (boolean(6, 12), 0, whole(6, 6, 12)))
    yield Sample(aten.gather.default, (real(6), 0, whole(6)))
    yield Sample(aten.gather.default, (real(6), 0, whole(6, 6)))
    yield Sample(aten.scatter_add.default, (real(6, 12), 1, whole(12, 6, 3), real(6, 3)))
    yield Sample(aten.scatter_add.default, (real(6, 12), -1, whole(12, 4, 6), real(4, 6)))
    yield Sample(aten.scatter_add.default, (real(6, 12), 1, whole(12, 6, 3), real(6, 6)))
    yield Sample(aten.scatter_add.default, (real(12), 0, whole(12, 1), real(1)))
    yield Sample(
        aten.scatter.src, (real(6, 12), 1, torch.stack([torch.randperm(12)[:6] for _ in range(6)]), real(6, 6))
    )
    yield Sample(aten.scatter.src, (real(6, 12), 0, whole(6, 1, 12), real(1, 12)))
    yield Sample(aten.scatter.src, (real(6, 12), 0, whole(6, 2, 12), real(2, 12)))
    yield Sample(aten.scatter.value, (real(6, 12), 1, whole(12, 6, 3), 2.5))
    yield Sample(aten.index_select.default, (real(6, 12, 2), 1, whole(12, 6)))
    yield Sample(aten.index_select.default, (real(6, 12), -1, whole(12, 1)))
    yield Sample(aten.linalg_lu_factor_ex.default, (real(6, 2, 4, 3),))
    lengths, bounds = torch.tensor([[4, 2]] * 6), torch.tensor([0, 4, 4, 6])
    rows, table = real(6, 6, 2), real(6, 12)
    yield Sample(aten.segment_reduce.default, (rows, "sum"), {"lengths": lengths, "axis": 1})
    yield Sample(aten.segment_reduce.default, (table, "mean"), {"offsets": bounds})
    backward = aten._segment_reduce_backward.default
    yield Sample(backward, (real(6, 2, 2), real(6, 2, 2), rows, "sum"), {"lengths": lengths, "axis": 1})
    yield Sample(backward, (real(3, 12), real(3, 12), table, "mean"), {"offsets": bounds})
    yield Sample(aten.index_select.default, (real(), 0, whole(1, 1)))
    yield Sample(aten.index_select.default, (real(), 0, whole(1)))
    yield Sample(aten.index_add.default, (real(), 0, whole(1, 1), real()))
    yield Sample(aten.index_copy.default, (real(), 0, whole(1, 1), real()))
    yield Sample(aten.index_add.default, (real(6, 12), 0, whole(6, 6), real(6, 12)))
    yield Sample(aten.index_add.default, (real(6, 12), -1, whole(12, 3), real(6, 3)), {"alpha": 2})
    one, other = whole(6, 6, low=-6), whole(12, 6, low=-12)
    for operator in (aten.index.Tensor, aten._unsafe_index.Tensor):
        yield Sample(operator, (real(6, 12), [one]))
        yield Sample(operator, (real(6, 12), [None, whole(12, 2, 3, low=-12)]))
    yield Sample(aten.index.Tensor, (real(6, 12, 2), [one, other]))
    yield Sample(aten.index.Tensor, (real(6, 2, 12), [one, None, other]))
    yield Sample(aten.index.Tensor, (real(3, 6, 12), [None, whole(6, 2, 1), whole(12, 6)]))
    yield Sample(aten.index.Tensor, (boolean(6, 12), [whole(6)]))
    yield Sample(aten.index.Tensor, (real(6, 12), [whole(6, 1)]))
    yield Sample(aten.index.Tensor, (boolean(6, 12), [whole(6, 6, 1), whole(12, 2)]))
    for accumulate in (True, False):
        unique = torch.tensor([0, -1, 2, -3, 4, 1])
        yield Sample(aten.index_put.default, (real(12, 6), [unique], real(6, 6), accumulate))
        yield Sample(aten.index_put.default, (real(12, 6), [unique], real(6), accumulate))
        yield Sample(aten.index_put.default, (real(12, 6), [None, unique], real(), accumulate))
        yield Sample(aten.index_put.default, (real(12, 6), [unique, unique], real(6), accumulate))
        yield Sample(aten.index_put.default, (real(6, 12, 6), [unique, None, unique], real(6, 12), accumulate))
    yield Sample(aten.index_put.default, (real(12, 6), [whole(12, 6, low=-12)], real(6, 6), True))
    yield Sample(aten.index_put.default, (real(6, 2), [boolean(6, 2)], real()))
    yield Sample(aten.scatter_reduce.two, (real(6, 12), 1, whole(12, 6, 3), real(6, 3), "amax"))
    yield Sample(aten.index_copy.default, (real(6, 12), 1, torch.tensor([3, 0, 7]), real(6, 3)))


def factories() -> Iterator[Sample]:
    for operator in (aten.zeros.default, aten.ones.default):
        yield Sample(operator, ([6, 1, 2],), {"dtype": torch.float64, "device": "cpu"})
    yield Sample(aten.full.default, ([6, 12], 2.5), {"dtype": torch.float64})
    yield Sample(aten.full.default, ([], 2), {"dtype": torch.int64})
    yield Sample(aten.empty.memory_format, ([6, 2],), {"dtype": torch.float64}, values=[])
    for operator in (aten.new_zeros.default, aten.new_ones.default):
        yield Sample(operator, (real(6, 2), [2, 6]))
        yield Sample(operator, (real(6, 2), []), {"dtype": torch.int64})
    yield Sample(aten.new_full.default, (real(6, 2), [6, 1], 1.5))
    yield Sample(aten.new_empty.default, (real(6, 2), [6, 12]), values=[])
    yield Sample(aten.arange.default, (6,))
    yield Sample(aten.arange.start, (2, 14), {"dtype": torch.float64})
    yield Sample(aten.arange.start_step, (0, 12, 2))
    yield Sample(aten.scalar_tensor.default, (2.5,), {"dtype": torch.float64})
    yield Sample(aten.linspace.default, (0.0, 1.0, 6), {"dtype": torch.float64})
    yield Sample(aten.eye.default, (6,), {"dtype": torch.float64})
    yield Sample(aten.eye.m, (6, 3), {"dtype": torch.float64})


def draws() -> Iterator[Sample]:
    yield Sample(random.draw, ([6, 2], "bernoulli", 0.5), {"dtype": torch.float64})
    yield Sample(random.draw, ([6, 1, 12], "normal", 0.0, 1.0), {"dtype": torch.float64, "strides": [1, 1, 6]})
    yield Sample(random.draw, ([5, 7], "uniform", 0.0, 1.0), {"dtype": torch.float32})
    yield Sample(random.bernoulli_state, ([2, 3, 5, 7],), {"dtype": torch.float64})
    state = torch.Generator().manual_seed(5).get_state()
    yield Sample(random.bernoulli, (state, [6, 4], 0.5), {"dtype": torch.bool, "drawn": torch.float64})
    yield Sample(random.bernoulli, (state, [6, 1, 12], 0.3), {"dtype": torch.float64, "strides": [1, 1, 6]})
    yield Sample(random.fresh_seed, ())
    seed, own = torch.arange(8, dtype=torch.uint8), list[int]()  # which numbers, depends on the split
    yield Sample(random.draw_from, (seed, [6, 10], "normal", 0.0, 1.0), {"dtype": torch.float64}, own)
    yield Sample(random.randperm, (6,), {"dtype": torch.int64})
    yield Sample(random.multinomial, (positive(6, 12), 3), {"strides": [1, 6]})
    yield Sample(random.multinomial, (positive(12), 2), {"strides": [1]})
    yield Sample(random.multinomial, (positive(5, 4).float(), 7), {"strides": [4, 1]})
    for function in (random.poisson, random.standard_gamma, random.sample_dirichlet):
        yield Sample(function, (positive(6, 2),), {"strides": [1, 6]})
    yield Sample(random.binomial, (whole(9, 6, 2).double(), torch.full((6, 2), 0.3).double()), {"strides": [2, 1]})
    yield Sample(random.rrelu, (real(6, 2), 0.1, 0.3), {"strides": [2, 1]})
