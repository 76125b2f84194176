"""Experts over split experts and tokens, on virtual meshes: any routing gives the single device's values and gradients,
and sends what the routing says."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checks.fuzz import searched
from shardc.errors import ShardcError
from shardc.runtime import Part, VirtualMesh
from shardc.runtime.kernels.mixture.experts_parts import (
    experts_exchanged,
    experts_exchanged_backward,
    experts_in_parts,
    experts_in_parts_backward,
)
from shardc.runtime.kernels.mixture.fused import experts, experts_backward

TOLD = ("mul(silu(gate), up)", "silu_backward(mul(grad, up), gate), mul(grad, silu(gate))")
COUNT, D, F = 6, 4, 3
EACH = 6
"""Tokens of a rank."""
MESHES = ((2,), (3,), (4,), (2, 2), (3, 2))


@functools.cache
def machine(sizes: tuple[int, ...]) -> VirtualMesh:
    return VirtualMesh(dict(zip("ab", sizes, strict=False)))


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (COUNT, 2, F, D), (COUNT, 2, F), (COUNT, D, F), (COUNT, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def of_rank(x: Tensor, part: Part) -> Tensor:
    """This rank's experts of a weight, with garbage where there are none."""
    own = x[part.start : part.start + part.valid]
    return torch.cat([own, x.new_full((part.length - len(own), *x.shape[1:]), float("nan"))])


def ran(sizes: tuple[int, ...], ids: Tensor, *, gathered: bool = False, **asked: Any) -> list[list[Tensor]]:
    """Every rank's result, gradients of x and scores, and gradients of its weights, with its experts."""
    mesh, every = machine(sizes), weights()
    x, grad, scores = inputs(ids)
    axes = tuple(mesh.axes)
    exchanged, in_parts = (experts_exchanged, experts_exchanged_backward), (experts_in_parts, experts_in_parts_backward)
    forward, backward = in_parts if gathered else exchanged

    def work(rank: int) -> list[Tensor]:
        part = Part(axes, COUNT)
        local = [of_rank(one, part) for one in every]
        mine = slice(None) if gathered else slice(part.index * EACH, (part.index + 1) * EACH)
        given_: tuple[Any, ...] = x[mine], ids[mine], scores[mine], *local, *TOLD
        made = forward(*given_, e=part, **asked)
        behind: tuple[Any, ...] = grad[mine], *given_, True
        grads = backward(*behind, e=part, **asked)
        return [made, *grads[:2], *(one[: part.valid] for one in grads[2:])]

    mesh.reset()
    return mesh.run(work, lambda rank: (rank,))


def inputs(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (len(ids), D), (len(ids), D), ids.shape
    x, grad, scores = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, grad, scores


def right(ids: Tensor) -> list[Tensor]:
    x, grad, scores = inputs(ids)
    given_ = x, ids, scores, *weights(), *TOLD
    return [experts(*given_), *experts_backward(grad, *given_, True)]


def agrees(made: list[list[Tensor]], ids: Tensor, gathered: bool = False) -> None:
    joined = [sum(parts) if gathered else torch.cat(parts) for parts in zip(*(rank[:3] for rank in made), strict=True)]
    joined += [torch.cat(parts) for parts in zip(*(rank[3:] for rank in made), strict=True)]
    torch.testing.assert_close(joined, right(ids), rtol=1e-10, atol=1e-10)


@st.composite
def routings(draw: st.DrawFn) -> tuple[tuple[int, ...], Tensor]:
    """Meshes and ids: of experts drawn from few or many, so that some get all and some nothing."""
    sizes = draw(st.sampled_from(MESHES))
    k = draw(st.integers(1, 3))
    popular = draw(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT))
    count = EACH * math.prod(sizes) * k
    ids = draw(st.lists(st.sampled_from(popular), min_size=count, max_size=count))
    return sizes, torch.tensor(ids).view(-1, k)


@searched(30)
@given(routings(), st.sampled_from([0.1, 1.0, 2.0, 100.0]), st.booleans())
def test_any_routing_is_right(routing: tuple[tuple[int, ...], Tensor], capacity: float, gathered: bool) -> None:
    sizes, ids = routing
    agrees(ran(sizes, ids, gathered=gathered, capacity=capacity), ids, gathered)


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,)])
def test_what_is_sent_is_what_the_routing_says(sizes: tuple[int, ...]) -> None:
    """Rank 0 sends the rows of its tokens that go to experts of others, and the results of others' rows; twice x and
    once the gradient go out in all, and one result and one gradient come back, with two numbers a row."""
    ids = torch.randint(0, COUNT, (EACH * sizes[0], 2), generator=torch.Generator().manual_seed(2))
    ran(sizes, ids, capacity=100.0)
    ways, length = sizes[0], -(-COUNT // sizes[0])
    owner = ids // length
    out, back = int((owner[:EACH] != 0).sum()), int((owner[EACH:] == 0).sum())
    told = 2 * (ways - 1) * ways * length * 8
    assert machine(sizes).traffic["a"] == told + 8 * (out * (3 * D + 1) + back * (2 * D + 1))


def test_balanced_routing_sends_what_the_rule_expects() -> None:
    """6 of 6 experts: every rank sends to every other as much. The rule's bytes are checked by brute force."""
    ids = torch.arange(COUNT).repeat(2 * EACH, 1)
    ran((2,), ids)
    rows = EACH * COUNT / 2
    assert machine((2,)).traffic["a"] == 2 * COUNT * 8 + 8 * rows * (5 * D + 2)


SKEWED = torch.zeros(2 * EACH, 1, dtype=torch.int64)


def test_rounds_bound_what_is_in_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardc.runtime.kernels.mixture import experts_parts

    most: list[int] = []
    plain = experts_parts.forward_rows

    def watched(*args: Any) -> Tensor:
        most.append(len(args[2]))
        return plain(*args)

    monkeypatch.setattr(experts_parts, "forward_rows", watched)
    agrees(ran((2,), SKEWED, capacity=1.5), SKEWED)
    assert max(most) <= 1.5 * EACH
    most.clear()
    agrees(ran((2,), SKEWED, capacity=2.0), SKEWED)
    assert max(most) == 2 * EACH


def test_overflow_is_an_error_if_asked() -> None:
    with pytest.raises(ShardcError, match=r"12 rows come to the experts of one rank over a, .* room for 9"):
        ran((2,), SKEWED, capacity=1.5, overflow="error")
    agrees(ran((2,), SKEWED, capacity=2.0, overflow="error"), SKEWED)


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_overflow_is_dropped_if_asked(sizes: tuple[int, ...]) -> None:
    """The rows of later ranks: with twice the mean, those of the first two ranks stay."""
    ids = torch.zeros(EACH * math.prod(sizes), 1, dtype=torch.int64)
    stay = int(1.5 * EACH)
    made = torch.cat([rank[0] for rank in ran(sizes, ids, capacity=1.5, overflow="drop")])
    torch.testing.assert_close(made[:stay], right(ids)[0][:stay], rtol=1e-10, atol=1e-10)
    assert not made[stay:].any()
    agrees(ran(sizes, ids, capacity=4.0, overflow="drop"), ids)
