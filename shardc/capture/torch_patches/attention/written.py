"""Attention that a model writes out, as the one operator.

    scores = q @ k.mT / 8 + mask        the notes on the results: Scores, Scores, Scores,
    weights = F.softmax(scores, -1)     Weights,
    weights = F.dropout(weights, 0.1)   Weights
    out = weights @ v             ->    %out, %lse = shardc.attention(%q, %k, %v, %mask, ...)

What the notes describe is traced as it is written, too. Where nothing else reads it, it is dead code. Weights go
through `shardc::attention_weights`, so that capture sees where something reads them: there it traces the model again,
without notes at that line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from shardc.capture.torch_patches.attention.notes import Notes, note_source
from shardc.capture.torch_patches.attention.scores import Scores, noted, product, reshaped
from shardc.capture.torch_patches.attention.sdpa import SDPA, AttentionOptions, attended, attention, unrepeated
from shardc.capture.torch_patches.autocast import lowered
from shardc.runtime.kernels.attention.blocks import compute_dtype
from shardc.runtime.kernels.attention.operator import attention_draw


@torch.library.custom_op("shardc::attention_weights", mutates_args=())
def attention_weights(weights: Tensor, draw: Tensor | None, dropout: float, site: int) -> Tensor:
    """The weights of attention that was recognised at a site, after dropout. It stands in traces only."""
    return weights.clone()


@torch.library.custom_op("shardc::attention_fill", mutates_args=())
def attention_fill(where: Tensor, value: float, dtype: torch.dtype, site: int) -> Tensor:
    """`value` where scores are replaced by it, else 0, to be added: equal to that if every row has other elements.

    It stands in traces only: where that cannot be shown, capture traces the model again.
    """
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, value)


@attention_weights.register_fake
def _(weights: Tensor, draw: Tensor | None, dropout: float, site: int) -> Tensor:
    return torch.empty_like(weights)


@attention_fill.register_fake
def _(where: Tensor, value: float, dtype: torch.dtype, site: int) -> Tensor:
    return torch.empty_like(where, dtype=dtype)


@torch.library.custom_op("shardc::attention_product", mutates_args=())
def attention_product(out: Tensor) -> Tensor:
    """The result of attention as a product of matrices lies in memory. It stands in traces only: there it tells what
    eager mode makes of it."""
    return out.contiguous().clone()


@attention_product.register_fake
def _(out: Tensor) -> Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


attention_product.register_autograd(lambda _, grad: attention_product(grad))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.draw, ctx.dropout, ctx.site = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return attention_weights(grad, ctx.draw, ctx.dropout, ctx.site), None, None, None


PRODUCT = torch.ops.shardc.attention_product.default
WEIGHTS = torch.ops.shardc.attention_weights.default
FILL = torch.ops.shardc.attention_fill.default
attention_weights.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class Weights:
    """The softmax of scores. `joined`: the column of the sinks still stands at the end of each row."""

    scores: Scores
    joined: bool
    site: int
    draw: Tensor | None = None
    dropout: float = 0.0


class Unrecognised(Exception):
    """The model is to be traced again, without the operator at some sites."""

    def __init__(self, sites: set[int]) -> None:
        super().__init__()
        self.sites = sites


class Recognition:
    """Where attention that is written out becomes the operator: everywhere, but at the sites that `leave` names.

    A site is a line of the user's code. The same object serves all traces of a model.
    """

    def __init__(self) -> None:
        self._sites: dict[str, int] = {}
        self._left = set[int]()
        self._off = False
        self.used = set[int]()
        """Sites where the operator stands in the trace that is running or was the last."""

    def site(self, line: str) -> int | None:
        site = self._sites.setdefault(line, len(self._sites))
        return None if self._off or site in self._left else site

    def leave(self, sites: set[int]) -> None:
        self._left |= sites

    def stop(self) -> None:
        """From now on, at no site."""
        self._off = True
        self.used.clear()

    def check(self, calls: Iterable[fx.Node]) -> None:
        """Raise Unrecognised for weights that the calls of a trace read, and for what could not be shown of a mask."""
        sites = set[int]()
        for node in calls:
            if (
                node.target is WEIGHTS and (node.args[1] is not None or node.args[3] in self.used)
            ) or node.target is FILL:
                sites.add(int(node.args[3]))  # type: ignore[arg-type]
        if sites:
            raise Unrecognised(sites)


class WrittenAttention:
    """Calls the functions of torch in a trace, and follows what attention is made of."""

    def __init__(self, recognition: Recognition) -> None:
        self.notes = Notes()
        self._recognition = recognition
        recognition.used.clear()

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """What stands in the place of `F.scaled_dot_product_attention`."""
        return attention(self.notes, *args, **kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], line: str) -> Any:
        """`function(*args, **kwargs)`, or attention where that completes it."""
        if function is SDPA:
            return self.attention(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if bool(peek_interpreter_stack()) or forward_ad._current_level >= 0:
            return function(*args, **kwargs)  # the operator knows no transforms
        if function is F.multi_head_attention_forward:
            return self._multi_head(function, args, kwargs, line)
        note = None
        if name in _PRODUCTS:
            operands, order = _einsum(args) if name == "einsum" else (_operands(name, args, kwargs), None)
            weights = self.notes.get(operands[0], Weights) if operands else None
            out = self._attended(weights, *operands) if operands and weights is not None else None
            if out is not None:
                return out if order is None else out.permute(order)
            note = product(*operands) if operands and order is None else None
        elif name == "dropout" and args:
            dropped = self._dropped(*args, **kwargs)
            if dropped is not None:
                return dropped
        else:
            note = noted(self.notes, name, args, kwargs)
        result = function(*args, **kwargs)
        note_source(self.notes, name, args, kwargs, result)
        if name == "softmax":
            return self._softmax(result, args, kwargs, line)
        self._note(name, args, result, note)
        return result

    def read(self, getter: Callable[..., Any], tensor: Any, *rest: Any) -> Any:
        """An attribute of a tensor: `x.mT` is noted as a transpose is."""
        result = getter(tensor, *rest)
        if isinstance(result, Tensor):
            note_source(self.notes, getattr(getattr(getter, "__self__", None), "__name__", ""), (tensor,), {}, result)
        return result

    def _note(self, name: str, args: tuple[Any, ...], result: Any, note: Any) -> None:
        if name == "max" and note is not None:
            self.notes.put(result[0], note)
        elif not isinstance(result, Tensor) or not result.is_floating_point():
            return
        elif note is not None:
            self.notes.put(result, note)
        elif args and (weights := self.notes.get(args[0], Weights)) is not None:
            self.notes.put(result, _kept(name, args, weights))
        elif name in _VIEWS and args and (scores := self.notes.get(args[0], Scores)) is not None:
            self.notes.put(result, reshaped(scores, tuple(result.shape)))

    def _softmax(self, result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], line: str) -> Tensor:
        scores = self.notes.get(args[0] if args else kwargs.get("input"), Scores)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        site = self._recognition.site(line) if scores is not None else None
        if scores is None or site is None or dim not in (-1, result.ndim - 1):
            return result
        result = attention_weights(result, None, 0.0, site)
        self.notes.put(result, Weights(scores, scores.sinks is not None, site))
        return result

    def _dropped(
        self, input: Tensor, p: float = 0.5, training: bool | None = None, train: bool = True, **_: Any
    ) -> Any:
        """The result of dropout on weights; None for dropout on anything else."""
        weights = self.notes.get(input, Weights)
        if weights is None or weights.dropout or not 0 <= p < 1:
            return None
        if p == 0 or not (train if training is None else training):
            return input
        if weights.joined or not input.dtype == weights.scores.q.dtype == weights.scores.keys.dtype:
            return None
        if not input.is_contiguous() and weights.scores.sinks is None:
            return None
        draw = attention_draw(weights.scores.q, input.shape)  # not of the weights, which are to be dead code
        result = attention_weights(input, draw, p, weights.site)
        self.notes.put(result, replace(weights, draw=draw, dropout=p))
        return result

    def _attended(self, weights: Weights, given: Tensor, value: Any, *rest: Any) -> Tensor | None:
        """The product of weights and values by the operator; None where it does not fit."""
        scores = weights.scores
        if weights.joined or rest or not isinstance(value, Tensor):
            return None
        lead, before = given.shape[:-2], scores.shape[:-2]
        if lead != before and value.shape[:-2] == lead:  # a view has changed the dims before those of rows
            value = value.reshape(*before, *value.shape[-2:])
        if value.ndim != len(scores.shape) or not _broadcasts(value.shape[:-2], before):
            return None
        q, keys, v = lowered(scores.q), lowered(scores.keys), lowered(value)
        keys, v, _ = unrepeated(self.notes, scores.keys, value) if keys is scores.keys and v is value else (keys, v, 1)
        dtype = torch.promote_types(torch.promote_types(q.dtype, keys.dtype), v.dtype)
        wanted = v.dtype
        q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, keys.transpose(-1, -2), v))
        mask = _mask(scores, q, weights.site)
        scale = scores.scale * scores.softcap if scores.softcap else scores.scale
        options = AttentionOptions(
            mask, scores.sinks, weights.draw, False, scale, softcap=scores.softcap, dropout=weights.dropout
        )
        out = _by_rank(q, k, v, options)
        self._recognition.used.add(weights.site)
        out = out if lead == before else out.reshape(*lead, *out.shape[-2:])
        return attention_product(out if out.dtype == wanted else out.to(wanted))

    def _multi_head(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], line: str
    ) -> Any:
        """F.multi_head_attention_forward: by the operator, and the weights, which most models ignore, beside it."""
        given = dict(zip(_HEADS, args, strict=False)) | dict(kwargs)
        drops = given.get("training", True) and given["dropout_p"] > 0
        site = self._recognition.site(line)
        if not given.get("need_weights", True) or drops or site is None:
            return function(*args, **kwargs)
        hint = given.get("is_causal", False) and given.get("attn_mask") is None
        out, _ = function(**{**given, "need_weights": False, "is_causal": hint})
        _, weights = function(*args, **kwargs)
        self._recognition.used.add(site)
        return out, attention_weights(weights, None, 0.0, site)


_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
_COPIES = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone")
_HEADS = tuple(F.multi_head_attention_forward.__code__.co_varnames[:25])


def _operands(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of `product` for a matrix product, or None if it is no plain one."""
    if name == "baddbmm":
        given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | dict(kwargs)
        beta, alpha = given.get("beta", 1), float(given.get("alpha", 1))
        return given["batch1"], given["batch2"], alpha, given["input"] * beta if beta else None
    return args if len(args) == 2 and not kwargs else None


def _einsum(args: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[int] | None]:
    """The operands of the matrix product that an einsum is, and the order of its dims in the result, if it is another;
    None for no matrix product."""
    equation, operands = args[0], args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    terms, _, result = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    first, _, second = terms.partition(",")
    inner, every = set(first) & set(second) - set(result), [first, second, result]
    letters = all(term.isalpha() and len(set(term)) == len(term) >= 3 for term in every)
    if not letters or len(inner) != 1 or set(result) | inner != set(first) | set(second) or len(operands) != 2:
        return None, None
    rows, columns = set(first) - set(second), set(second) - set(first)
    if len(rows) != 1 or len(columns) != 1:
        return None, None
    lead = "".join(dim for dim in result if dim not in rows | columns)
    row, column, summed = rows.pop(), columns.pop(), inner.pop()
    x, y = _turned(operands[0], first, lead + row + summed), _turned(operands[1], second, lead + summed + column)
    made = lead + row + column
    return (x, y), None if made == result else [made.index(dim) for dim in result]


def _turned(x: Tensor, dims: str, wanted: str) -> Tensor:
    return x if dims == wanted else x.permute([dims.index(dim) for dim in wanted])


def _kept(name: str, args: tuple[Any, ...], weights: Weights) -> Weights | None:
    """The note on the result of an operator on weights."""
    if name in _COPIES or (name in _VIEWS and not weights.joined and weights.scores.sinks is None):
        return weights
    if name == "__getitem__" and weights.joined:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        every = (Ellipsis, slice(None))
        cut = index[-1] == slice(None, -1) and all(part in every for part in index[:-1])
        whole = Ellipsis in index or len(index) == len(weights.scores.shape)
        return replace(weights, joined=False) if cut and whole else None
    return None


def _broadcasts(lead: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(n == 1 or n == size for n, size in zip(lead, wanted, strict=True))


def _mask(scores: Scores, q: Tensor, site: int) -> Tensor | None:
    """The mask that the operator takes."""
    mask = scores.bias
    if scores.fill is not None:
        filled = attention_fill(scores.fill, scores.value, compute_dtype(q.dtype), site)
        mask = filled if mask is None else mask + filled
    if scores.keep is None or mask is None:
        return mask if scores.keep is None else scores.keep
    return torch.where(scores.keep, mask, float("-inf"))


def _by_rank(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """`attended`, where groups of queries have a dim of their own: q `[batch, kv_heads, group, q_length, head_dim]`."""
    if k.shape[-3] != v.shape[-3]:
        heads = max(k.shape[-3], v.shape[-3])
        k, v = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (k, v))
    if q.ndim != 5 or k.shape[2] != 1:
        return attended(q, k, v, options)
    shared, group = max(q.shape[1], k.shape[1]), q.shape[2]
    q = q.expand(q.shape[0], shared, *q.shape[2:]).flatten(1, 2)
    k, v = (x.expand(x.shape[0], shared, *x.shape[2:]).squeeze(2) for x in (k, v))
    mask = options.mask
    if mask is not None and mask.ndim > 3:
        one = mask.shape[-4:-2].numel() == 1
        mask = (
            mask.squeeze(-3) if one else mask.expand(*mask.shape[:-4], shared, group, *mask.shape[-2:]).flatten(-4, -3)
        )
    return attended(q, k, v, replace(options, mask=mask)).unflatten(1, (shared, group))
