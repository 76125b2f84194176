"""The virtual mesh and the collectives against what one device computes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from shardc.runtime import (
    Part,
    RankError,
    VirtualMesh,
    all_gather,
    all_reduce,
    all_to_all,
    current,
    draw,
    drop_dummy,
    load,
    pad_dummy,
    permute,
    rebase,
    reduce_scatter,
    shard,
    to_partial,
    wait,
)

MESHES = [{"a": 2}, {"a": 3}, {"a": 2, "b": 2}]
FOLD = {"sum": torch.sum, "prod": torch.prod, "max": torch.amax, "min": torch.amin}


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
    return VirtualMesh(request.param)


def groups(mesh, axis):
    """Rank → the ranks of its group on the axis, in order."""
    where = [mesh.coordinates(rank) for rank in range(mesh.size)]
    drop = [{k: v for k, v in c.items() if k != axis} for c in where]
    return [[other for other in range(mesh.size) if drop[other] == drop[rank]] for rank in range(mesh.size)]


def test_coordinates_are_row_major():
    mesh = VirtualMesh({"a": 2, "b": 3})
    assert [tuple(mesh.coordinates(rank).values()) for rank in mesh.ranks] == list(
        itertools.product(range(2), range(3))
    )


def each(mesh, function, values, **options):
    """`function` on every rank, with its own of the values."""
    return mesh.run(lambda x: function(x, **options), lambda rank: (values[rank],))


def test_a_collective_that_was_started_gives_what_a_call_gives():
    mesh = VirtualMesh({"a": 2, "b": 2})
    values = [torch.randn(4, 6) for _ in mesh.ranks]
    calls = {
        all_reduce: {"op": "max"}, all_gather: {"dim": 1}, reduce_scatter: {"dim": 1},
        all_to_all: {"split_dim": 1, "concat_dim": 0}, permute: {"sources": [1, 0]},
    }  # fmt: skip

    def both(x):
        started = [call.start(x, axis="b", **told) for call, told in calls.items()]
        return [wait(one) for one in started], [call(x, axis="b", **told) for call, told in calls.items()]

    for ours, theirs in each(mesh, both, values):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert all_gather.__name__ == "all_gather" and "side by side" in str(all_gather.__doc__)
    alone = VirtualMesh({"a": 1})
    assert torch.equal(each(alone, lambda x: wait(all_reduce.start(x, axis="a")), values)[0], values[0])


@pytest.mark.parametrize("axis_at", [0, 1])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_reduce_and_exchange(mesh, axis_at, dim):
    axis, n = list(mesh.axes.items())[axis_at % len(mesh.axes)]
    values = [torch.randn(6, 12, 6, dtype=torch.float64) for _ in mesh.ranks]
    members = groups(mesh, axis)
    gathered = each(mesh, all_gather, values, dim=dim, axis=axis)
    for rank, result in enumerate(gathered):
        assert torch.equal(result, torch.cat([values[m] for m in members[rank]], dim)) and result.is_contiguous()
    for op, fold in FOLD.items():
        whole = each(mesh, all_reduce, values, axis=axis, op=op)
        parts = each(mesh, reduce_scatter, values, dim=dim, axis=axis, op=op)
        back = each(mesh, all_reduce, each(mesh, to_partial, whole, axis=axis, op=op), axis=axis, op=op)
        for rank in mesh.ranks:
            expected = fold(torch.stack([values[m] for m in members[rank]]), 0)
            torch.testing.assert_close(whole[rank], expected)
            torch.testing.assert_close(parts[rank], expected.chunk(n, dim)[mesh.coordinates(rank)[axis]])
            assert parts[rank].is_contiguous() and torch.equal(back[rank], whole[rank])
    turned = each(mesh, permute, values, axis=axis, sources=[*range(1, n), 0])
    for rank in mesh.ranks:
        assert torch.equal(turned[rank], values[members[rank][(mesh.coordinates(rank)[axis] + 1) % n]])
    for other in {0, 1, 2} - {dim}:
        moved = each(mesh, all_to_all, values, split_dim=dim, concat_dim=other, axis=axis)
        for rank in mesh.ranks:
            full = torch.cat([values[m] for m in members[rank]], other)
            assert torch.equal(moved[rank], full.chunk(n, dim)[mesh.coordinates(rank)[axis]])


def test_traffic_is_counted_as_documented():
    mesh = VirtualMesh({"a": 3, "b": 2})
    x = torch.zeros(6, 4)
    size = 6 * 4 * 4

    def program():
        all_gather(x, dim=0, axis="a")
        reduce_scatter(x, dim=0, axis="a")
        all_to_all(x, split_dim=0, concat_dim=1, axis="a")
        permute(x, axis="a", sources=[1, 2, 0])
        all_reduce(x, axis="b")
        shard(x, dim=0, axis="b")

    mesh.run(program, lambda _: ())
    assert mesh.traffic == {"a": 3 * size + 2 * (2 / 3 * size), "b": size}
    mesh.reset()
    assert mesh.traffic == {"a": 0, "b": 0}


def test_failing_rank_ends_the_run_at_once():
    module = load(
        "from shardc.runtime import all_reduce, current\n"
        "def forward(x):\n"
        "    h = x / (1 if current().rank == 1 else x.shape[0])\n"
        "    h = h.view(7 if current().rank == 1 else -1)  # the culprit, model.py:3\n"
        "    return all_reduce(h, axis='a')  # model.py:4\n"
    )
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 \(a=1\) failed") as caught:
        VirtualMesh({"a": 3}).run(module.forward, lambda _: (torch.ones(4),))
    assert caught.value.rank == 1 and "# the culprit, model.py:3" in str(caught.value)
    assert time.monotonic() - begin < 5


def test_failures_in_collectives_name_axis_and_line():
    module = load(
        "from shardc.runtime import all_gather, all_reduce, current, reduce_scatter\n"
        "def uneven(x):\n"
        "    y = reduce_scatter(x, dim=0, axis='a')  # uneven\n"
        "def alone(x):\n"
        "    if current().rank == 0: all_reduce(x, axis='a')  # alone\n"
        "def different(x):\n"
        "    all_reduce(x[: 2 + current().rank], axis='a')  # different\n"
    )
    mesh = VirtualMesh({"a": 2})
    for name, words in (("uneven", "evenly"), ("alone", "never started"), ("different", "disagree")):
        with pytest.raises(RankError, match=words) as caught:
            mesh.run(getattr(module, name), lambda _: (torch.ones(5),))
        assert f"# {name}" in str(caught.value)
    assert caught.value.axis == "a"
    assert mesh.run(lambda: all_reduce(torch.ones(2), axis="a").sum().item(), lambda _: ()) == [4.0, 4.0]
    with pytest.raises(RankError, match="no rank is running"):
        current()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_dropout_draws_what_eager_draws(mesh, dtype, permuted):
    x = torch.randn(6, 35, 4).to(dtype)
    x = x.permute(2, 0, 1) if permuted else x
    torch.manual_seed(5)
    torch.rand(3)
    start = torch.get_rng_state()
    expected = torch.nn.functional.dropout(x, 0.3)
    end = torch.get_rng_state()
    torch.set_rng_state(start)

    def program():
        mask = draw(x.shape, "bernoulli", 0.7, dtype=dtype, strides=x.stride())
        return x * mask * (1 / 0.7) if dtype == torch.bfloat16 else x * mask / 0.7

    for result in mesh.run(program, lambda _: (), random=True):
        torch.testing.assert_close(result, expected)
        assert torch.equal(result != 0, expected != 0)
    assert torch.equal(torch.get_rng_state(), end)
    with pytest.raises(RankError, match="RANDOM"):
        mesh.run(program, lambda _: ())


def test_split_embedding_through_dummy_row():
    mesh = VirtualMesh({"a": 2, "b": 2})
    table, indices = torch.randn(12, 3), torch.tensor([0, 11, 5, 3, 2, 7])

    def program(local, given=indices, wrap=False):
        rows = pad_dummy(local, dim=0)[rebase(given, part=Part(("b", "a"), 12), wrap=wrap)]
        return all_reduce(all_reduce(rows, axis="a"), axis="b")

    def part(rank):
        at = mesh.coordinates(rank)
        return (table[3 * (2 * at["b"] + at["a"]) :][:3],)

    for result in mesh.run(program, part):
        assert torch.equal(result, table[indices])
    for result in mesh.run(program, lambda rank: (*part(rank), indices - 12, True)):
        assert torch.equal(result, table[indices])
    for wrong, wrap in ((12, False), (-1, False), (12, True), (-13, True)):
        with pytest.raises(RankError, match="index out of range: the dim has 12 elements"):
            mesh.run(program, lambda rank, w=wrong, f=wrap: (*part(rank), torch.tensor([0, w]), f))
    assert torch.equal(drop_dummy(pad_dummy(table, dim=1), dim=1), table)
