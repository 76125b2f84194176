"""Cuts, their inverse, and DTensor placements, against what DTensor's own placements store."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardc.runtime import RankError, VirtualMesh, cut, cuts_of, paste, placements
from shardc.runtime.execute.slots import valid_shape

MESHES = [{"a": 2}, {"a": 3}, {"a": 2, "b": 2}, {"a": 2, "b": 3}, {"a": 2, "b": 2, "c": 2}]


@st.composite
def cases(draw):
    axes = draw(st.sampled_from(MESHES))
    shape = (draw(st.sampled_from([24, 48])), draw(st.sampled_from([12, 24])))
    local, cuts = list(shape), []
    for axis in draw(st.permutations(list(axes))):
        dim = draw(st.integers(0, 2))
        if dim < 2:
            fits = [outer for outer in (1, 2, 3, 4, 6) if local[dim] % (outer * axes[axis]) == 0]
            if fits:
                cuts.append((dim, draw(st.sampled_from(fits)), axis))
                local[dim] //= axes[axis]
    return axes, shape, tuple(cuts)


def stored_by_dtensor(tensor, plan, coordinates):
    """DTensor splits in the order of the mesh's axes, each with its placement's own `_split_tensor`."""
    for (n, index), placement in zip(coordinates.values(), plan, strict=True):
        if not placement.is_replicate():
            tensor = placement._split_tensor(tensor, n, with_padding=False)[0][index]
    return tensor


@settings(max_examples=150, deadline=None)
@given(cases())
def test_cut_paste_and_placements(case):
    axes, shape, cuts = case
    mesh = VirtualMesh(axes)
    whole = torch.arange(shape[0] * shape[1]).reshape(shape)
    parts = [cut(whole, cuts, mesh.coordinates(rank), axes) for rank in mesh.ranks]
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(paste(parts, shape, cuts, axes), whole)
    try:
        plan = placements(cuts, shape, axes)
    except RankError as error:
        assert "DTensor" in str(error)
        return
    for rank, part in zip(mesh.ranks, parts, strict=True):
        at = {axis: (axes[axis], index) for axis, index in mesh.coordinates(rank).items()}
        assert torch.equal(part, stored_by_dtensor(whole, plan, at))
    inverse = cuts_of(plan, shape, axes)
    assert placements(inverse, shape, axes) == plan
    assert all(torch.equal(cut(whole, inverse, mesh.coordinates(r), axes), parts[r]) for r in mesh.ranks)


@pytest.mark.parametrize("size", [1, 5, 6, 7, 9])
def test_an_uneven_dim_is_stored_as_dtensor_does(size):
    axes, cuts, whole = {"a": 4}, ((0, 1, "a"),), torch.arange(size * 3).reshape(size, 3)
    (placement,) = placements(cuts, whole.shape, axes)
    assert cuts_of((placement,), whole.shape, axes) == cuts
    parts = [cut(whole, cuts, {"a": rank}, axes) for rank in range(4)]
    assert torch.equal(paste(parts, whole.shape, cuts, axes), whole)
    for rank, part in enumerate(parts):
        rows = valid_shape(whole.shape, cuts, {"a": rank}, axes)
        assert torch.equal(part[: rows[0]], stored_by_dtensor(whole, (placement,), {"a": (4, rank)}))


def test_plain_orders_are_always_expressible():
    axes = {"a": 2, "b": 2, "c": 2}
    for order in itertools.permutations(axes):
        assert len(placements(tuple((0, 1, axis) for axis in order), (16,), axes)) == 3


def test_refusals():
    with pytest.raises(RankError, match="blocks"):
        cut(torch.zeros(5), ((0, 2, "a"),), {"a": 0}, {"a": 2})
    with pytest.raises(RankError, match="uneven"):
        placements(((0, 1, "a"), (0, 1, "b")), (5,), {"a": 2, "b": 2})
    with pytest.raises(RankError, match="together wrongly"):
        placements(((0, 2, "a"), (0, 3, "b")), (24,), {"a": 2, "b": 2})
    with pytest.raises(RankError, match="twice"):
        placements(((0, 1, "a"), (1, 1, "a")), (4, 4), {"a": 2})
