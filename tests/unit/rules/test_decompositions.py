"""Every decomposition against the operator of torch that it replaces, in double and in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from checks.brute_force import Call
from samples.calls.matrices import decomposed
from samples.calls.sample import Sample, boolean, positive, real, whole
from shardc.ir.facts import Captured, describe
from shardc.ir.program import value_of
from shardc.passes.normalize import normalized
from shardc.rules.factors.factoring import VIEWS
from shardc.rules.notation import maker_of
from shardc.rules.rewrites.borrowed import body_of
from shardc.rules.rewrites.builder import Builder, Values
from shardc.rules.rewrites.decompositions import DECOMPOSITIONS
from shardc.runtime import VirtualMesh

aten = torch.ops.aten


def statistics() -> Iterator[Sample]:
    x = real(6, 2, 3)
    for dims, keep in (([1], False), ([-1, 0], True), ([], False), (None, True)):
        yield Sample(aten.mean.dim, (x, dims, keep))
        yield Sample(aten.var.correction, (x, dims), {"correction": 0, "keepdim": keep})
        yield Sample(aten.std.correction, (x, dims), {"keepdim": keep})
        yield Sample(aten.var_mean.correction, (x, dims), {"correction": 1, "keepdim": keep})
    yield Sample(aten.mean.default, (x,))
    yield Sample(aten.mean.default, (real(),))
    yield Sample(aten.mean.default, (whole(9, 6, 2),), {"dtype": torch.float64})
    yield Sample(aten.mean.dim, (torch.full((4096,), 60000.0, dtype=torch.float16), [0]))
    yield Sample(aten.mean.dim, (x.float(), [0]), {"dtype": torch.float64}, tolerance=1e-6)
    for order in (2, 1, 0, 3, float("inf"), float("-inf")):
        yield Sample(aten.linalg_vector_norm.default, (x, order, [1], True))
    yield Sample(aten.linalg_vector_norm.default, (x,))
    yield Sample(aten.norm.ScalarOpt_dim, (x, None, [1]))
    yield Sample(aten.glu.default, (x, 1))
    yield Sample(aten.glu_backward.default, (real(6, 1, 3), x, -2))
    yield Sample(aten.log_sigmoid_forward.default, (x * 20,))
    for mask in (boolean(6, 2, 3), boolean(6)):
        yield Sample(aten.index_put.default, (x, [mask], real()))
    yield Sample(aten.index_put.default, (x, [boolean(6, 2)], real(1), True))


def constants() -> Iterator[Sample]:
    x = real(6, 2)
    for operator in (aten.new_zeros.default, aten.new_ones.default):
        yield Sample(operator, (x, [3]), {"dtype": torch.int64})
    yield Sample(aten.new_full.default, (whole(5, 6), [3, 1], 7))
    yield Sample(aten.new_empty.default, (x, []), values=[])
    yield Sample(aten.new_empty_strided.default, (x, [6, 12], [1, 6]), values=[])
    for operator in (aten.zeros_like.default, aten.ones_like.default):
        yield Sample(operator, (x,), {"dtype": torch.bool})
    yield Sample(aten.full_like.default, (x, 2.5))
    yield Sample(aten.empty_like.default, (x,), values=[])


def blocks() -> Iterator[Sample]:
    for given in ((1, 0, 6), (-1, 6, 12), (1, 3, 6), (1, 2, 8), (1, 0, 6, 2), (1, 5, 6)):
        yield Sample(aten.slice.Tensor, (real(6, 12), *given))
    yield Sample(aten.slice_backward.default, (real(6, 6), [6, 12], -1, 6, 12, 1))
    yield Sample(aten.slice_backward.default, (real(6, 5), [6, 12], 1, 6, 11, 1))
    for size in (4, 5):
        yield Sample(aten.split.Tensor, (real(6, 12), size, -1))
    yield Sample(aten.split_with_sizes.default, (real(6, 12, 2), [4, 4, 4], 1))
    yield Sample(aten.split_with_sizes.default, (real(6, 12), [2, 10], 1))
    yield Sample(aten.cat.default, ([real(6, 3), real(6, 3)], -1))
    yield Sample(aten.cat.default, ([real(6, 3), real(2, 3)],))
    yield Sample(aten.repeat.default, (real(6, 2), [3, 1, 2]))
    yield Sample(aten.repeat.default, (real(6, 1), [2, 3]))
    for rank in (2, 3):
        pool, back = (getattr(aten, f"_adaptive_avg_pool{rank}d{end}").default for end in ("", "_backward"))
        for size in ([1, 1], [2, 3], [3, 4]):
            x = real(2, 3, *[6] * (rank - 2), 6, 6)
            out = [*[6] * (rank - 2), *size] if size != [1, 1] else [1] * rank
            yield Sample(pool, (x, out))
            yield Sample(back, (real(2, 3, *out), x))


def dropout() -> Iterator[Sample]:
    for probability, train in ((0.3, True), (0.0, True), (1.0, True), (0.5, False), (0.5, None)):
        yield Sample(aten.native_dropout.default, (real(6, 12), probability, train))


def draws() -> Iterator[Sample]:
    x, chances = real(6, 20), positive(6, 2) / 2
    for factory in (aten.rand.default, aten.randn.default):
        yield Sample(factory, ([6, 20],), {"dtype": torch.float32})
        yield Sample(factory, ([],), {"dtype": torch.float64})
    yield Sample(aten.randint.default, (7, [6, 2]))
    yield Sample(aten.randint.low, (-7, 7, [6, 2]), {"dtype": torch.float64})
    yield Sample(aten.rand_like.default, (x.t(),))
    yield Sample(aten.randn_like.default, (x,), {"dtype": torch.bfloat16})
    yield Sample(aten.randint_like.default, (x, 9))
    yield Sample(aten.randint_like.low_dtype, (x, 2, 9), {"dtype": torch.int32})
    for method in (
        aten.uniform.default, aten.normal_functional.default, aten.exponential.default, aten.cauchy.default,
        aten.log_normal.default, aten.random.default,
    ):  # fmt: skip
        yield Sample(method, (x,))
    yield Sample(aten.geometric.default, (x, 0.3))
    yield Sample(aten.random.to, (x, 9))
    yield Sample(getattr(aten.random, "from"), (x, 4, 9))
    yield Sample(aten.uniform.default, (x, -1.0, 3.0))
    yield Sample(aten.normal.float_float, (1.0, 2.0, [6, 20]), {"dtype": torch.float64})
    yield Sample(aten.normal.Tensor_float, (x, 2.0))
    yield Sample(aten.normal.float_Tensor, (1.0, chances))
    yield Sample(aten.normal.Tensor_Tensor, (real(6, 2), chances))
    yield Sample(aten.bernoulli.default, (chances,))
    yield Sample(aten.bernoulli.default, (chances.float(),))
    yield Sample(aten.bernoulli.p, (x, 0.3))
    yield Sample(aten.bernoulli.Tensor, (real(6, 2), chances))
    yield Sample(aten.multinomial.default, (chances, 2))
    yield Sample(aten.poisson.default, (chances,))
    yield Sample(aten.binomial.default, (whole(9, 6, 2).double(), chances))
    yield Sample(aten._standard_gamma.default, (chances,))
    yield Sample(aten._sample_dirichlet.default, (chances,))
    yield Sample(aten.randperm.default, (6,))
    for like in (real(2, 3), real(2, 3).bfloat16()):
        yield Sample(torch.ops.shardc.attention_draw.default, (like, [2, 3, 5, 7]))
    for training in (True, False):
        yield Sample(aten.rrelu_with_noise_functional.default, (x, torch.zeros_like(x), 0.1, 0.3, training))
        arguments = (real(6, 20), x, positive(6, 20), 0.1, 0.3, training, False)
        yield Sample(aten.rrelu_with_noise_backward.default, arguments)


def bags() -> Iterator[Sample]:
    table, indices, weights, zeros = real(12, 6), whole(12, 12), positive(12), torch.zeros(0, dtype=torch.int64)
    forward, backward = aten._embedding_bag.default, aten._embedding_bag_backward.default
    for offsets, count, last in (
        (torch.arange(0, 12, 4), 3, False),
        (torch.tensor([0, 3, 3, 7]), 4, False),
        (torch.tensor([0, 5, 12]), 2, True),
    ):
        settings = ((0, -1, None), (0, 2, weights), (1, -1, None), (1, 3, None), (2, -1, None), (2, 3, None))
        for mode, padding, weighed in settings:
            arguments = (table, indices, offsets, False, mode, False, weighed, last, padding)
            yield Sample(forward, arguments, values=[0])
            yield Sample(aten._embedding_bag_forward_only.default, arguments, values=[0])
            _, bag_of, sizes, won = forward(*arguments)
            more = (12, False, mode, False, weighed, padding)
            yield Sample(backward, (real(count, 6), indices, offsets, bag_of, sizes, won, *more))
        arguments = (real(count, 6), table, indices, offsets, zeros, 0, 3)
        yield Sample(aten._embedding_bag_per_sample_weights_backward.default, arguments)


def memory() -> Iterator[Sample]:
    x = real(6, 4)
    for size, stride, offset in (
        ([6, 4], [4, 1], 0), ([4, 6], [1, 4], None), ([3, 2, 4], [8, 4, 1], 0), ([3, 2], [4, 1], 1),
        ([5, 4], [3, 1], 2), ([2, 2, 1], [0, 3, 9], 4), ([], [], 7),
    ):  # fmt: skip
        yield Sample(aten.as_strided.default, (x, size, stride, offset))
        if size != [5, 4] and size != [2, 2, 1]:  # what overlaps has no one value to put
            yield Sample(aten.as_strided_scatter.default, (x, real(*size), size, stride, offset))
    yield Sample(aten.slice_scatter.default, (real(6, 12), real(6, 4), -1, 2, 6))
    yield Sample(aten.slice_scatter.default, (real(6, 12), real(1, 12), 0, -1, 9223372036854775807))
    yield Sample(aten.slice_scatter.default, (real(6, 12), real(6, 4), 1, 1, 11, 3))
    yield Sample(aten.slice_scatter.default, (real(6, 12), real(6, 12), 1))
    yield Sample(aten.slice_scatter.default, (real(6, 12), real(6, 0), 1, 3, 2))
    yield Sample(aten.select_scatter.default, (real(6, 12, 2), real(6, 2), -2, -3))
    yield Sample(aten.diagonal_scatter.default, (real(6, 2, 6), real(2, 5), 1, 0, -1))
    yield Sample(aten.diagonal_scatter.default, (whole(9, 6, 4), whole(9, 4), -2))
    for size in (real(6, 1, 1), real(6, 1, 1).abs()):
        yield Sample(aten._weight_norm_interface.default, (real(6, 2, 3), size, 0))
    yield Sample(aten._weight_norm_interface.default, (real(6, 2, 3), real(1, 1, 3), 2))
    v, g = real(6, 2), positive(6, 1)
    norms = aten._weight_norm_interface(v, g, 0)[1]
    yield Sample(aten._weight_norm_interface_backward.default, (real(6, 2), v, g, norms, 0))
    yield Sample(aten.repeat_interleave.Tensor, (torch.tensor([2, 0, 1, 3]),), {"output_size": 6})


def embeddings() -> Iterator[Sample]:
    for padding in (-1, 3, 0):
        yield Sample(aten.embedding_dense_backward.default, (real(6, 2, 3), whole(12, 6, 2), 12, padding, False))
    yield Sample(aten.embedding_dense_backward.default, (real(6, 2), whole(3, 6), 12, 2, True))


def norms() -> Iterator[Sample]:
    for shape, dtype in (((6, 2, 3, 2), torch.float64), ((6, 3), torch.float64), ((6, 2, 3), torch.bfloat16)):
        x, grad = real(*shape).to(dtype), real(*shape).to(dtype)
        running = torch.float32 if dtype is torch.bfloat16 else dtype
        mean, var = real(shape[1]).to(running), positive(shape[1]).to(running)
        weight, bias = real(shape[1]).to(running), real(shape[1]).to(running)
        close = 2e-2 if dtype is torch.bfloat16 else 1e-9
        functional = aten._native_batch_norm_legit_functional.default
        for affine in ((weight, bias), (None, None)):
            if dtype is torch.bfloat16 and affine[0] is None:
                continue
            for training in (True, False):
                made = functional(x, *affine, mean, var, training, 0.1, 1e-5)
                # torch's shape function gives saved statistics of half-precision inputs another type than the kernel
                defined = None if dtype is torch.float64 else [0, 3, 4]
                yield Sample(functional, (x, *affine, mean, var, training, 0.1, 1e-5), tolerance=close, values=defined)
                arguments = (grad, x, affine[0], mean, var, *made[1:3], training, 1e-5)
                mask = [True, affine[0] is not None, affine[0] is not None]
                yield Sample(
                    aten.native_batch_norm_backward.default, (*arguments, mask), tolerance=close,
                    values=[0, 1, 2] if mask[1] else [0],
                )  # fmt: skip
            yield Sample(
                aten._native_batch_norm_legit_no_training.default, (x, *affine, mean, var, 0.1, 1e-5), tolerance=close,
                values=None if dtype is torch.float64 else [0],
            )  # fmt: skip
    x, weight, bias = real(2, 6, 3, 2), real(6), real(6)
    for affine in ((weight, bias), (None, None)):
        out = aten.native_group_norm(x, *affine, 2, 6, 6, 3, 1e-5)
        yield Sample(aten.native_group_norm.default, (x, *affine, 2, 6, 6, 3, 1e-5))
        mask = [True, affine[0] is not None, affine[0] is not None]
        yield Sample(
            aten.native_group_norm_backward.default,
            (real(2, 6, 3, 2), x, out[1], out[2], affine[0], 2, 6, 6, 3, mask),
            values=[0, 1, 2] if mask[1] else [0],
        )


def losses() -> Iterator[Sample]:
    x, y, p, w = real(6, 2), real(6, 2), positive(6, 2) / 2, positive(2)
    hits = boolean(6, 2).double()
    sure = torch.tensor([[0.0, 1.0]] * 6, dtype=torch.float64)
    for reduction in (0, 1, 2):
        grad = real(6, 2) if reduction == 0 else real()
        for forward, backward, more in (
            (aten.mse_loss.default, aten.mse_loss_backward.default, ()),
            (aten.smooth_l1_loss.default, aten.smooth_l1_loss_backward.default, (0.7,)),
            (aten.huber_loss.default, aten.huber_loss_backward.default, (0.7,)),
        ):
            yield Sample(forward, (x, y, reduction, *more))
            yield Sample(backward, (grad, x, y, reduction, *more))
        for probability in (p, sure):
            yield Sample(aten.binary_cross_entropy.default, (probability, hits, w, reduction))
            arguments = (grad, probability, hits, None, reduction)
            yield Sample(
                aten.binary_cross_entropy_backward.default, arguments, tolerance=1e-8
            )  # torch's 1e-12 is single
        yield Sample(aten.binary_cross_entropy_with_logits.default, (x * 50, hits, w, positive(2), reduction))
        yield Sample(aten.binary_cross_entropy_with_logits.default, (x, hits, None, None, reduction))
        yield from _likelihoods(reduction)


def _likelihoods(reduction: int) -> Iterator[Sample]:
    one, two = (aten.nll_loss_forward.default, aten.nll_loss_backward.default), (
        aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default,
    )  # fmt: skip
    target = torch.tensor([0, 3, 5, 3, 1, 2])
    plain, infinite = real(6, 6).log_softmax(1), real(6, 6).log_softmax(1)
    infinite[1, 3] = infinite[1, 0] = float("-inf")  # ignored below, and so is what stands in its place
    for (forward, backward), x, wanted, weight in (
        (one, plain, target, None),
        (one, infinite, target, None),
        (one, plain, target, positive(6)),
        (one, plain, torch.full((6,), 3), None),
        (one, real(6), torch.tensor(4), None),
        (one, real(6), torch.tensor(3), positive(6)),
        (two, real(2, 6, 2, 3), whole(6, 2, 2, 3), positive(6)),
        (two, real(2, 6, 2, 3), whole(6, 2, 2, 3), None),
    ):
        total, count = forward(x, wanted, weight, reduction, 3)
        yield Sample(forward, (x, wanted, weight, reduction, 3), values=[0, 1] if reduction else [0])
        grad = torch.randn_like(total)
        yield Sample(backward, (grad, x, wanted, weight, reduction, 3, count))


def spellings() -> Iterator[Sample]:
    x, batch = real(6, 4), (real(3, 6, 2), real(3, 2, 4))
    for operator in (aten.max.default, aten.min.default, aten.prod.default):
        yield Sample(operator, (x,))
    yield Sample(aten.prod.default, (x.float(),), {"dtype": torch.float64}, tolerance=1e-6)
    yield Sample(aten.addbmm.default, (x, *batch))
    yield Sample(aten.addbmm.default, (x, *batch), {"beta": 0.5, "alpha": 2})
    yield Sample(aten.addbmm.default, (torch.full_like(x, float("nan")), *batch), {"beta": 0})
    yield Sample(aten._trilinear.default, (real(6, 3), real(2, 3, 4), real(6, 4), [1, 3], [0], [1, 2], [2, 3]))
    yield Sample(aten._trilinear.default, (real(6, 3), real(6, 3), real(6, 3), [], [], [], []))
    yield Sample(aten.put.default, (x, torch.tensor([[3], [20]]), real(2, 1)))
    yield Sample(aten.put.default, (x, torch.tensor([3, 3, -1]), real(3), True))
    for operator in (aten.as_strided.default, aten.as_strided_copy.default):
        yield Sample(operator, (x, [3, 2], [4, 3], 5))
        yield Sample(operator, (x, [3, 4], [1, 1]))
        yield Sample(operator, (x, [], [], 7))
    yield Sample(aten.as_strided_scatter.default, (x, real(3, 2), [3, 2], [4, 3], 5))
    for dims, keep in (([1], False), (None, True)):
        yield Sample(aten.std_mean.correction, (x, dims), {"correction": 0, "keepdim": keep})
    channels = (real(4), real(4), real(4), positive(4))
    with_update = aten._batch_norm_with_update_functional.default
    made = with_update(real(6, 4, 2), *channels, 0.1, 1e-5)
    yield Sample(with_update, (real(6, 4, 2), *channels, 0.1, 1e-5), values=[0, 1, 2, 4, 5])
    arguments = (real(6, 4, 2), real(6, 4, 2), *channels[1:], *made[1:3], True, 1e-5, [True] * 3, made[3])
    yield Sample(aten.batch_norm_backward.default, arguments)
    for matrices in (real(4, 4), real(2, 3, 4, 4), real(3, 1, 1), real(2, 4, 4).transpose(1, 2)):
        yield Sample(aten._linalg_det.default, (matrices,))
        yield Sample(aten._linalg_slogdet.default, (matrices,))
    yield Sample(aten._native_batch_norm_legit.no_stats, (real(6, 4, 2), real(4), real(4), True, 0.1, 1e-5))


def borrowed() -> Iterator[Sample]:
    """Some of those that torch brings: several results, numbers in the body, no tensors, bodies within bodies."""
    x = real(6, 4)
    yield Sample(aten.addr.default, (x, real(6), real(4)))
    yield Sample(aten.aminmax.default, (x,), {"dim": 1})
    yield Sample(aten.dist.default, (x, real(4), 3.0))
    yield Sample(aten.linspace.default, (0, 1, 5), {"dtype": torch.float64})
    yield Sample(aten.trace.default, (x,))
    yield Sample(aten._prelu_kernel.default, (x, real(4)))
    yield Sample(aten.renorm.default, (x, 2.0, 0, 1.5))
    yield Sample(aten.diag_embed.default, (x,))
    yield Sample(aten.rot90.default, (x, 3, [0, 1]))
    yield Sample(aten.pixel_shuffle.default, (real(2, 8, 3, 3), 2))
    yield Sample(aten.index_fill.int_Scalar, (x, 1, torch.tensor([2, 0]), 7.0))
    yield Sample(aten.count_nonzero.default, (x.relu(),))
    yield Sample(aten.unsafe_split.Tensor, (x, 4))
    yield Sample(aten.take.default, (x, torch.tensor([[3, 20]])))


GROUPS = (
    statistics, blocks, constants, dropout, draws, bags, memory, embeddings, norms, losses, spellings, borrowed,
    decomposed,
)  # fmt: skip
SAMPLES = [sample for group in GROUPS for sample in group()]


def test_fused_operators_are_never_taken_apart() -> None:
    """Their backward reads what only the fused forward gives."""
    x = torch.ones(2, 2, 4, 4, requires_grad=True)
    graph, mode = fx.Graph(), FakeTensorMode()
    given = graph.placeholder("x")
    describe(given, Captured(mode.from_tensor(x)))
    for target, args in (
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (given, given, given)),
        (aten.native_dropout.default, (given, 0.5, True)),
        (aten.native_batch_norm.default, (given, None, None, None, None, True, 0.1, 1e-5)),
    ):
        node = graph.call_function(target, args)
        describe(node, Captured(target(*fx.map_arg(args, value_of))))
        assert body_of(node) is None


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: str(s.target))
def test_equals_the_operator(sample: Sample) -> None:
    torch.manual_seed(7)
    call = Call(sample, factored=False)
    torch.manual_seed(7)
    expected = sample.target(*sample.args, **sample.kwargs)
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    graph = normalized(call.program).graph
    torch.manual_seed(7)
    inputs = [call.whole[node] for node in graph.nodes if node.op == "placeholder"]
    module = fx.GraphModule(torch.nn.Module(), graph)
    made = VirtualMesh({"a": 1}).run(module, lambda _: tuple(inputs), random=True)[0]
    assert len(made) == len([e for e in expected if isinstance(e, Tensor)]) or sample.values is not None
    for index, (one, other) in enumerate(zip(made, expected, strict=False)):
        if sample.values is None or index in sample.values:
            assert one.dtype == other.dtype and one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=sample.tolerance, atol=sample.tolerance, equal_nan=True)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: str(s.target))
def test_leads_to_operators_with_rules(sample: Sample) -> None:
    call = Call(sample, factored=False)
    for node in normalized(call.program).graph.nodes:
        if node.op == "call_function" and node.target not in VIEWS and "getitem" not in node.name:
            assert maker_of(node.target) is not None, node.target


def test_rms_norm_backward() -> None:
    """The CPU has no kernel for this one, so the truth is autograd."""
    x, weight, grad = real(6, 2, 3).requires_grad_(), real(2, 3).requires_grad_(), real(6, 2, 3)
    inverse = (x.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt()
    expected = torch.autograd.grad(x * inverse * weight, (x, weight), grad)
    operator = aten._fused_rms_norm_backward.default
    arguments = [t.detach() for t in (grad, x, inverse, weight)]
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = [graph.placeholder(name) for name in ("grad", "x", "inverse", "weight")]
    for node, tensor in zip(nodes, arguments, strict=True):
        describe(node, Captured(mode.from_tensor(tensor)))
    node = graph.call_function(operator, (nodes[0], nodes[1], [2, 3], nodes[2], nodes[3], [True, True]))
    graph.output(DECOMPOSITIONS[operator](builder_before(graph, node), *node.args))
    graph.erase_node(node)
    made = fx.GraphModule(torch.nn.Module(), graph)(*arguments)
    torch.testing.assert_close(made, expected)


def builder_before(graph: fx.Graph, node: fx.Node) -> Builder:
    graph.inserting_before(node)
    return Builder(graph, node, Values())


def test_every_decomposition_has_a_sample() -> None:
    sampled = {s.target for s in SAMPLES} | {aten._fused_rms_norm_backward.default}
    assert [str(o) for o in DECOMPOSITIONS if o not in sampled] == []
