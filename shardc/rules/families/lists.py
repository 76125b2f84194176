"""Lists: of the positions of nonzero elements, and of the distances of all pairs of points."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardc.rules.notation import Rule, Send, letters, mark, parse, rule
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.kernels import lists

aten = torch.ops.aten


@rule(aten.nonzero_static.default)
def nonzero_static(x: torch.Tensor, *, size: int, fill_value: int = -1) -> Rule:
    """The parts of the first dim gather the numbers of their nonzero elements."""
    del fill_value
    names = mark(letters(x), range(1, x.dim())).split()
    if names and names[0] != "1":
        names[0] = "s:sum~"
    places = x.new_empty([size, x.dim()])
    text = f"{' '.join(names)} -> {mark(letters(places, 'r'), range(2))}"
    return parse(text, body=lists.nonzero_static, sends={"s": [Send(all_gather, (), torch.int64.itemsize)]})


@rule(aten._pdist_forward.default)
def pair_distances(x: torch.Tensor, *_: object) -> Rule:
    """The points stay whole, because every pair is computed. Coordinates split."""
    points, coordinates, pairs = _points(x)
    sent = [Send(all_reduce, ("k",), x.element_size())]
    text = f"{points} {coordinates.replace('d', 'd~')} -> {pairs}"
    return parse(text, body=lists.pair_distances, sends={"d": sent})


@rule(aten._pdist_backward.default)
def pair_distances_backward(grad: torch.Tensor, x: torch.Tensor, *_: object) -> Rule:
    """Given the distances, every coordinate is independent of the others."""
    points, coordinates, pairs = _points(x)
    return parse(f"{pairs}, {points} {coordinates}, {pairs} -> {points} {coordinates}", [{0}])


def _points(x: torch.Tensor) -> Sequence[str]:
    """The rule texts of points, coordinates and pairs."""
    count, coordinates = x.shape
    return ("n!" if count != 1 else "1"), ("d" if coordinates != 1 else "1"), ("k!" if count != 2 else "1")
