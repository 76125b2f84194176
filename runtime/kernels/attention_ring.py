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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardc.runtime.collectives.collective import Started, wait
from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels.attention_blocks import Literals, compute_dtype, grouped, scores_of, seen
from shardc.runtime.kernels.attention_dropout import kept
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.bands import Runs, Visit, hop, pairs, runs_of_parts, shifted, visits
from shardc.runtime.mesh.mesh import current

__all__ = ["ring_attention", "ring_attention_backward"]

_NOTHING = float("-inf")


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
    counts = tuple(current().size(axis) for axis in r.axes)
    rows, columns = (runs_of_parts(part.size, counts, part.unit) for part in (r, s))
    return _Ring(r.axes, rows, columns, causal, window)


def _steps(ring: _Ring, k: Tensor, v: Tensor) -> Iterator[tuple[Visit, Tensor, Tensor]]:
    """Every step with its keys and values. Those of the next step are on their way while the caller works on them."""
    packed = torch.cat([k.flatten(), v.flatten()]) if len(ring.visits) > 1 else None
    for place, visit in enumerate(ring.visits):
        coming = None
        if packed is not None and place + 1 < len(ring.visits):
            coming = ring.pass_on(packed, visit, ring.visits[place + 1])
        yield (visit, k, v)
        if coming is not None:
            packed = wait(coming)
            k, v = _unpacked(packed, k, v)


def _unpacked(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, *, r: Part, s: Part, b: Part | None = None,
    h: Part | None = None, g: Part | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`shardc::attention` of the rank's queries and all keys: the result and the log-sum-exp of the scores."""
    ring, call = (
        _ring(r, s, causal, window),
        _Call(Literals(causal, scale, window, softcap, dropout), draw, (b, h, g, r, s)),
    )
    rows, mask = _length(ring.mine), _whole_mask(mask, q.dim(), s)
    ours = grouped(q)[..., :rows, :]
    shape, dtype = (*ours.shape[:-1], v.shape[-1]), compute_dtype(q.dtype)
    result = torch.zeros(shape, dtype=dtype, device=q.device)
    total = torch.full(shape[:-1], _NOTHING, dtype=dtype, device=q.device)
    for visit, keys, values in _steps(ring, k, v):
        if ring.busy(visit):
            part = call.block(ours, keys, values, _masked(mask, ring, visit), ring.mine, ring.held(visit))
            result, total = _combined(result, total, *part)
    if sinks is not None:
        result, total = _combined(result, total, 0, sinks.to(dtype).view(1, *total.shape[1:3], 1).expand_as(total))
    result, total = (_padded(x, dim, q.shape[-2]) for x, dim in ((result, 3), (seen(total), 3)))
    if q.dim() == 4:
        result, total = result.squeeze(2), total.squeeze(2)
    return result.to(q.dtype), total


def ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None,
    out: Tensor, logsumexp: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float, *,
    r: Part, s: Part, b: Part | None = None, h: Part | None = None, g: Part | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`shardc::attention_backward`: the gradients of the rank's queries, keys and values, and its addend of those of
    the sinks."""
    ring, call = (
        _ring(r, s, causal, window),
        _Call(Literals(causal, scale, window, softcap, dropout), draw, (b, h, g, r, s)),
    )
    rows, dtype, mask = _length(ring.mine), compute_dtype(q.dtype), _whole_mask(mask, q.dim(), s)
    ours, upper, made = (grouped(x)[..., :rows, :] for x in (q, grad, out))
    total = (logsumexp if q.dim() == 5 else logsumexp.unsqueeze(2))[..., :rows]
    delta = (upper.to(dtype) * made.to(dtype)).sum(-1)
    grad_q = torch.zeros(ours.shape, dtype=dtype, device=q.device)
    gathered = torch.zeros(k.numel() + v.numel(), dtype=dtype, device=q.device)
    coming: Started[Tensor] | None = None
    for place, (visit, keys, values) in enumerate(_steps(ring, k, v)):
        slopes = None
        if ring.busy(visit):
            slopes = call.block_backward(
                upper,
                ours,
                keys,
                values,
                _masked(mask, ring, visit),
                total,
                delta,
                ring.mine,
                ring.held(visit),
            )
        if coming is not None:
            gathered = wait(coming)
        if slopes is not None:
            grad_q += slopes[0]
            for grown, slope in zip(_unpacked(gathered, k, v), slopes[1:], strict=True):
                grown[..., : slope.shape[-2], :] += slope
        if place + 1 < len(ring.visits):
            coming = ring.pass_on(gathered, visit, ring.visits[place + 1])
    grad_k, grad_v = _unpacked(ring.home(gathered, ring.visits[-1]), k, v)
    grad_sinks = q.new_zeros(1)
    if sinks is not None:
        share = torch.exp(sinks.to(dtype).view(1, *total.shape[1:3], 1) - total) * delta
        grad_sinks = -share.sum((0, 3)).reshape(sinks.shape).to(sinks.dtype)
    grad_q = _padded(grad_q, 3, q.shape[-2]).view(q.shape)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks


@dataclass(frozen=True)
class _Call:
    """What all blocks of a call share."""

    literals: Literals
    draw: Tensor | None
    parts: tuple[Part | None, ...]

    def block(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Runs, columns: Runs
    ) -> tuple[Tensor, Tensor]:
        """The result for one block of keys, and its log-sum-exp."""
        k, v = (x[:, :, : _length(columns)] for x in (k, v))
        scores, _ = scores_of(q, k, mask, self.literals, _positions(rows, q), _positions(columns, q))
        total = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - seen(total).unsqueeze(-1))
        if self.draw is not None:
            weights = weights * self._kept(self.draw, scores, rows, columns)
        return torch.matmul(weights, v.to(scores.dtype).unsqueeze(2)), total

    def block_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, total: Tensor, delta: Tensor,
        rows: Runs, columns: Runs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of queries, keys and values for one block of keys."""
        k, v = (x[:, :, : _length(columns)] for x in (k, v))
        scores, slope = scores_of(q, k, mask, self.literals, _positions(rows, q), _positions(columns, q))
        dtype = scores.dtype
        weights = torch.exp(scores - total.unsqueeze(-1))
        inner, dropped = torch.matmul(grad.to(dtype), v.to(dtype).unsqueeze(2).transpose(-2, -1)), weights
        if self.draw is not None:
            factors = self._kept(self.draw, scores, rows, columns)
            inner, dropped = inner * factors, weights * factors
        change = weights * (inner - delta.unsqueeze(-1)) * self.literals.scale
        if slope is not None:
            change = change * slope
        grad_k = torch.matmul(change.transpose(-2, -1), q.to(dtype)).sum(2)
        grad_v = torch.matmul(dropped.transpose(-2, -1), grad.to(dtype)).sum(2)
        return torch.matmul(change, k.to(dtype).unsqueeze(2)), grad_k, grad_v

    def _kept(self, draw: Tensor, scores: Tensor, rows: Runs, columns: Runs) -> Tensor:
        shape = tuple(part.size if part else n for part, n in zip(self.parts, scores.shape, strict=True))
        whole = kept(draw, shape, self.literals.dropout).to(scores.dtype)
        for dim, part in enumerate(self.parts[:3]):
            if part is not None:
                whole = whole.narrow(dim, min(part.start, part.size), part.valid)
                padding = [0] * 2 * (scores.dim() - 1 - dim) + [0, part.length - part.valid]
                whole = torch.nn.functional.pad(whole, padding)
        return whole[..., _positions(rows, scores), :][..., _positions(columns, scores)]


def _length(runs: Runs) -> int:
    return sum(length for _, length in runs)


def _positions(runs: Runs, like: Tensor) -> Tensor:
    return torch.cat([torch.arange(start, start + length, device=like.device) for start, length in runs])


def _whole_mask(mask: Tensor | None, dims: int, s: Part) -> Tensor | None:
    """A mask for all keys, with as many dims as scores. One that is the same for all queries is split along the keys:
    its parts are gathered, each with its padding."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (dims - mask.dim()) + tuple(mask.shape))
    mask = mask if dims == 5 else mask.unsqueeze(2)
    return s.gather(mask, 4) if mask.shape[3] == 1 and mask.shape[4] > 1 else mask


def _masked(mask: Tensor | None, ring: _Ring, visit: Visit) -> Tensor | None:
    """The part of a mask for the rank's queries and the keys of a step."""
    if mask is None or mask.shape[4] == 1:
        return mask if mask is None or mask.shape[3] == 1 else mask[..., : _length(ring.mine), :]
    if mask.shape[3] == 1:
        start = ring.number(visit.offset) * (mask.shape[4] // len(ring.columns))
        return mask[..., start : start + _length(ring.held(visit))]
    mask = mask[..., : _length(ring.mine), :]
    return torch.cat([mask[..., start : start + length] for start, length in ring.held(visit)], -1)


def _combined(result: Tensor, total: Tensor, part: Tensor | int, of_part: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over different keys, weighed by their log-sum-exp."""
    both = torch.logaddexp(total, of_part)
    old, new = (torch.exp(one - seen(both)).unsqueeze(-1) for one in (total, of_part))
    return result * old + part * new, both


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing]) if missing else x
