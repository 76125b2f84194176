"""Collectives of buckets move what those of single tensors would."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shardc.runtime import (
    RankError,
    VirtualMesh,
    all_reduce,
    all_reduce_bucket,
    reduce_scatter,
    reduce_scatter_bucket,
)


def parts(rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.arange(24.0).reshape(4, 6), torch.ones(()), torch.arange(7.0), torch.zeros(0, 4), torch.eye(5).t()]
    return [(part + rank).to(dtype) for part in made]


@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_reduce_bucket(ranks: int, op: str) -> None:
    mesh = VirtualMesh({"a": ranks})
    joined = mesh.run(lambda given: all_reduce_bucket(given, axis="a", op=op), lambda rank: (parts(rank),))
    traffic = dict(mesh.traffic)
    mesh.reset()
    single = mesh.run(lambda given: [all_reduce(x, axis="a", op=op) for x in given], lambda rank: (parts(rank),))
    for own, expected in zip(joined, single, strict=True):
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(own, expected, strict=True))
    assert mesh.traffic == pytest.approx(traffic)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_reduce_scatter_bucket(ranks: int) -> None:
    """Each along its own dim, one of them padded."""
    mesh, dims = VirtualMesh({"a": ranks}), (1, 0, 1)
    sizes = (None, math.ceil(7 / ranks), math.ceil(5 / ranks))

    def given(rank: int) -> tuple[list[Tensor]]:
        return ([parts(rank)[index] for index in (0, 2, 4)],)

    joined = mesh.run(lambda own: reduce_scatter_bucket(own, dims=dims, axis="a", sizes=sizes), given)
    traffic = dict(mesh.traffic)
    mesh.reset()
    told = list(zip(dims, sizes, strict=True))
    single = mesh.run(
        lambda own: [
            reduce_scatter(x, dim=dim, axis="a", chunk=size) for x, (dim, size) in zip(own, told, strict=True)
        ],
        given,
    )
    for own, expected in zip(joined, single, strict=True):
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(own, expected, strict=True))
    assert mesh.traffic == pytest.approx(traffic)


def test_pieces_may_be_written_to() -> None:
    def run() -> list[float]:
        one, other = all_reduce_bucket([torch.ones(2), torch.ones(3)], axis="a")
        one.mul_(5.0)
        return [*one.tolist(), *other.tolist()]

    assert VirtualMesh({"a": 2}).run(run, lambda _: ()) == [[10.0, 10.0, 2.0, 2.0, 2.0]] * 2


def test_what_is_no_bucket() -> None:
    mesh = VirtualMesh({"a": 2})
    one = torch.ones(4)
    for given, words in (
        (lambda: all_reduce_bucket([one, one.double()], axis="a"), "one dtype, not torch.float32, torch.float64"),
        (lambda: all_reduce_bucket([], axis="a"), "one dtype, not none at all"),
        (lambda: all_reduce_bucket([one], axis="a", op="mean"), "there is no reduction 'mean'"),
        (lambda: all_reduce_bucket([one], axis="b"), "no axis 'b'"),
        (lambda: reduce_scatter_bucket([one, one], dims=[0], axis="a"), "2 tensors has 1 dims and 2 sizes"),
        (lambda: reduce_scatter_bucket([one[:3]], dims=[0], axis="a"), "does not split evenly into 2 chunks"),
    ):
        with pytest.raises(RankError, match=words):
            mesh.run(given, lambda _: ())
