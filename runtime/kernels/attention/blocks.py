"""Attention of some queries to some keys, block by block: memory is linear in queries and keys.

Shapes of this file:

    q, out     [batch, kv_heads, group, queries, width]
    k, v       [batch, kv_heads, keys, width]
    mask       5 dims, each that of the scores `[batch, kv_heads, group, queries, keys]` or one; or a function
    logsumexp  [batch, kv_heads, group, queries]; -inf for a query that sees nothing

Where a fused kernel of torch takes the operands, it is called on pieces that are as large as it takes them. What no
kernel takes is computed here, tile by tile: a soft cap, and dropout on the CPU or of the single device's stream.
Results over different keys are weighed by their log-sum-exp. Source: Dao et al., "FlashAttention", 2022, section 3.1
and appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from shardc.runtime.kernels.attention.dropout import Dropping, StreamDropping, drop_of
from shardc.runtime.kernels.attention.kernels import Drop, Kernel, kernel_for
from shardc.runtime.kernels.attention.mask_function import Mask, MaskFunction, pairs
from shardc.runtime.kernels.attention.pieces import Literals, Piece, Runs, Sight, rectangles, tiles

__all__: list[str] = []

TILE, LARGE_TILE = 1 << 20, 1 << 26
"""The most bytes of a tile of scores, or of a mask that is made for a kernel: on the CPU, whose caches hold it, and on
other devices."""

LOWEST = -1e30
"""What masks add that is less than this swallows scores, in every type in which they are computed."""
_NOTHING = float("-inf")


def tile_bytes(device: torch.device) -> int:
    """The most bytes of a tile of scores, on a device."""
    return TILE if device.type == "cpu" else LARGE_TILE


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def seen(logsumexp: Tensor) -> Tensor:
    """The log-sum-exp, with zeros for rows where everything is masked, as the CPU's kernel returns it."""
    return logsumexp.masked_fill(logsumexp == _NOTHING, 0.0)


def combine(out: Tensor, logsumexp: Tensor, more: Tensor, sums: Tensor, keys: tuple[int, int]) -> None:
    """Weigh `out` and the result `more` over other keys by their log-sum-exp, in place.

    `keys`: over how many keys each is. That weighs rows to whose scores a mask adds the lowest number: this swallows
    the scores and the logarithm of how many there are, and eager mode makes the mean of all values.
    """
    both = torch.logaddexp(logsumexp, sums)
    top = seen(both)
    alike, share = (sums < LOWEST).logical_and_(sums == logsumexp).logical_and_(sums > _NOTHING), keys[0] / sum(keys)
    out.mul_(torch.exp(logsumexp - top).masked_fill_(alike, share).unsqueeze(-1))
    out.addcmul_(more.to(out.dtype), torch.exp(sums - top).masked_fill_(alike, 1 - share).unsqueeze(-1))
    logsumexp.copy_(torch.where(alike, sums, both))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, literals: Literals, rows: Runs, columns: Runs,
    dropping: Dropping | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result and the log-sum-exp of queries at the positions `rows` over the keys at `columns`.

    What is in memory behind these queries and keys is padding: it is not read, and its results are zero.
    """
    kernel, mask = _kernel(q, k, v, mask, literals, dropping)
    if kernel is not None:
        return _by_kernel(kernel, q, k, v, mask, literals, rows, columns, dropping)
    return _by_tiles(q, k, v, mask, literals, rows, columns, dropping)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, out: Tensor, logsumexp: Tensor,
    literals: Literals, rows: Runs, columns: Runs, dropping: Dropping | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, in their types, given the result and log-sum-exp over all keys."""
    kernel, mask = _kernel(q, k, v, mask, literals, dropping)
    given = grad, q, k, v, mask, out, logsumexp, literals, rows, columns, dropping
    return _by_tiles_backward(*given) if kernel is None else _by_kernel_backward(kernel, *given)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, literals: Literals, dropping: Dropping | None
) -> tuple[Kernel | None, Mask | None]:
    """The kernel, if there is one, and the mask; in numbers, where it is the same for all queries."""
    if literals.softcap or isinstance(dropping, StreamDropping):
        return None, mask
    biased = mask is not None or literals.window
    bias = q.new_empty(1).expand(1, 1, q.shape[3], k.shape[2]) if biased else None
    kernel = kernel_for(q.flatten(1, 2), k, v, bias, False, 0.0 if dropping is None else dropping.dropout)
    return kernel, _as_numbers(mask, q.dtype) if isinstance(mask, Tensor) and mask.shape[-2] == 1 else mask


# pieces for kernels


def _pieces(q: Tensor, mask: Mask | None, literals: Literals, rows: Runs, columns: Runs) -> Iterator[Piece]:
    if not literals.window and (mask is None or _ready(mask, q)):
        return iter(rectangles(rows, columns, literals))
    heads = 1 if mask is None else _copies(mask, q)
    found = tiles(rows, columns, literals, max(tile_bytes(q.device) // (q.element_size() * heads), 1))
    return _not_empty(found, mask) if isinstance(mask, MaskFunction) else found


def _not_empty(found: Iterator[Piece], mask: MaskFunction) -> Iterator[Piece]:
    return (piece for piece in found if not mask.empty(piece))


def _copies(mask: Mask, q: Tensor) -> int:
    """How many masks of queries and keys a mask has."""
    if isinstance(mask, Tensor):
        return _heads(mask, q) * mask.shape[0]
    return mask.batch * (1 if mask.mask is None else _heads(mask.mask, q))


def _heads(mask: Tensor, q: Tensor) -> int:
    return 1 if mask.shape[1] == mask.shape[2] == 1 else q.shape[1] * q.shape[2]


def _ready(mask: Mask, q: Tensor) -> bool:
    """Whether kernels take the mask as it lies in memory: its heads are one dim, or become one without a copy."""
    if not isinstance(mask, Tensor):
        return False
    _, heads, group, _, last = mask.shape
    joined = heads == group == 1 or 1 in q.shape[1:3] or ((heads, group) == q.shape[1:3] and _merge(mask))
    return mask.dtype == q.dtype and mask.stride(-1) == 1 and last != 1 and joined


def _merge(mask: Tensor) -> bool:
    return mask.stride(1) == mask.shape[2] * mask.stride(2)


def _bias(piece: Piece, mask: Mask | None, literals: Literals, q: Tensor) -> Tensor | None:
    """What a kernel is to add to the scores of a piece: `[1 or batch, 1 or heads, queries, keys]`."""
    given = None if mask is None else pairs(piece, mask)
    made = isinstance(mask, MaskFunction) and given is not None and given.dtype == torch.bool
    if given is not None and made and piece.sight is Sight.BAND:  # while it is narrow
        given = given & piece.seen(literals, q.device)
    bias = None if given is None else _as_numbers(given, q.dtype)
    del given
    if piece.sight is Sight.BAND and not made:
        unseen = piece.seen(literals, q.device).logical_not_()
        if bias is None:
            bias = torch.zeros((1, 1, 1, *unseen.shape), dtype=q.dtype, device=q.device).masked_fill_(unseen, _NOTHING)
        else:
            bias = bias.masked_fill(unseen, _NOTHING)
    if bias is None:
        return None
    if bias.shape[-1] != piece.columns or bias.stride(-1) != 1:
        bias = bias.expand(*bias.shape[:-1], piece.columns).contiguous()
    heads = q.shape[1:3] if _heads(bias, q) > 1 else (1, 1)
    return bias.expand(-1, *heads, -1, -1).flatten(1, 2)


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), _NOTHING)
    return mask.to(dtype)


def _by_kernel(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, literals: Literals, rows: Runs, columns: Runs,
    dropping: Dropping | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made: tuple[Tensor, Tensor] | None = None
    for piece in _pieces(q, mask, literals, rows, columns):
        part = _of_piece(kernel, piece, q, k, v, mask, literals, drop_of(dropping, piece))
        if made is None and piece.rows == q.shape[3] and _alone(piece, columns, literals):
            return part
        made = made or nothing(q, v)
        combine(piece.queries(made[0]), piece.sums(made[1]), *part, (piece.column, piece.columns))
        del part  # before the next is made
    return made or nothing(q, v)


def _of_piece(
    kernel: Kernel, piece: Piece, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, literals: Literals, drop: Drop
) -> tuple[Tensor, Tensor]:
    bias = _bias(piece, mask, literals, q)
    out, sums = kernel.forward(
        piece.queries(q).flatten(1, 2), piece.keys(k), piece.keys(v), bias, piece.sight is Sight.DIAGONAL,
        literals.scale, drop,
    )  # fmt: skip
    if bias is not None:  # kernels have zeros there, or NaN
        unseen = _unseen(bias, piece)
        out, sums = out.masked_fill_(unseen.unsqueeze(-1), 0), sums.masked_fill(unseen, _NOTHING)
    return out.unflatten(1, q.shape[1:3]), sums.unflatten(1, q.shape[1:3])


def _unseen(bias: Tensor, piece: Piece) -> Tensor:
    """Which rows see no key of a piece: `[1 or batch, 1 or heads, rows]`."""
    unseen = bias.amax(-1) == _NOTHING
    if piece.sight is not Sight.DIAGONAL:
        return unseen
    step = max(tile_bytes(bias.device) // (math.prod(bias.shape) // bias.shape[-2]), 1)
    firsts = [(rows != _NOTHING).to(torch.uint8).argmax(-1) for rows in bias.split(step, -2)]
    return unseen | (torch.cat(firsts, -1) > torch.arange(piece.rows, device=bias.device))


def _alone(piece: Piece, columns: Runs, literals: Literals) -> bool:
    """Whether a piece of all queries is the only one."""
    if piece.sight is Sight.DIAGONAL:
        return len(columns) == 1 and piece.column == 0
    return piece.columns == sum(length for _, length in columns)


def _by_kernel_backward(
    kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, out: Tensor, logsumexp: Tensor,
    literals: Literals, rows: Runs, columns: Runs, dropping: Dropping | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made: list[Tensor] = []
    for piece in _pieces(q, mask, literals, rows, columns):
        upper, ours = (piece.queries(x).flatten(1, 2) for x in (grad, q))
        of_q, of_k, of_v = kernel.backward(
            upper, ours, piece.keys(k), piece.keys(v), piece.queries(out).flatten(1, 2),
            seen(piece.sums(logsumexp)).flatten(1, 2), _bias(piece, mask, literals, q), piece.sight is Sight.DIAGONAL,
            literals.scale, drop_of(dropping, piece),
        )  # fmt: skip
        of_q = of_q.unflatten(1, q.shape[1:3])
        if not made and piece.rows == q.shape[3] and piece.columns == k.shape[2]:
            return of_q, of_k, of_v
        made = made or [_zeros_of(x) for x in (q, k, v)]
        piece.queries(made[0]).add_(of_q)
        piece.keys(made[1]).add_(of_k)
        piece.keys(made[2]).add_(of_v)
        del of_q, of_k, of_v  # before the next are made
    return _in_types(made or [_zeros_of(x) for x in (q, k, v)], q, k, v)


def heads_inside(q: Tensor) -> bool:
    """Whether the heads of a position are side by side in memory. All ranks say the same."""
    return q.stride(1) < q.stride(3)


def nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result and log-sum-exp of queries that have seen nothing yet. The result lies in memory as `q` does."""
    dtype, shape = compute_dtype(q.dtype), (*q.shape[:-1], v.shape[-1])
    out = _zeros_of(q, v.shape[-1]) if heads_inside(q) else torch.zeros(shape, dtype=dtype, device=q.device)
    return out, torch.full(q.shape[:-1], _NOTHING, dtype=dtype, device=q.device)


def _zeros_of(x: Tensor, width: int | None = None) -> Tensor:
    """Zeros of the shape of `x`, with the heads of a position side by side in memory, to add up in."""
    batch, *heads, length, last = x.shape
    shape = (batch, length, *heads, last if width is None else width)
    return torch.zeros(shape, dtype=compute_dtype(x.dtype), device=x.device).movedim(1, -2)


def _in_types(made: list[Tensor], *like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (one.to(x.dtype) for one, x in zip(made, like, strict=True))
    return of_q, of_k, of_v


# tiles


def _by_tiles(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, literals: Literals, rows: Runs, columns: Runs,
    dropping: Dropping | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, logsumexp = nothing(q, v)
    for heads, piece in _tiles(q, mask, literals, rows, columns, dropping):
        scores, _ = _scores(piece, heads.rows(q), heads.keys(k), heads.mask(mask), literals)
        sums = torch.logsumexp(scores, -1)
        weights = scores.sub_(seen(sums).unsqueeze(-1)).exp_()
        if isinstance(mask, Tensor) and mask.is_floating_point():
            counted = weights.sum(-1, keepdim=True).masked_fill_((sums >= LOWEST).unsqueeze(-1), 1)
            weights = weights.div_(counted.clamp_(min=1))
        if dropping is not None:
            weights = dropping.drop(weights, heads.first, piece)
        part = torch.matmul(weights, piece.keys(heads.keys(v)).to(weights.dtype).unsqueeze(2))
        before = piece.queries(heads.rows(out)), piece.sums(heads.rows(logsumexp))
        combine(*before, part, sums, (piece.column, piece.columns))
        del scores, weights, part  # before the next are made
    return out, logsumexp


def _by_tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, out: Tensor, logsumexp: Tensor,
    literals: Literals, rows: Runs, columns: Runs, dropping: Dropping | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = [_zeros_of(x) for x in (q, k, v)]
    for heads, piece in _tiles(q, mask, literals, rows, columns, dropping):
        upper, ours, result, total = (heads.rows(x) for x in (grad, q, out, logsumexp))
        given = upper, ours, result, total, heads.keys(k), heads.keys(v), heads.mask(mask)
        grads = heads.rows(made[0]), heads.keys(made[1]), heads.keys(made[2])
        _tile_backward(piece, *given, literals, grads, heads.first, dropping)
    return _in_types(made, q, k, v)


def _tile_backward(
    piece: Piece, grad: Tensor, q: Tensor, out: Tensor, logsumexp: Tensor, k: Tensor, v: Tensor, mask: Mask | None,
    literals: Literals, grads: tuple[Tensor, Tensor, Tensor], first: tuple[int, int, int], dropping: Dropping | None,
) -> None:  # fmt: skip
    """Add what a tile gives to the gradients of q, k and v."""
    grad_q, grad_k, grad_v = grads
    dtype = grad_q.dtype
    ours, upper = (piece.queries(x).to(dtype) for x in (q, grad))
    keys, values = (piece.keys(x).to(dtype).unsqueeze(2) for x in (k, v))
    scores, slope = _scores(piece, q, k, mask, literals, sloped=True)
    weights = scores.sub_(seen(piece.sums(logsumexp)).unsqueeze(-1)).exp_()
    change = torch.matmul(upper, values.mT)
    dropped = weights
    if dropping is not None:
        dropped = dropping.drop(weights.clone(), first, piece)
        change = dropping.drop(change, first, piece)
    piece.keys(grad_v).add_(_over_group(torch.matmul(dropped.mT, upper)))
    del dropped
    change = change.sub_((upper * piece.queries(out)).sum(-1, keepdim=True)).mul_(weights).mul_(literals.scale)
    if slope is not None:
        change = change.mul_(slope)
    piece.queries(grad_q).add_(torch.matmul(change, keys))
    piece.keys(grad_k).add_(_over_group(torch.matmul(change.mT, ours)))


def _over_group(x: Tensor) -> Tensor:
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)


def _scores(
    piece: Piece, q: Tensor, k: Tensor, mask: Mask | None, literals: Literals, *, sloped: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The scores of a piece, and the slope of their soft cap if it is asked for."""
    dtype, slope = compute_dtype(q.dtype), None
    keys = piece.keys(k).to(dtype).unsqueeze(2)
    scores = torch.matmul(piece.queries(q).to(dtype), keys.mT).mul_(literals.scale)
    if literals.softcap:
        scores = scores.div_(literals.softcap).tanh_()
        slope = scores.square().neg_().add_(1) if sloped else None
        scores = scores.mul_(literals.softcap)
    if mask is not None:
        bias = pairs(piece, mask)
        scores = scores.masked_fill_(bias.logical_not(), _NOTHING) if bias.dtype == torch.bool else scores.add_(bias)
    if piece.sight is Sight.BAND:
        scores = scores.masked_fill_(piece.seen(literals, q.device).logical_not_(), _NOTHING)
    return scores, slope


class _Heads:
    """Some of the heads: all of them (`first` is None), or one of them."""

    def __init__(self, first: tuple[int, int, int] | None) -> None:
        self.first = (0, 0, 0) if first is None else first
        self._index = None if first is None else tuple(slice(i, i + 1) for i in first)

    def rows(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, group, ...]` of these heads."""
        return x if self._index is None else x[self._index]

    def keys(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, ...]` of these heads."""
        return x if self._index is None else x[self._index[:2]]

    def mask(self, x: Mask | None) -> Mask | None:
        if x is None or self._index is None:
            return x
        if isinstance(x, MaskFunction):
            inner = self.mask(x.mask)
            assert not isinstance(inner, MaskFunction)
            return x.of(self._index[0], inner)
        return x[tuple(slice(0, 1) if n == 1 else one for n, one in zip(x.shape, self._index, strict=False))]


def _tiles(
    q: Tensor, mask: Mask | None, literals: Literals, rows: Runs, columns: Runs, dropping: Dropping | None
) -> Iterator[tuple[_Heads, Piece]]:
    """Tiles of all heads at once; with dropout of the single device's stream head by head and in full rows, in the
    order in which they are drawn."""
    most = tile_bytes(q.device) // compute_dtype(q.dtype).itemsize
    ordered = None if dropping is None else dropping.heads
    if dropping is not None and ordered is not None:
        for first in ordered:
            yield from ((_Heads(first), piece) for piece in tiles(rows, columns, literals, most, dropping.width))
        return
    count = q.shape[0] * q.shape[1] * q.shape[2]
    if min(count, q.shape[-1]) > 0:
        found = tiles(rows, columns, literals, max(most // count, 1))
        found = _not_empty(found, mask) if isinstance(mask, MaskFunction) else found
        yield from ((_Heads(None), piece) for piece in found)
