"""Ring attention: an axis splits queries and keys together, and keys and values go round from rank to rank.

    step 0    a rank's queries meet its own keys, while the next keys are on their way
    step 1    they meet those of the rank before, and so on
    ...       results of the steps are weighed by their log-sum-exp

Backward goes round once more. The gradients of keys and values travel one step behind the keys, in the type in which
scores are computed, and in the end go to the rank that owns the keys. Over several axes, keys go round the last axis
for each step along the axis before it. Steps in which no rank sees any key are left out (`bands.visits`).

Keys and values travel as one message, with their own heads: groups of queries that share keys do not repeat them.

Sources: Liu, Zaharia, Abbeel, "Ring attention with blockwise transformers", 2023; combining by log-sum-exp: Dao et al.
2022, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardc.runtime.collectives.collective import Started, wait
from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels.attention.blocks import attend, attend_backward, combine, compute_dtype, nothing
from shardc.runtime.kernels.attention.mask_function import Mask, MaskFunction
from shardc.runtime.kernels.attention.parts import dropping_of, finished, grad_of_sinks, grouped, mask_of
from shardc.runtime.kernels.attention.pieces import Literals
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.bands import Runs, Visit, hop, pairs, shifted, visits
from shardc.runtime.mesh.mesh import current
from shardc.runtime.mesh.orders import axis_of

__all__ = ["ring_attention", "ring_attention_backward"]


@dataclass(frozen=True)
class _Ring:
    """The ring of the running rank: `rows` and `columns` are the positions of every part of queries and keys."""

    axes: tuple[str, ...]
    rows: tuple[Runs, ...]
    columns: tuple[Runs, ...]
    causal: bool
    window: int

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(current().size(axis) for axis in self.axes)

    @property
    def visits(self) -> tuple[Visit, ...]:
        return visits(self.rows, self.columns, self.counts, self.causal, self.window)

    @property
    def mine(self) -> Runs:
        """The positions of the rank's queries."""
        return self.rows[self.number((0,) * len(self.axes))]

    def held(self, visit: Visit) -> Runs:
        """The positions of the keys that the rank has in a step."""
        return self.columns[self.number(visit.offset)]

    def busy(self, visit: Visit) -> bool:
        """Whether the rank has anything to compute in a step."""
        return pairs(self.mine, self.held(visit), self.causal, self.window) > 0

    def number(self, offset: Sequence[int]) -> int:
        """The number of the part that is `offset` before the rank's own."""
        counts, number = self.counts, 0
        for coordinate, count in zip(shifted(self._place, offset, counts), counts, strict=True):
            number = number * count + coordinate
        return number

    @property
    def _place(self) -> list[int]:
        return [current().coordinates[axis] for axis in self.axes]

    def pass_on(self, x: Tensor, now: Visit, then: Visit) -> Started[Tensor]:
        """Start to send what is held in one step to where it is held in another, and to receive."""
        *first, (axis, by) = hop(now.offset, then.offset, self.counts)
        for other, distance in first:
            x = self._sent(x, other, distance).land()
        return self._sent(x, axis, by)

    def _sent(self, x: Tensor, axis: int, by: int) -> Started[Tensor]:
        count = self.counts[axis]
        return permute.start(x, axis=self.axes[axis], sources=[(place - by) % count for place in range(count)])

    def home(self, x: Tensor, now: Visit) -> Tensor:
        """What the ranks hold in a step, at the ranks to which it belongs."""
        first = self.visits[0]
        return x if now.offset == first.offset else self.pass_on(x, now, first).land()


def _ring(r: Part, s: Part, causal: bool, window: int) -> _Ring:
    return _Ring(tuple(map(axis_of, r.axes)), r.all_runs, s.all_runs, causal, window)


class _Travelling:
    """Keys and values `k` and `v` on their way round, in one message."""

    def __init__(self, ring: _Ring, k: Tensor, v: Tensor) -> None:
        self.ring, self.k, self.v = ring, k, v
        self._packed = torch.cat([k.flatten(), v.flatten()]) if len(ring.visits) > 1 else k
        self._coming: Started[Tensor] | None = None

    def start(self, place: int) -> None:
        """Start to send what is held in a step to the next one, if there is one."""
        if place + 1 < len(self.ring.visits):
            self._coming = self.ring.pass_on(self._packed, self.ring.visits[place], self.ring.visits[place + 1])

    def land(self) -> None:
        """Hold what has come."""
        if self._coming is not None:
            self._packed, self._coming = wait(self._coming), None
            self.k, self.v = _unpacked(self._packed, self.k, self.v)


def _unpacked(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, of_queries: Tensor | None = None,
    of_keys: Tensor | None = None, sees: str = "", *, r: Part, s: Part, b: Part | None = None, h: Part | None = None,
    g: Part | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`shardc::attention` of the rank's queries and all keys: the result and the log-sum-exp of the scores."""
    ring, literals, ours = _ring(r, s, causal, window), Literals(causal, scale, window, softcap, dropout), grouped(q)
    dropping = dropping_of(draw, literals, ours, k, (b, h, g, r, s))
    whole = _Mask(mask_of(mask, q, of_queries, of_keys, sees), s)
    keys, made, before = _Travelling(ring, k, v), list[Tensor](), 0
    for place, visit in enumerate(ring.visits):
        keys.start(place)
        if ring.busy(visit):
            out, sums = attend(
                ours, keys.k, keys.v, whole.of(ring, visit), literals, ring.mine, ring.held(visit), dropping
            )
            now = sum(length for _, length in ring.held(visit))
            if made:
                combine(made[0], made[1], out, sums, (before, now))
            else:
                made = [out.to(sums.dtype), sums]
            before += now
            del out, sums  # the next step needs the room
        keys.land()
    out, logsumexp = made or nothing(ours, v)
    return finished(out, logsumexp, sinks, q)


def ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None,
    out: Tensor, logsumexp: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float,
    of_queries: Tensor | None = None, of_keys: Tensor | None = None, sees: str = "", *, r: Part, s: Part,
    b: Part | None = None, h: Part | None = None, g: Part | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`shardc::attention_backward`: the gradients of the rank's queries, keys and values, and its addend of those of
    the sinks."""
    ring, literals = _ring(r, s, causal, window), Literals(causal, scale, window, softcap, dropout)
    ours, upper, made = map(grouped, (q, grad, out))
    total = logsumexp.unsqueeze(2) if q.dim() == 4 else logsumexp
    dropping = dropping_of(draw, literals, ours, k, (b, h, g, r, s))
    whole = _Mask(mask_of(mask, q, of_queries, of_keys, sees), s)
    grad_q = torch.zeros(ours.shape, dtype=compute_dtype(q.dtype), device=q.device)
    gathered = torch.zeros(k.numel() + v.numel(), dtype=grad_q.dtype, device=q.device)
    keys, coming = _Travelling(ring, k, v), None
    for place, visit in enumerate(ring.visits):
        keys.start(place)
        grads: list[Tensor] = []
        if ring.busy(visit):
            grads += attend_backward(
                upper, ours, keys.k, keys.v, whole.of(ring, visit), made, total, literals, ring.mine,
                ring.held(visit), dropping,
            )  # fmt: skip
        if coming is not None:
            gathered, coming = wait(coming), None
        if grads:
            _add(grads, grad_q, *_unpacked(gathered, k, v))
        del grads  # the next step needs the room
        if place + 1 < len(ring.visits):
            coming = ring.pass_on(gathered, visit, ring.visits[place + 1])
        keys.land()
    del keys
    of_keys, of_values = _unpacked(ring.home(gathered, ring.visits[-1]), k, v)
    of_sinks = q.new_zeros(1) if sinks is None else grad_of_sinks(sinks, upper, made, total, ring.mine)
    return grad_q.view(q.shape).to(q.dtype), of_keys.to(k.dtype), of_values.to(v.dtype), of_sinks


def _add(grads: Sequence[Tensor], *sums: Tensor) -> None:
    for sum_of, more in zip(sums, grads, strict=True):
        sum_of.add_(more)


class _Mask:
    """A mask that has all keys. Where it is the same for all queries, it is split along the keys, and its parts are
    gathered, each with its padding. So are the numbers of keys of which it is a function."""

    def __init__(self, mask: Mask | None, s: Part) -> None:
        self._function = mask if isinstance(mask, MaskFunction) else None
        plain = mask.mask if isinstance(mask, MaskFunction) else mask
        self._gathered = plain is not None and plain.shape[4] == s.length != s.size
        self._mask = s.gather(plain, 4) if plain is not None and self._gathered else plain
        self._of_keys = s.gather(self._function.of_keys, 2) if self._function is not None else None

    def of(self, ring: _Ring, visit: Visit) -> Mask | None:
        """The part for the keys of a step."""
        mask = None if self._mask is None else self._part(self._mask, ring, visit, self._gathered)
        if self._function is None or self._of_keys is None:
            return mask
        return replace(self._function, of_keys=self._part(self._of_keys, ring, visit, True), mask=mask)

    def _part(self, x: Tensor, ring: _Ring, visit: Visit, gathered: bool) -> Tensor:
        held = ring.held(visit)
        if gathered:
            start = ring.number(visit.offset) * (x.shape[-1] // len(ring.columns))
            return x[..., start : start + sum(length for _, length in held)]
        parts = [x[..., start : start + length] for start, length in held]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
