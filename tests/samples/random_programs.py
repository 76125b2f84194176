"""The steps of random programs, by family of operators; `grow` makes a program of them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from samples.grower import Grower, Program

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "sin": torch.sin, "gelu": F.gelu, "silu": F.silu,
    "neg": torch.neg, "abs": torch.abs, "square": lambda x: 0.5 * x * x, "scale": lambda x: 1.5 * x,
    "shift": lambda x: x - 0.3,
    "rsub": lambda x: 1 - x, "rsqrt": lambda x: torch.rsqrt(x * x + 1), "log1p": lambda x: torch.log1p(x * x),
    "erf": torch.erf,
    "exp": lambda x: torch.exp(-x * x), "power": lambda x: x**3 / 4, "clamp": lambda x: x.clamp(-0.7, 0.8),
    "softplus": F.softplus, "leaky_relu": F.leaky_relu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reciprocal": lambda x: 1 / (x * x + 1), "elu": F.elu, "hardtanh": F.hardtanh, "logsigmoid": F.logsigmoid,
    "zeros": torch.zeros_like, "detach": lambda x: x.detach() * 2,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": lambda x, y: x / (y * y + 1),
    "maximum": torch.maximum, "minimum": torch.minimum, "scaled add": lambda x, y: torch.add(x, y, alpha=0.7),
    "where": lambda x, y: torch.where(x > y, x, y * 0.5), "greater": lambda x, y: (x > y).to(x.dtype),
    "atan2": lambda x, y: torch.atan2(x, y * y + 0.5), "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "lerp": lambda x, y: torch.lerp(x + y, y.expand_as(x + y), 0.3),
}  # fmt: skip


def unary(g: Grower) -> None:
    name = g.random.choice(list(UNARY))
    g.emit(name, UNARY[name], g.pick())


def binary(g: Grower) -> None:
    one = g.pick()
    shape = g.shape(one)

    def fits(other: Tensor) -> bool:
        return all(a == b or 1 in (a, b) for a, b in zip(reversed(shape), reversed(other.shape), strict=False))

    if g.random.random() < 0.3:  # broadcast a new leaf along some dims
        keep = g.random.randrange(len(shape) + 1)
        other = g.leaf([n if g.random.random() < 0.7 else 1 for n in shape[keep:]] or [1])
    else:
        other = g.pick(test=fits)
        if not fits(g.tensor(other)):
            return
    name = g.random.choice(list(BINARY))
    pair = (one, other) if g.random.random() < 0.5 else (other, one)
    g.emit(name, BINARY[name], *pair)


def linear(g: Grower) -> None:
    x = g.pick(1)
    w = g.leaf([g.size(), g.shape(x)[-1]], "parameter")
    if g.random.random() < 0.5:
        g.emit("linear", lambda x, w: F.linear(x, w) / 2, x, w)
    else:
        b = g.leaf([g.shape(w)[0]], "parameter")
        g.emit("linear+bias", F.linear, x, w, b)


def matmul(g: Grower) -> None:
    x = g.pick(1)
    shape = g.shape(x)
    if g.random.random() < 0.4 and len(shape) > 1:
        g.emit("x xT", lambda x: x @ x.transpose(-1, -2) / 2, x)
        return
    batch = shape[:-2] if g.random.random() < 0.5 else []
    y = g.leaf([*batch, shape[-1], g.size()] if g.random.random() < 0.8 else [shape[-1]])
    g.emit("matmul", torch.matmul, x, y)


def einsum(g: Grower) -> None:
    x = g.pick(3, 3)
    if len(g.shape(x)) == 3:
        y = g.leaf([g.shape(x)[0], g.shape(x)[2], g.size()])
        g.emit("bhk", lambda x, y: torch.einsum("abk,akd->bad", x, y), x, y)


def attention(g: Grower) -> None:
    batch, heads, length, width = (g.random.choice((1, 2, 3)) for _ in range(4))
    keys = g.size()
    q, k, v = (g.leaf([batch, heads, n, width]) for n in (length, keys, keys))
    causal = g.random.random() < 0.5
    if g.random.random() < 0.3:
        mask = g.leaf([1, 1, length, keys], "input")
        g.emit(
            "masked attention", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), q, k, v, mask
        )
    else:
        g.emit("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, k, v)


def reduce(g: Grower) -> None:
    x = g.pick(1)
    dims, keep = g.dims(x), g.random.random() < 0.4
    d = dims[0]
    many = g.shape(x)[d] > 1
    menu: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(dims, keep), "mean": lambda x: x.mean(dims, keep), "amax": lambda x: x.amax(dims, keep),
        "amin": lambda x: x.amin(dims, keep), "logsumexp": lambda x: x.logsumexp(dims, keep),
        "max": lambda x: x.max(d, keep).values, "sum all": lambda x: x.sum(), "mean all": lambda x: x.mean(),
        "prod": lambda x: x.prod(d, keep), "cumsum": lambda x: x.cumsum(d),
        "argmax": lambda x: x.argmax(d, keep).to(x.dtype),
    }  # fmt: skip
    if many:
        menu["var"] = lambda x: x.var(d, keepdim=keep)
        menu["norm"] = lambda x: (x.square().sum(d, keepdim=keep) + 1).sqrt()
    name = g.random.choice(list(menu))
    g.emit(f"{name} {dims}", menu[name], x)


def softmax(g: Grower) -> None:
    x = g.pick(1)
    d = g.dim(x)
    name = g.random.choice(("softmax", "log_softmax"))
    g.emit(f"{name} {d}", lambda x: getattr(F, name)(x, d), x)


def norm(g: Grower) -> None:
    x = g.pick(1)
    shape = g.shape(x)
    last = shape[-g.random.randint(1, len(shape)) :]
    if g.random.random() < 0.5:
        w, b = g.leaf(last, "parameter"), g.leaf(last, "parameter")
        g.emit(f"layer_norm {last}", lambda x, w, b: F.layer_norm(x, last, w, b, 1e-2), x, w, b)
    elif g.random.random() < 0.5:
        g.emit(f"plain layer_norm {last}", lambda x: F.layer_norm(x, last, None, None, 1e-2), x)
    else:
        w = g.leaf(last, "parameter")
        g.emit(f"rms_norm {last}", lambda x, w: F.rms_norm(x, last, w, 1e-2), x, w)


def view(g: Grower) -> None:
    x = g.pick(1)
    shape = g.shape(x)
    rank = len(shape)
    kind = g.random.choice(
        ("permute", "merge", "split", "expand", "unsqueeze", "squeeze", "flatten", "regroup", "remerge")
    )
    if kind == "permute":
        order = g.random.sample(range(rank), rank)
        g.emit(f"permute {order}", lambda x: x.permute(order), x)
    elif kind == "merge" and rank > 1:
        d = g.random.randrange(rank - 1)
        g.emit(f"flatten {d}", lambda x: x.flatten(d, d + 1), x)
    elif kind == "split":
        d = g.random.randrange(rank)
        outer = g.random.choice([n for n in range(1, shape[d] + 1) if shape[d] % n == 0])
        g.emit(f"unflatten {d} {outer}", lambda x: x.unflatten(d, (outer, shape[d] // outer)), x)
    elif kind == "expand":
        sizes = [g.size() if n == 1 else n for n in shape]
        sizes = [g.size(), *sizes] if g.random.random() < 0.3 else sizes
        g.emit(f"expand {sizes}", lambda x: x.expand(sizes), x)
    elif kind == "unsqueeze" and rank < 4:
        d = g.random.randrange(rank + 1)
        g.emit(f"unsqueeze {d}", lambda x: x.unsqueeze(d), x)
    elif kind == "squeeze":
        g.emit("squeeze", lambda x: x.squeeze(), x)
    elif kind == "flatten":
        g.emit("reshape -1", lambda x: x.reshape(-1), x)
    elif kind == "regroup" and rank > 1:  # cut across dims, so that the view becomes an operator
        sizes = g.random.sample(shape, rank)
        g.emit(f"reshape {sizes}", lambda x: x.reshape(sizes), x)
    elif kind == "remerge" and rank > 1:  # split heads, move them, merge them
        g.emit("transpose flatten", lambda x: x.transpose(-1, -2).flatten(-2), x)


def shape(g: Grower) -> None:
    x = g.pick(1)
    sizes, d = g.shape(x), g.random.randrange(len(g.shape(x)))
    n = sizes[d]
    kind = g.random.choice(
        ("cat", "stack", "slice", "strided", "select", "split", "chunk", "pad", "flip", "roll", "repeat", "tril",
        "triu", "unbind",
         "halves", "cat mixed", "negative pad", "diagonal", "narrow cat")
    )  # fmt: skip
    if kind in ("cat", "stack"):
        other = g.pick(test=lambda t: list(t.shape) == sizes)
        if g.shape(other) == sizes:
            function = torch.cat if kind == "cat" else torch.stack
            g.emit(f"{kind} {d}", lambda x, y: function([x, y], d), x, other)
    elif kind == "cat mixed":
        other = g.leaf([g.size() if i == d else s for i, s in enumerate(sizes)])
        g.emit(f"cat {d}", lambda x, y: torch.cat([y, x, y], d), x, other)
    elif kind == "slice":
        start = g.random.randrange(n)
        stop = g.random.randint(start + 1, n)
        g.emit(f"narrow {d} {start}:{stop}", lambda x: x.narrow(d, start, stop - start), x)
    elif kind == "strided":
        start, step = g.random.randrange(n), g.random.choice((2, 3))
        g.emit(f"slice {d} {start}::{step}", lambda x: x[(slice(None),) * d + (slice(start, None, step),)], x)
    elif kind == "select":
        i = g.random.randrange(-n, n)
        g.emit(f"select {d} {i}", lambda x: x.select(d, i), x)
    elif kind == "split":
        part = g.random.randint(1, n)
        which = g.random.randrange(-(-n // part))
        g.emit(f"split {d} {part} [{which}]", lambda x: x.split(part, d)[which], x)
    elif kind == "chunk":
        g.emit(f"chunk {d}", lambda x: torch.cat(tuple(reversed(x.chunk(2, d))), d), x)
    elif kind == "unbind":
        g.emit(f"unbind {d}", lambda x: x.unbind(d)[0] * x.unbind(d)[-1], x)
    elif kind == "halves" and n % 2 == 0:  # rotary embedding's
        g.emit(f"rotate half {d}", lambda x: torch.cat((-x.narrow(d, n // 2, n // 2), x.narrow(d, 0, n // 2)), d), x)
    elif kind == "narrow cat":
        g.emit(f"shift {d}", lambda x: torch.cat((x.narrow(d, 0, 1), x.narrow(d, 0, n - 1)), d) if n > 1 else x, x)
    elif kind == "pad":
        before, after = g.random.randrange(3), g.random.randrange(3)
        g.emit(f"pad {before},{after}", lambda x: F.pad(x, (before, after), value=0.5), x)
    elif kind == "negative pad" and sizes[-1] > 1:
        g.emit("pad -1", lambda x: F.pad(x, (-1, 1)), x)
    elif kind == "flip":
        g.emit(f"flip {d}", lambda x: x.flip(d), x)
    elif kind == "roll":
        g.emit(f"roll {d}", lambda x: x.roll(1, d), x)
    elif kind == "repeat":
        times = [g.random.choice((1, 1, 2)) for _ in sizes]
        g.emit(f"repeat {times}", lambda x: x.repeat(times), x)
    elif kind in ("tril", "triu") and len(sizes) > 1:
        k = g.random.randrange(-1, 2)
        g.emit(f"{kind} {k}", lambda x: getattr(torch, kind)(x, k), x)
    elif kind == "diagonal" and len(sizes) > 1:
        g.emit("diagonal", lambda x: x.diagonal(dim1=-2, dim2=-1), x)


def index(g: Grower) -> None:
    x = g.pick(1)
    sizes, d = g.shape(x), g.random.randrange(len(g.shape(x)))
    kind = g.random.choice(
        ("embedding", "gather", "index_select", "scatter_add", "index_put", "index", "two indices", "scatter",
        "index_add", "take",
         "topk", "sort", "cross entropy", "one_hot")
    )  # fmt: skip
    if kind == "embedding":
        w = g.leaf([g.size() + 1, g.size()], "parameter")
        i = g.integers([g.size() for _ in range(g.random.randint(1, 2))], g.shape(w)[0])
        padding = g.random.choice((None, 0))
        g.emit("embedding", lambda w, i: F.embedding(i, w, padding), w, i)
    elif kind == "gather":
        i = g.integers([g.size() if k == d else s for k, s in enumerate(sizes)], sizes[d])
        g.emit(f"gather {d}", lambda x, i: x.gather(d, i), x, i)
    elif kind == "take":
        i = g.integers([1 if k != d else g.size() for k in range(len(sizes))], sizes[d])
        g.emit(f"take_along_dim {d}", lambda x, i: torch.take_along_dim(x, i, d), x, i)
    elif kind == "index_select":
        i = g.integers([g.size()], sizes[d])
        g.emit(f"index_select {d}", lambda x, i: x.index_select(d, i), x, i)
    elif kind in ("scatter_add", "scatter"):
        source = g.leaf([g.size() if k == d else s for k, s in enumerate(sizes)])
        i = g.integers(g.shape(source), sizes[d])
        if kind == "scatter":  # each place once, as the order of writers is not defined
            i = g.integers([1 if k == d else s for k, s in enumerate(sizes)], sizes[d])
            source = g.leaf(g.shape(i))
        g.emit(f"{kind} {d}", lambda x, i, s: getattr(x, kind)(d, i, s), x, i, source)
    elif kind == "index_add":
        i = g.integers([g.size()], sizes[d])
        source = g.leaf([g.shape(i)[0] if k == d else s for k, s in enumerate(sizes)])
        g.emit(f"index_add {d}", lambda x, i, s: x.index_add(d, i, s), x, i, source)
    elif kind == "index_put":
        i = g.integers([g.size()], sizes[0])
        source = g.leaf([g.shape(i)[0], *sizes[1:]])
        g.emit("index_put", lambda x, i, s: x.index_put((i,), s, accumulate=True), x, i, source)
    elif kind == "index":
        i = g.integers([g.size() for _ in range(g.random.randint(1, 2))], sizes[d])
        g.emit(f"index {d}", lambda x, i: x[(slice(None),) * d + (i,)], x, i)
    elif kind == "two indices" and len(sizes) > 1:
        n = g.size()
        i, j = g.integers([n], sizes[0]), g.integers([n], sizes[1])
        g.emit("x[i, j]", lambda x, i, j: x[i, j], x, i, j)
    elif kind == "topk":
        g.emit(f"topk {d}", lambda x: x.topk(1, d).values, x)
    elif kind == "sort":
        g.emit(f"sort {d}", lambda x: x.sort(d).values, x)
    elif kind == "cross entropy" and len(sizes) == 2:
        target = g.integers([sizes[0]], sizes[1])
        g.emit("cross entropy", F.cross_entropy, x, target)
    elif kind == "one_hot":
        i = g.integers([sizes[0]], 4)
        w = g.leaf([4, g.size()])
        g.emit("compare", lambda w, i: (i[:, None] == torch.arange(4)).to(w.dtype) @ w, w, i)


def mask(g: Grower) -> None:
    x = g.pick(1)
    sizes = g.shape(x)
    n, k = sizes[-1], g.random.randint(1, sizes[-1])
    kind = g.random.choice(("arange", "causal", "full", "masked_fill", "where zero", "eye"))
    if kind == "arange":
        g.emit("position", lambda x: x * torch.arange(n, dtype=x.dtype).add(1).rsqrt(), x)
    elif kind == "causal" and len(sizes) > 1:
        m = sizes[-2]
        g.emit("causal", lambda x: x.masked_fill(torch.arange(m)[:, None] < torch.arange(n), 0.0), x)
    elif kind == "masked_fill":
        g.emit(f"masked_fill {k}", lambda x: x.masked_fill(torch.arange(n) >= k, -1.0), x)
    elif kind == "where zero":
        g.emit("where", lambda x: torch.where(x > 0.2, x, torch.zeros((), dtype=x.dtype)), x)
    elif kind == "full":
        g.emit("full", lambda x: torch.full((n,), 0.5, dtype=x.dtype) + x + torch.ones_like(x), x)
    elif kind == "eye" and len(sizes) > 1:
        g.emit("eye", lambda x: x + torch.eye(sizes[-2], n, dtype=x.dtype), x)


def window(g: Grower) -> None:
    batch, channels = g.random.choice((1, 2, 4)), g.random.choice((1, 2, 4))
    height = g.random.choice((3, 4, 6))
    kind = g.random.choice(
        ("conv2d", "grouped", "strided", "conv1d", "max_pool", "avg_pool", "batch_norm", "group_norm")
    )
    if kind == "conv1d":
        x, w = g.leaf([batch, channels, height]), g.leaf([g.random.choice((2, 4)), channels, 3], "parameter")
        g.emit("conv1d", lambda x, w: F.conv1d(x, w, padding=1) / 3, x, w)
        return
    x = g.leaf([batch, channels, height, 4])
    if kind == "max_pool":
        g.emit("max_pool", lambda x: F.max_pool2d(x, 2), x)
    elif kind == "avg_pool":
        g.emit("avg_pool", lambda x: F.adaptive_avg_pool2d(x, 1), x)
    elif kind == "batch_norm":
        w, b = g.leaf([channels], "parameter"), g.leaf([channels], "parameter")
        g.emit(
            "batch_norm", lambda x, w, b: F.batch_norm(x, torch.zeros_like(w), torch.ones_like(w), w, b, True), x, w, b
        )
    elif kind == "group_norm" and channels > 1:
        w, b = g.leaf([channels], "parameter"), g.leaf([channels], "parameter")
        g.emit("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), x, w, b)
    else:
        groups = 2 if kind == "grouped" and channels > 1 else 1
        stride = 2 if kind == "strided" else 1
        w = g.leaf([g.random.choice((2, 4)), channels // groups, 3, 3], "parameter")
        b = g.leaf([g.shape(w)[0]], "parameter")
        g.emit(kind, lambda x, w, b: F.conv2d(x, w, b, stride, 1, groups=groups) / 4, x, w, b)


def dropout(g: Grower) -> None:
    p = g.random.choice((0.2, 0.5))
    g.emit("dropout", lambda x: F.dropout(x, p, training=True), g.pick())


def cast(g: Grower) -> None:
    if g.random.random() < 0.3:
        g.emit("float32", lambda x: (x.float() * 1.5).double(), g.pick())
    else:
        i = g.integers([g.size(), g.size()], 5)
        g.emit("to double", lambda i: (i + i.sum(0)).to(torch.float64) / 4, i)


FAMILIES: dict[str, tuple[Callable[[Grower], None], ...]] = {
    "pointwise": (unary, binary, binary, mask, dropout, cast),
    "contraction": (linear, matmul, einsum, attention, linear),
    "view": (view, view, view),
    "reduction": (reduce, reduce, softmax, norm),
    "shape": (shape, shape),
    "index": (index, index),
    "window": (window,),
}


def grow(random: Random, families: tuple[str, ...], length: int, axes: int = 0) -> tuple[Program, list[Tensor]]:
    """A program of about `length` steps and its inputs; with `axes` it may `constrain` values, on the first of AXES."""
    menu = [operation for family in families for operation in FAMILIES[family]]
    return Grower(random, menu, length, axes).finish()
