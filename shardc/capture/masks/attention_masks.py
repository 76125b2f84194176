"""Masks of attention that are known to be causal, or a window, become arguments of the operator.

    %m = le(%column, %row)                                   ->
    %a = attention(%q, %k, %v, %m, ..., False, 0.125, 0)     ->   %a = attention(%q, %k, %v, None, ..., True, 0.125, 0)

What else a mask holds, most often the padding, stays a mask, and broadcasts as it did before it met the causal part:
`[2, 1, 1, 4096]` instead of `[2, 1, 4096, 4096]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import fx

from shardc.capture.canonical import is_random, numbered
from shardc.capture.masks.known_tensors import KnownTensors
from shardc.capture.masks.known_values import INFINITY, Biased, Broadcast, Choice, Ramp, condition_of
from shardc.capture.masks.mask_functions import MaskFormula, formula_of, stacked
from shardc.capture.torch_patches.attention.scores import ABSENT
from shardc.ir.facts import Captured, describe, origin_of
from shardc.ir.program import Program, call, value_of
from shardc.ir.versions import GraphVersion

aten: Any = torch.ops.aten
_ATTENTION = torch.ops.shardc.attention.default
_FIRST: dict[Any, int] = {_ATTENTION: 0, torch.ops.shardc.attention_backward.default: 1}
"""The index of q among the arguments; the mask stands three places further."""
_BAND: dict[Any, tuple[int, int]] = {_ATTENTION: (6, 8), torch.ops.shardc.attention_backward.default: (9, 11)}
"""The indices of `causal` and `window`; what a mask is a function of stands three places behind."""


Rest = tuple[fx.Node | None, tuple[Any, ...]]
"""What is left of a mask: a mask, and the arguments of a function, if there are any."""


@dataclass(frozen=True)
class SeenBand:
    """The keys that a query may see: `low <= key - query <= high`."""

    low: float = -INFINITY
    high: float = INFINITY

    def __and__(self, other: SeenBand) -> SeenBand:
        return SeenBand(max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True)
class Mask:
    """A mask in two parts: a band, and what is added, or has to be true, besides."""

    band: SeenBand
    rest: tuple[Broadcast, ...] = ()
    added: tuple[float, float] | None = None
    """The numbers that are added where all of the rest is true, and elsewhere; None for a mask of booleans."""


def with_plain_masks(program: Program) -> Program:
    """The program, with masks that are causal or windows as arguments of attention."""
    graph = program.version.read()
    calls = [node for node in graph.nodes if node.target in _FIRST]
    known, made = KnownTensors(), dict[Any, Rest]()
    changed = [node for node in calls if _simplify(node, known, made)]
    changed += [copy for node in calls for copy in _copies(node)]
    if not changed:
        return program
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not is_random(node):
            graph.erase_node(node)
    return replace(program, version=GraphVersion.of(numbered(graph)))


def _copies(node: fx.Node) -> Iterator[fx.Node]:
    """Take out copies of the result that make it contiguous, where it is that already, in place."""
    out = next((user for user in node.users if user.args[1] == 0), None) if node.target is _ATTENTION else None
    pending = [] if out is None else [(out, value_of(out))]
    while pending:
        last, value = pending.pop()
        for user in list(last.users):
            if user.target is aten.clone.default and value.is_contiguous():
                user.replace_all_uses_with(last)
                yield user
            elif user.target is aten.permute.default:
                pending.append((user, value.permute(user.args[1])))
            elif user.target is aten.view.default and _is_view(value, user.args[1]):
                pending.append((user, value.view(user.args[1])))


def _is_view(value: torch.Tensor, shape: Any) -> bool:
    try:
        value.view(shape)
    except RuntimeError:
        return False
    return True


def _simplify(node: fx.Node, known: KnownTensors, made: dict[Any, Rest]) -> bool:
    """Move what is known of a call's mask into its arguments, in place; whether anything was."""
    first = _FIRST[node.target]
    place, causal, window = first + 3, *_BAND[node.target]
    given = node.args[place]
    if not isinstance(given, fx.Node):
        return False
    q, k = (value_of(node.args[first + i]) for i in (0, 1))  # type: ignore[arg-type]
    lengths = q.shape[-2], k.shape[-2]
    band = _band(bool(node.args[causal]), int(node.args[window]))  # type: ignore[arg-type]
    mask = parts_of(given, known.of(given), lengths)
    options = None if mask is None else _options(mask.band & band, lengths)
    if mask is None or options is None:
        mask, options = Mask(SeenBand(), (Broadcast(given, tuple(value_of(given).shape)),)), _options(band, lengths)
    if options is None:
        return False
    key = given, q.dim(), str(lengths)
    if key not in made:
        made[key] = _remaining(given, mask, q.dim(), lengths)
    args = list(node.args)
    (args[place], function), (args[causal], args[window]) = made[key], options
    args[window + 3 :] = function
    if tuple(args) == node.args:
        return False
    node.args = tuple(args)
    return True


def parts_of(node: fx.Node, known: Any, lengths: tuple[Any, Any]) -> Mask | None:
    """What is known of a mask as a band and the rest; None if that is nothing."""
    if isinstance(known, Broadcast):
        return Mask(SeenBand(), (known,))
    if value_of(node).dtype == torch.bool:
        condition = condition_of(None, known) if known is not None else None
        if condition is None or condition.negated:
            return None
        return Mask(SeenBand(condition.low, condition.high), condition.rest)
    if isinstance(known, Ramp) and not known.slopes and known.const == 0:
        return Mask(SeenBand())
    if isinstance(known, Biased):
        mask = _added(known.choice, lengths)
        return Mask(mask.band, (known.bias,)) if mask is not None and not mask.rest else None
    return _added(known, lengths) if isinstance(known, Choice) else None


def _added(known: Choice, lengths: tuple[Any, Any]) -> Mask | None:
    """The parts of a mask that is added, of two numbers."""
    condition, inside, outside = known.condition, known.inside, known.outside
    if condition.negated:
        condition, inside, outside = replace(condition, negated=False), outside, inside
    band = SeenBand(condition.low, condition.high)
    if inside != 0 and outside == 0 and not condition.rest and inside <= ABSENT:  # 0 outside of the band
        if band.low == -INFINITY:
            band, inside, outside = SeenBand(low=band.high + 1), 0, inside
        elif band.high == INFINITY:
            band, inside, outside = SeenBand(high=band.low - 1), 0, inside
    if inside == 0 and (outside == -INFINITY or (outside <= ABSENT and not condition.rest and _all_see(band, lengths))):
        return Mask(band, condition.rest)
    return Mask(SeenBand(), condition.rest, (inside, outside)) if band == SeenBand() and condition.rest else None


def _all_see(band: SeenBand, lengths: tuple[Any, Any]) -> bool:
    """Whether every query sees a key. With rows 0 and last, all do."""
    queries, keys = lengths
    if isinstance(queries, int) and isinstance(keys, int):
        return all(max(0, row + band.low) <= min(keys - 1, row + band.high) for row in (0, queries - 1))
    return str(queries) == str(keys) and band.low <= 0 <= band.high


def _band(causal: bool, window: int) -> SeenBand:
    reach = window - 1 if window else INFINITY
    return SeenBand(-reach, 0 if causal else reach)


def _options(band: SeenBand, lengths: tuple[Any, Any]) -> tuple[bool, int] | None:
    """`causal` and `window` for a band; None if they cannot say it."""
    queries, keys = lengths
    low = -INFINITY if isinstance(queries, int) and band.low <= 1 - queries else band.low
    high = INFINITY if isinstance(keys, int) and band.high >= keys - 1 else band.high
    if high in (0, INFINITY) and low == -INFINITY:
        return high == 0, 0
    if band.high == 0 and low <= 0:
        return True, int(1 - low)
    return (False, int(1 + band.high)) if 0 < band.high == -band.low < INFINITY else None


def _remaining(mask: fx.Node, parts: Mask, rank: int, lengths: tuple[Any, Any]) -> Rest:
    """What is left of a mask beside the band, made where the mask is made: a mask, and a function."""
    add, function = _adder(mask), MaskFormula()
    alone = parts.added in (None, (-INFINITY, 0))
    rest = [spread for spread in parts.rest if not alone or not _joined(function, spread, rank, lengths)]
    if parts.added and rest:
        rest, function = [*parts.rest], MaskFormula()
    numbers: tuple[Any, ...] = ()
    if function.sees:
        sides = zip((function.queries, function.keys), lengths, strict=True)
        sees = f"bitwise_not({function.sees})" if parts.added else function.sees
        numbers = (*(stacked(nodes, length, add) for nodes, length in sides), sees)
    return (_mask_of(add, rest, mask, parts) if rest else None), numbers


def _joined(function: MaskFormula, spread: Broadcast, rank: int, lengths: tuple[Any, Any]) -> bool:
    """Let a function mask what a part of a mask does, if it can."""
    sizes = (*value_of(spread.node).shape, *spread.shape, *lengths)
    if not all(isinstance(size, int) for size in sizes):
        return False
    same = tuple(value_of(spread.node).shape)[-2:] == spread.shape[-2:] == lengths
    wide = [dim - len(spread.shape) for dim, size in enumerate(spread.shape[:-2]) if size != 1]
    found = formula_of(spread.node, lengths, function) if same and wide in ([], [-rank]) else None
    if found is None:
        return False
    function.sees = found if not function.sees else f"bitwise_and({function.sees}, {found})"
    return True


def _mask_of(add: Callable[..., fx.Node], rest: list[Broadcast], mask: fx.Node, parts: Mask) -> fx.Node:
    pieces = [_viewed(add, spread) for spread in rest]
    whole = reduce(lambda x, y: add(aten.bitwise_and.Tensor, x, y), pieces)
    if parts.added is None:
        return whole
    like = value_of(mask)
    numbers = [add(aten.full.default, [], number, dtype=like.dtype, device=like.device) for number in parts.added]
    return add(aten.where.self, whole, *numbers)


def _viewed(add: Callable[..., fx.Node], spread: Broadcast) -> fx.Node:
    same = tuple(value_of(spread.node).shape) == spread.shape
    return spread.node if same else add(aten.view.default, spread.node, list(spread.shape))


def _adder(after: fx.Node) -> Callable[..., fx.Node]:
    """Adds calls to a graph, one after another, behind `after`."""
    last = after

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal last
        with after.graph.inserting_after(last):
            last = call(after.graph, target, args, kwargs)
        values: Any = fx.map_arg((args, kwargs), value_of)
        with value_of(after).fake_mode:
            describe(last, Captured(target(*values[0], **values[1]), origin_of(after)))
        return last

    return add
