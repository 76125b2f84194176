"""Every collective by itself: what its transports move, and what it tells the planner about itself."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardc.cost.collectives import ALGORITHMS
from shardc.errors import ShardcError
from shardc.runtime import VirtualMesh, collectives
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.all_reduce_bucket import all_reduce_bucket
from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.all_to_all_rows import all_to_all_rows
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import AnyCollective, Collective, Held
from shardc.runtime.collectives.permute import permute
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.collectives.reduce_scatter_bucket import reduce_scatter_bucket
from shardc.runtime.collectives.reorder import reorder
from shardc.runtime.collectives.shard import shard
from shardc.runtime.collectives.to_partial import to_partial

RANKS = (1, 2, 3)


def every() -> dict[str, AnyCollective]:
    """All collectives that generated code may call, by name."""
    modules = [f"{collectives.__name__}.{one.name}" for one in pkgutil.iter_modules(collectives.__path__)]
    named = [getattr(module, name) for module in map(importlib.import_module, modules) for name in module.__all__]
    return {one.name: one for one in named if isinstance(one, Collective)}


def operand(rank: int, *shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) * (rank + 1) + rank


def operands(ways: int, *shape: int) -> list[Tensor]:
    return [operand(rank, *shape) for rank in range(ways)]


def padded_to(x: Tensor, dim: int, size: int) -> Tensor:
    missing = list(x.shape)
    missing[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(missing)], dim)


def chunk(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    return x.narrow(dim, rank * size, size)


Told = dict[str, Any]
Formula = Callable[[list[Tensor], int, Told], Tensor]


def gathered(given: list[Tensor], rank: int, told: Told) -> Tensor:
    whole = torch.cat(given, told["dim"])
    return whole.narrow(told["dim"], 0, told.get("size", whole.shape[told["dim"]]))


def scattered(given: list[Tensor], rank: int, told: Told) -> Tensor:
    dim = told["dim"]
    size = told.get("chunk", given[0].shape[dim] // len(given))
    total = sum(given) if told.get("op", "sum") == "sum" else torch.stack(given).amax(0)
    return chunk(padded_to(total, dim, size * len(given)), dim, rank, size)  # type: ignore[arg-type]


def reduced(given: list[Tensor], rank: int, told: Told) -> Tensor:
    fold = {"sum": torch.sum, "prod": torch.prod, "max": torch.amax, "min": torch.amin}[told.get("op", "sum")]
    return fold(torch.stack(given), 0)


def exchanged(given: list[Tensor], rank: int, told: Told) -> Tensor:
    dim, to = told["split_dim"], told["concat_dim"]
    size = told.get("chunk", given[0].shape[dim] // len(given))
    whole = torch.cat([chunk(padded_to(x, dim, size * len(given)), dim, rank, size) for x in given], to)
    return whole.narrow(to, 0, told.get("size", whole.shape[to]))


def permuted(given: list[Tensor], rank: int, told: Told) -> Tensor:
    return given[told["sources"][rank]]


def sharded(given: list[Tensor], rank: int, told: Told) -> Tensor:
    size = told.get("chunk", given[rank].shape[told["dim"]] // len(given))
    return chunk(padded_to(given[rank], told["dim"], size * len(given)), told["dim"], rank, size)


def folded(given: list[Tensor], rank: int, told: Told) -> Tensor:
    pieces = torch.cat(given, told["dim"]).chunk(2 * len(given), told["dim"])
    return torch.cat([pieces[rank], pieces[-1 - rank]], told["dim"])


def as_partial(given: list[Tensor], rank: int, told: Told) -> Tensor:
    if rank == 0 or told["op"] in ("max", "min"):
        return given[rank]
    return torch.full_like(given[rank], 0.0 if told["op"] == "sum" else 1.0)


def uneven(ways: int, size: int) -> int:
    """The chunk of a dim of so many elements."""
    return -(-size // ways)


# Collective, formula, shape of the operand, keywords by the number of ranks.
CALLS: list[tuple[AnyCollective, Formula, tuple[int, ...], Callable[[int], Told]]] = [
    (all_gather, gathered, (4, 3), lambda n: {"dim": 0}),
    (all_gather, gathered, (4, 3), lambda n: {"dim": 1}),
    (all_gather, gathered, (4, 3), lambda n: {"dim": 1, "size": 3 * n - (n > 1)}),
    (reduce_scatter, scattered, (6, 12), lambda n: {"dim": 0}),
    (reduce_scatter, scattered, (6, 12), lambda n: {"dim": 1, "op": "max"}),
    (reduce_scatter, scattered, (6, 7), lambda n: {"dim": 1, "chunk": uneven(n, 7)}),
    (all_reduce, reduced, (5, 2), lambda n: {}),
    (all_reduce, reduced, (), lambda n: {"op": "prod"}),
    (all_reduce, reduced, (5,), lambda n: {"op": "min"}),
    (all_to_all, exchanged, (6, 4), lambda n: {"split_dim": 0, "concat_dim": 1}),
    (all_to_all, exchanged, (4, 6), lambda n: {"split_dim": 1, "concat_dim": 0}),
    (all_to_all, exchanged, (7, 4), lambda n: {"split_dim": 0, "concat_dim": 1, "chunk": uneven(n, 7)}),
    (
        all_to_all, exchanged, (6, 4),
        lambda n: {"split_dim": 0, "concat_dim": 1, "size": 4 * n - (n > 1)},
    ),
    (permute, permuted, (3, 2), lambda n: {"sources": [*range(1, n), 0]}),
    (reorder, folded, (4, 3), lambda n: {"dim": 0, "order": "folded"}),
    (reorder, folded, (4, 6), lambda n: {"dim": 1, "order": "folded"}),
    (shard, sharded, (6, 4), lambda n: {"dim": 0}),
    (shard, sharded, (4, 7), lambda n: {"dim": 1, "chunk": uneven(n, 7)}),
    (to_partial, as_partial, (3, 2), lambda n: {"op": "sum"}),
    (to_partial, as_partial, (3, 2), lambda n: {"op": "prod"}),
    (to_partial, as_partial, (3, 2), lambda n: {"op": "max"}),
]  # fmt: skip
SINGLE = pytest.mark.parametrize(("collective", "formula", "shape", "told"), CALLS)


def ran(collective: AnyCollective, given: list[Any], told: Told) -> tuple[list[Any], float]:
    """The results of all ranks, and the bytes that one sent."""
    mesh = VirtualMesh({"a": len(given)})
    results = mesh.run(lambda x: collective(x, axis="a", **told), lambda rank: (given[rank],))
    return results, mesh.traffic["a"]


@pytest.mark.parametrize("ways", RANKS)
@SINGLE
def test_results_and_their_shapes(
    collective: AnyCollective, formula: Formula, shape: tuple[int, ...], told: Callable[[int], Told], ways: int
) -> None:
    given = operands(ways, *shape)
    results, _ = ran(collective, given, told(ways))
    for rank, result in enumerate(results):
        assert torch.equal(result, formula(given, rank, told(ways))) and result.is_contiguous()
        assert collective.shape(shape, ways, told(ways)) == tuple(result.shape)


@pytest.mark.parametrize("ways", RANKS)
@SINGLE
def test_it_sends_what_it_tells(
    collective: AnyCollective, formula: Formula, shape: tuple[int, ...], told: Callable[[int], Told], ways: int
) -> None:
    padded = torch.empty(collective.padded(shape, ways, told(ways))).nbytes
    _, traffic = ran(collective, operands(ways, *shape), told(ways))
    assert traffic == pytest.approx(collective.sent(ways, padded))


def test_bytes_sent() -> None:
    """With n ranks and B bytes: (n-1) B, (n-1)/n B, 2 (n-1)/n B; all that a rank has; nothing."""
    for ways in RANKS:
        expected = {
            all_gather: ways - 1,
            reduce_scatter: (ways - 1) / ways,
            all_to_all: (ways - 1) / ways,
            all_to_all_rows: (ways - 1) / ways,
            all_reduce: 2 * (ways - 1) / ways,
            permute: 1 if ways > 1 else 0,
            reorder: {1: 0, 2: 0.5}.get(ways, 1),
            shard: 0,
            to_partial: 0,
            all_reduce_bucket: 2 * (ways - 1) / ways,
            reduce_scatter_bucket: (ways - 1) / ways,
        }
        assert set(expected) == set(every().values())
        for collective, part in expected.items():
            assert collective.sent(ways, 24.0) == pytest.approx(24.0 * part), collective


@pytest.mark.parametrize("ways", RANKS)
def test_bytes_of_results(ways: int) -> None:
    for collective in every().values():
        grown = ways if collective is all_gather else 1
        shrunk = ways if collective.single is reduce_scatter or collective is shard else 1
        assert collective.result_bytes(ways, 12.0) == 12.0 * grown / shrunk, collective


@pytest.mark.parametrize("ways", RANKS)
@pytest.mark.parametrize("bucket", [all_reduce_bucket, reduce_scatter_bucket])
def test_a_bucket_is_what_its_members_are(bucket: Bucket[..., Any], ways: int) -> None:
    shapes, dims = [(6, 4), (7,), (0, 6)], (0, 0, 1)
    each = [{"axis": "a", "op": "max"} for _ in shapes]
    if bucket.of is reduce_scatter:
        each = [{**one, "dim": dim} for one, dim in zip(each, dims, strict=True)]  # type: ignore[dict-item]
        each[1]["chunk"] = uneven(ways, 7)  # type: ignore[assignment]
    told = bucket.keywords(each)
    members = bucket.members(told, len(shapes))
    given = [[operand(rank, *shape) for shape in shapes] for rank in range(ways)]
    results, traffic = ran(bucket, given, {name: value for name, value in told.items() if name != "axis"})
    sent = 0.0
    for place, (shape, one) in enumerate(zip(shapes, members, strict=True)):
        plain = {name: value for name, value in {**one, "op": "max"}.items() if value is not None}
        expected, apart = ran(bucket.of, [parts[place] for parts in given], plain)
        sent += apart
        assert all(torch.equal(parts[place], alone) for parts, alone in zip(results, expected, strict=True))
        assert bucket.shape(shape, ways, one) == tuple(results[0][place].shape)
    assert traffic == pytest.approx(sent)


def test_who_buckets_what() -> None:
    buckets = {one: one.single for one in every().values() if isinstance(one, Bucket)}
    assert buckets == {all_reduce_bucket: all_reduce, reduce_scatter_bucket: reduce_scatter}
    for one in every().values():
        assert one.bucket in buckets if one in buckets.values() else one.bucket is None
        assert one in buckets or one is all_to_all_rows or one.single is one


@pytest.mark.parametrize(
    ("collective", "told", "held", "joins", "workspace", "at_the_start"),
    [
        # of an operand of 10 bytes and a result of 100
        (all_gather, {"dim": 0}, Held.OPERAND, False, 0, 0),
        (all_gather, {"dim": 1}, Held.OPERAND, True, 100, 0),
        (reduce_scatter, {"dim": 0}, Held.OPERAND, False, 0, 0),
        (reduce_scatter, {"dim": 1}, Held.COPY, False, 10, 0),
        (all_reduce, {}, Held.NOTHING, False, 0, 0),
        (all_to_all, {"split_dim": 0, "concat_dim": 1}, Held.OPERAND, True, 100, 0),
        (all_to_all, {"split_dim": 1, "concat_dim": 0}, Held.COPY, False, 100, 0),
        (permute, {"sources": [1, 0]}, Held.OPERAND, False, 0, 0),
        (shard, {"dim": 1}, Held.OPERAND, False, 0, 0),
        (to_partial, {}, Held.OPERAND, False, 0, 0),
        (all_reduce_bucket, {}, Held.NOTHING, False, 10, 10),
        (reduce_scatter_bucket, {"dims": [0]}, Held.COPY, False, 10, 0),
    ],
)
def test_memory(
    collective: AnyCollective, told: Told, held: Held, joins: bool, workspace: int, at_the_start: int
) -> None:
    assert collective.holds(told) is held and collective.joins(told) is joins
    assert collective.workspace(told, 10, 100, False) == workspace
    assert collective.workspace(told, 10, 100, True) == at_the_start


def test_local_ones_have_no_transport_and_no_price() -> None:
    for collective in every().values():
        assert collective.local == (collective in (shard, to_partial))
        assert (collective.single in ALGORITHMS) is not collective.local
        if collective.local:
            with pytest.raises(ShardcError, match=f"{collective.name} is local"):
                collective.exchange([], 0, "")


@pytest.mark.parametrize("ways", RANKS)
def test_samples_can_be_called(ways: int) -> None:
    for collective in ALGORITHMS:
        results, _ = ran(collective, operands(ways, 6), collective.sample(ways))
        assert results[0].shape == collective.shape((6,), ways, collective.sample(ways))


def test_keywords_of_conversions() -> None:
    assert all_to_all.dims(2, 0) == {"split_dim": 0, "concat_dim": 2}
    assert all_gather.dims(2, None) == {"dim": 2}
    assert reduce_scatter.dims(None, 1) == shard.dims(None, 1) == {"dim": 1}
    assert all_reduce.dims(None, None) == to_partial.dims(None, None) == {}


def test_copies_are_the_same_object() -> None:
    for name, collective in every().items():
        assert collective.name == name == collective.__name__
        assert copy.deepcopy(collective) is collective and pickle.loads(pickle.dumps(collective)) is collective
