"""Loops whose layers end alike call one function for that end, and differ in what comes before, and in what they keep.

    for i in range(2):                                       layers 0 and 1 had room to keep what the others
        between = layer(x, *layers[9 * i : 9 * i + 9])       compute again; from there on they are alike
        x, kept = layer_end(between)
    for i in range(30):
        between = layer_2(x, *layers[9 * i + 18 : 9 * i + 27])
        x, kept = layer_end(between)
        del kept[3]

Where all of a layer is alike, the loops call one function, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import fx

from shardc.source.layers import Layer, Stretch
from shardc.source.repetition import LEAST_NODES, LEAST_SAVED, Loop, Outer, Own

Pairs = dict[Own | Outer, Own | Outer]
"""What the end of one run reads from before it, and what that of another run reads there."""


def share_ends(
    layers: Sequence[Layer],
    key: Callable[[fx.Node], Hashable],
    annotation: Callable[[fx.Node], str],
    fits: Callable[[Layer, Sequence[int]], bool],
) -> None:
    """Let layers that end alike call one function, that of the first of them. `key` says what equal calls have in
    common; `fits`, whether values may stay until the function ends that leaves them, though nobody reads them then."""
    for number, layer in enumerate(layers):
        for first in layers[:number]:
            if first.twin is None and _joined(first, layer, key, annotation, fits):
                break


def _joined(
    first: Layer,
    other: Layer,
    key: Callable[[fx.Node], Hashable],
    annotation: Callable[[fx.Node], str],
    fits: Callable[[Layer, Sequence[int]], bool],
) -> bool:
    if first.loop.rest or other.loop.rest:
        return False
    keys = [list(map(key, layer.run)) for layer in (first, other)]
    length = 0
    while length < min(map(len, keys)) and keys[0][-length - 1] == keys[1][-length - 1]:
        length += 1
    wanted = first.loop.size - first.parts[-1].low if first.shares else 0
    while length >= max(wanted, LEAST_SAVED):
        pairs = _read_before(first.loop, other.loop, wanted or length)
        if pairs is not None and _may(first, other, wanted or length, pairs, annotation):
            return _join(first, other, wanted or length, pairs, fits)
        if wanted:
            return False
        length -= 1
    return False


def _read_before(first: Loop, other: Loop, length: int) -> Pairs | None:
    """What the last `length` nodes of either run read that is made before them, in pairs; None if these nodes do not
    read alike."""
    low, start = first.size - length, other.size - length
    pairs, back = Pairs(), Pairs()
    for one, two in zip(first.operands[low:], other.operands[start:], strict=True):
        for a, b in zip(one, two, strict=True):
            within = isinstance(a, Own) and a.offset >= low, isinstance(b, Own) and b.offset >= start
            if within[0] != within[1]:
                return None
            if isinstance(a, Own) and isinstance(b, Own) and within[0]:
                if a.offset - low != b.offset - start:
                    return None
            elif pairs.setdefault(a, b) != b or back.setdefault(b, a) != a:
                return None
    return pairs


def _may(
    first: Layer, other: Layer, length: int, pairs: Pairs, annotation: Callable[[fx.Node], str]
) -> bool:  # fmt: skip
    """Whether one function may stand for the ends of two layers: both carry on the same, and leave it in lists that
    are called the same; and what comes before them is either nothing or something for both."""
    low, start = first.loop.size - length, other.loop.size - length
    if bool(low) != bool(start) or (low and min(low, start) < LEAST_NODES):
        return False
    carried = [[(layer.loop.columns[n].carried or 0) - at for n in layer.carried]
               for layer, at in ((first, low), (other, start))]  # fmt: skip
    if carried[0] != carried[1] or min(carried[0], default=0) < 0:
        return False
    lists = [{o - at: name for name, group in layer.groups.items() for o in group if o >= at}
             for layer, at in ((first, low), (other, start))]  # fmt: skip
    if set(lists[0].values()) != set(lists[1].values()):
        return False
    if any(lists[1].get(offset, name) != name for offset, name in lists[0].items()):
        return False
    if not low:  # the arguments of the first function are those of the loop
        given = [pairs.get(Outer(n)) for n in (*first.carried, *first.given)]
        if given != [Outer(n) for n in (*other.carried, *other.given)]:
            return False
    return all(annotation(first.node(a)) == annotation(other.node(b)) for a, b in pairs.items())


def _join(first: Layer, other: Layer, length: int, pairs: Pairs, fits: Callable[[Layer, Sequence[int]], bool]) -> bool:
    low, start = first.loop.size - length, other.loop.size - length
    groups = first.parts[-1].groups if first.shares else _groups(first, low)
    theirs = _groups(other, start)
    # what either leaves
    every = {name: [*group, *(o - start + low for o in theirs[name] if o - start + low not in group)]
             for name, group in groups.items()}  # fmt: skip
    for layer, at in ((first, low), (other, start)):
        own = {offset for group in layer.groups.values() for offset in group}
        idle = [o - low + at for group in every.values() for o in group if o - low + at not in own]
        if not fits(layer, idle):
            return False
    if not first.shares and low:
        passed = [a for a, b in pairs.items() if not _arguments(first, a, other, b)]
        _divide(first, low, passed)
    first.shares = True
    first.parts[-1].groups = every
    if low:
        _divide(other, start, [pairs[one] for one in first.parts[-1].before])
    end = other.parts[-1]
    end.groups = {name: [o - low + start for o in group] for name, group in every.items()}
    other.twin, other.pairs = first, pairs
    for name, group in every.items():
        own = other.groups[name]
        other.groups[name] = [o for o in own if o < start] + [o - low + start for o in group if o - low + start in own]
    return True


def _groups(layer: Layer, low: int) -> dict[str, list[int]]:
    found = {name: [offset for offset in group if offset >= low] for name, group in layer.groups.items()}
    return {name: group for name, group in found.items() if group}


def _arguments(first: Layer, a: Own | Outer, other: Layer, b: Own | Outer) -> bool:
    """Whether both layers may pass a value as an argument of its own: it is the same for all runs."""
    return (
        isinstance(a, Outer) and isinstance(b, Outer) and first.loop.columns[a.column].same
        and other.loop.columns[b.column].same
    )  # fmt: skip


def _divide(layer: Layer, at: int, passed: list[Own | Outer]) -> None:
    """Make two functions of the one of a layer. Values that are `passed` go from one to the other in a list."""
    (whole,) = layer.parts
    first, second = Stretch(0, at, after=passed), Stretch(at, layer.loop.size, before=passed)
    inside = {one.column for one in passed if isinstance(one, Outer)}
    for part in (first, second):
        read = {one.column for o in range(part.low, part.high) for one in layer.loop.operands[o]
                if isinstance(one, Outer)}  # fmt: skip
        read = read | inside if part is first else read - inside
        part.same = [number for number in whole.same if number in read]
        part.held = [number for number in whole.held if number in read]
        for name, group in layer.groups.items():
            if mine := [offset for offset in group if part.low <= offset < part.high]:
                part.groups[name] = mine
    for name, group in layer.groups.items():
        layer.groups[name] = [o for o in group if o < at] + [o for o in group if o >= at]
    layer.parts = [first, second]
