"""Operators that read or write rows by index. A rank reads and writes the rows of its part; see `#v` in notation.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.errors import RuleError
from shardc.rules.notation import Rule, letters, parse, rule

aten = torch.ops.aten


def _one(size: int, name: str) -> str:
    return name if size != 1 else "1"


@rule(aten.embedding.default)
def embedding(table: torch.Tensor, indices: torch.Tensor, *_: object) -> Rule:
    """Rows v of the table split: the ranks' results add up. Features d and indices split freely."""
    rows = " ".join(letters(indices, "i"))
    return parse(f"v d, #v {rows} -> {rows} d", [{0}])


@rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(grad: torch.Tensor, indices: torch.Tensor, rows: int, *rest: Any) -> Rule:
    names = " ".join(letters(indices, "i"))
    if rest and rest[0] >= 0:  # the padding index cannot be rebased; rewrites/decompositions.py masks it instead
        return parse(f"{names} d, {names} -> v! d", [{0}])
    if len(rest) > 1 and rest[1]:  # scaling by frequency counts the indices of the whole batch
        whole = " ".join(f"{n}!" if n != "1" else n for n in letters(indices, "i"))
        return parse(f"{whole} d, {whole} -> v! d", [{0}])
    del rows, grad
    return parse(f"{names} d, #v {names} -> v d", [{0}], sizes={2: "v"})


def _along(x: torch.Tensor, dim: int, index: torch.Tensor) -> tuple[str, str]:
    """Texts of a table and an index tensor. They split along dims of equal size and along `dim`; other dims stay
    whole."""
    table, indexed = letters(x), letters(index, "i" if x.dim() != index.dim() else "d")
    if x.dim() != index.dim():  # one of them is a single element without dims
        return _whole(" ".join(table)), _whole(" ".join(indexed))
    for i, (a, b) in enumerate(zip(x.shape, index.shape, strict=True)):
        if i == dim % x.dim():
            table[i], indexed[i] = _one(int(a), "v"), _one(int(b), "j")
        elif a != b:
            table[i], indexed[i] = _one(int(a), f"t{i}!"), _one(int(b), f"j{i}!")
    return " ".join(table), " ".join(indexed)


@rule(aten.gather.default)
def gather(x: torch.Tensor, dim: int, index: torch.Tensor, *_: object, **__: object) -> Rule:
    table, indexed = _along(x, dim, index)
    return parse(f"{table}, {_indexed(table)}{indexed} -> {indexed}", [{0}])


@rule(aten.scatter_add.default)
def scatter_add(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> Rule:
    table, put = _along(x, dim, index)
    if source.shape != index.shape:
        table, put = _whole(table), _whole(put)
        return parse(f"{table}, {put}, {_whole(' '.join(letters(source, 's')))} -> {table}")
    return parse(f"{table}, {_indexed(table)}{put}, {put} -> {table}", [{0, 2}])


@rule(aten.scatter.src)
def scatter(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> Rule:
    table, put = _along(x, dim, index)
    put = " ".join(f"{n}!" if n == "j" else n for n in put.split())
    if source.shape != index.shape:
        table, put = _whole(table), _whole(put)
        return parse(f"{table}, {put}, {_whole(' '.join(letters(source, 's')))} -> {table}")
    return parse(f"{table}, {_indexed(table)}{put}, {put} -> {table}", [{0, 2}])


@rule(aten.scatter.value)
def scatter_value(x: torch.Tensor, dim: int, index: torch.Tensor, value: float) -> Rule:
    del value
    table, put = _along(x, dim, index)
    put = " ".join(f"{n}!" if n == "j" else n for n in put.split())
    return parse(f"{table}, {_indexed(table)}{put} -> {table}")


def _indexed(table: str) -> str:
    return "#v " if "v" in table.split() else ""


def _whole(text: str) -> str:
    return " ".join(n if n == "1" or n.endswith("!") else f"{n}!" for n in text.split())


def _pointlike(*tensors: torch.Tensor) -> Rule | None:
    """The rule of a call whose operands are all single elements without dims; None if they are not."""
    if tensors[0].dim():
        return None
    return parse(f"{', '.join(' '.join(letters(t)) for t in tensors)} -> ", [{0, 2}] if len(tensors) > 2 else [{0}])


@rule(aten.index_select.default)
def index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> Rule:
    if (single := _pointlike(x, index)) is not None:
        return single
    table = letters(x)
    after = [*table]
    table[dim], after[dim] = _one(int(x.shape[dim]), "v"), _one(index.numel(), "j")
    return parse(
        f"{' '.join(table)}, {_indexed(' '.join(table))}{after[dim] if index.dim() else ''} -> {' '.join(after)}", [{0}]
    )


@rule(aten.scatter_reduce.two)
def scatter_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *_: object, **__: object
) -> Rule:
    """With any reduction, a rank can reduce what is written to its rows of the table."""
    table, put = _along(x, dim, index)
    put = " ".join(f"{n}!" if n == "j" else n for n in put.split())
    if source.shape != index.shape:
        table, put = _whole(table), _whole(put)
        return parse(f"{table}, {put}, {_whole(' '.join(letters(source, 's')))} -> {table}")
    return parse(f"{table}, {_indexed(table)}{put}, {put} -> {table}")


@rule(aten.index_copy.default)
def index_copy(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> Rule:
    if (single := _pointlike(x, index, source)) is not None:
        return single
    table, count = letters(x), index.numel()
    put = [*table]
    table[dim], put[dim] = _one(int(x.shape[dim]), "v"), _one(count, "j!")
    operands = f"{' '.join(table)}, {_indexed(' '.join(table))}{put[dim] if index.dim() else ''}, {' '.join(put)}"
    return parse(f"{operands} -> {' '.join(table)}", [{0, 2}])


@rule(aten.index_add.default)
def index_add(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **_: object) -> Rule:
    if (single := _pointlike(x, index, source)) is not None:
        return single
    table = letters(x)
    put = [*table]
    table[dim], put[dim] = _one(int(x.shape[dim]), "v"), _one(index.numel(), "j")
    operands = f"{' '.join(table)}, {_indexed(' '.join(table))}{put[dim] if index.dim() else ''}, {' '.join(put)}"
    return parse(f"{operands} -> {' '.join(table)}", [{0, 2}])


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Rule:
    """With one index tensor, the indexed dim may be split; with several, those dims stay whole. Other dims split
    freely."""
    used = [t for t in indices if t is not None]
    if any(t.dtype is torch.bool for t in used):
        raise RuleError("indexing with a boolean mask gives a shape that depends on the data; use torch.where")
    table, kept, where_ = _fancy(x, indices)
    broadcast = torch.broadcast_shapes(*(t.shape for t in used))
    names = [_one(int(n), f"i{k}") for k, n in enumerate(broadcast)]
    operands = [" ".join(_align(t, names)) for t in used]
    mark_ = "#v " if len(used) == 1 and "v" in table else ""
    result = [*kept[:where_], *names, *kept[where_:]]
    return parse(f"{' '.join(table)}, {mark_}{', '.join(operands)} -> {' '.join(result)}", [{0}])


@rule(aten.index_put.default)
def index_put(
    x: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, accumulate: bool = False
) -> Rule:
    """As `index`. Masks keep everything whole, and index dims split only if values accumulate."""
    used = [t for t in indices if t is not None]
    if any(t.dtype in (torch.bool, torch.uint8) for t in used):
        every = [x, *used, values]
        names = [_whole(" ".join(letters(t, f"t{k}d"))) for k, t in enumerate(every)]
        return parse(f"{', '.join(names)} -> {names[0]}")
    table, kept, where_ = _fancy(x, indices)
    broadcast = torch.broadcast_shapes(*(t.shape for t in used))
    names = [_one(int(n), f"i{k}") for k, n in enumerate(broadcast)]
    if not accumulate:  # which of two writes wins depends on their order
        names = [f"{n}!" if n != "1" else n for n in names]
    full = [*kept[:where_], *names, *kept[where_:]]
    sizes = [1] * (len(full) - values.dim()) + list(values.shape)
    # values that broadcast over an index dim are added for each index, so they must be whole where it is split
    stuck = {n for n, size in zip(full, sizes, strict=True) if size == 1 and n in names and n != "1"}
    names = [f"{n}!" if n in stuck and not n.endswith("!") else n for n in names]
    operands = [" ".join(_align(t, names)) for t in used]
    put = ["1" if n == 1 else name for n, name in zip(values.shape, full[len(full) - values.dim() :], strict=True)]
    mark_ = "#v " if len(used) == 1 and "v" in table else ""
    text = f"{' '.join(table)}, {mark_}{', '.join(operands)}, {' '.join(put)} -> {' '.join(table)}"
    return parse(text, [{0, len(used) + 1}])


@rule(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss(x: torch.Tensor, target: torch.Tensor, reduction: int) -> Rule:
    """Rows split if nothing is reduced. The classes stay whole, because the labels of a row end at the first -1."""
    rows = x.dim() == 2 and reduction == 0
    names = f"n{'' if rows else '!'} c!" if x.dim() == 2 else "c!" if x.dim() else ""
    return parse(f"{names}, {names} -> {'n' if rows else ''}, {names}")


@rule(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> Rule:
    """Even splits only, because the kernel checks its marks of targets; rows stay whole where a mean divides by all."""
    each = grad.dim() == 1
    names = ["", "c!", f"n{'' if each else '!'} c!"][x.dim()]
    return parse(f"{'n' if each else ''}, {names}, {names}, {names} -> {names}", [{0}], even=True)


def _fancy(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> tuple[list[str], list[str], int]:
    """Names of the table's dims and of those without an index, and the position of the index dims in the result."""
    table, places = letters(x), [i for i, t in enumerate(indices) if t is not None]
    single = len(places) == 1
    for i in places:
        table[i] = _one(int(x.shape[i]), "v" if single else f"v{i}!")
    kept = [n for i, n in enumerate(table) if i not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    return table, kept, places[0] if adjacent else 0


def _align(t: torch.Tensor, names: list[str]) -> list[str]:
    dims = names[len(names) - t.dim() :]
    return ["1" if n == 1 else name for n, name in zip(t.shape, dims, strict=True)]


@rule(aten.segment_reduce.default)
def segment_reduce(
    data: torch.Tensor, reduce: str, *, lengths: torch.Tensor | None = None, offsets: torch.Tensor | None = None,
    axis: int = 0, **_: Any,
) -> Rule:  # fmt: skip
    """Segments run along `axis`, which stays whole. Every row of the dims before it has other lengths."""
    del reduce
    left, bounds, right = _segments(data, lengths, offsets, axis)
    return parse(f"{left}, {bounds} -> {right}", even=axis > 0)  # padded lengths would not add up


@rule(aten._segment_reduce_backward.default)
def segment_reduce_backward(
    grad: torch.Tensor, output: torch.Tensor, data: torch.Tensor, reduce: str, *, lengths: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None, axis: int = 0, **_: Any,
) -> Rule:  # fmt: skip
    del grad, output, reduce
    left, bounds, right = _segments(data, lengths, offsets, axis)
    return parse(f"{right}, {right}, {left}, {bounds} -> {left}", [{0}], even=axis > 0)


def _segments(
    data: torch.Tensor, lengths: torch.Tensor | None, offsets: torch.Tensor | None, axis: int
) -> tuple[str, str, str]:
    """Rule texts of the data, of the lengths or offsets, and of the result."""
    limits = lengths if lengths is not None else offsets
    assert limits is not None
    names = letters(data)
    before, after = names[:axis], names[axis + 1 :]
    count = int(limits.shape[-1]) - (lengths is None)
    bounds = [*before, _one(int(limits.shape[-1]), "b!")]
    left = [*before, _one(int(data.shape[axis]), "s!"), *after]
    return " ".join(left), " ".join(bounds), " ".join([*before, _one(count, "o!"), *after])
