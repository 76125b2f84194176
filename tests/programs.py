"""Random programs: short lists of operators on small tensors, grown from a source of random choices.

A `Random` that hypothesis provides makes them shrink. A program is a module whose forward replays recorded steps, so
that capture meets ordinary calls of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardc import constrain

AXES = ("a", "b", "c")
MOST = 300  # elements of any tensor
Step = tuple[str, Callable[..., Tensor], tuple[int, ...]]


class Program(nn.Module):
    """`steps` run on parameters and inputs; the last `outputs` values are weighed into a loss or are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.returned: tuple[int, ...] = ()
        self.with_loss = True
        self.exact = True  # no step rounds to float32
        self.noise: torch.Generator | None = None

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = [*self.parameters(), *inputs]
        for _, function, operands in self.steps:
            value = function(*(values[i] for i in operands))
            if self.noise is not None and value.is_floating_point():
                value = value * (1 + 1e-14 * torch.randn(value.shape, generator=self.noise, dtype=value.dtype))
            values.append(value)
        found = [values[i] for i in self.returned]
        if not self.with_loss:
            return found
        weighed = [(torch.linspace(0.5, 1.5, f.numel(), dtype=f.dtype).view(f.shape) * f).sum() for f in found]
        return [torch.stack([w.double() for w in weighed]).sum(), *found]

    def extra_repr(self) -> str:
        return "\n".join(f"{name}{operands}" for name, _, operands in self.steps) + f"\nreturn {self.returned}"


class Grower:
    """Grows one program: `pick` and `fresh` give operands, `emit` appends a step and runs it once for its shape."""

    def __init__(self, random: Random, families: tuple[str, ...], length: int, axes: int = 0) -> None:
        self.random = random
        self.program = Program()
        self.names = AXES[:axes]
        # handles: values that steps make are 0, 1, ...; leaves are -1, -2, ...
        self.leaves: list[Tensor] = []
        self.kinds: list[str] = []
        self.steps: list[Step] = []
        self.made: list[Tensor] = []
        for _ in range(random.randint(1, 3)):
            self.leaf([self.size() for _ in range(random.randint(1, 3))])
        menu = [operation for family in families for operation in FAMILIES[family]]
        for _ in range(length):
            random.choice(menu)(self)
        if self.names and random.random() < 0.3:
            constraint(self)

    def size(self) -> int:
        return self.random.choice((1, 2, 2, 3, 4, 4, 5, 6))

    def leaf(self, shape: list[int], kind: str | None = None) -> int:
        """A new parameter or input; its handle."""
        kind = kind or self.random.choice(("parameter", "parameter", "input", "grad input"))
        generator = torch.Generator().manual_seed(len(self.leaves))
        self.leaves.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.kinds.append(kind)
        return -len(self.leaves)

    def integers(self, shape: list[int], high: int) -> int:
        generator = torch.Generator().manual_seed(len(self.leaves))
        self.leaves.append(torch.randint(0, high, shape, generator=generator))
        self.kinds.append("input")
        return -len(self.leaves)

    def tensor(self, handle: int) -> Tensor:
        return self.made[handle] if handle >= 0 else self.leaves[-handle - 1]

    def shape(self, handle: int) -> list[int]:
        return list(self.tensor(handle).shape)

    def handles(self) -> list[int]:
        """Every floating value, younger ones twice, so that programs grow deep."""
        leaves = [-i - 1 for i, t in enumerate(self.leaves) if t.is_floating_point()]
        made = [i for i, t in enumerate(self.made) if t.dtype == torch.float64]
        return leaves + made + made[-3:] + made[-2:]

    def pick(self, least: int = 0, most: int = 4, test: Callable[[Tensor], bool] = lambda t: True) -> int:
        """A floating value with `least` to `most` dims that passes `test`, or a new leaf of `least` dims."""
        good = [h for h in self.handles() if least <= len(self.shape(h)) <= most and test(self.tensor(h))]
        return self.random.choice(good) if good else self.leaf([self.size() for _ in range(max(least, 1))])

    def dim(self, handle: int, signed: bool = True) -> int:
        rank = len(self.shape(handle))
        return self.random.randrange(-rank if signed else 0, rank)

    def dims(self, handle: int) -> list[int]:
        rank = len(self.shape(handle))
        return sorted(self.random.sample(range(rank), self.random.randint(1, rank)))

    def emit(self, name: str, function: Callable[..., Tensor], *operands: int) -> int | None:
        """Append a step unless its value is empty or too large."""
        state = torch.get_rng_state()
        value = function(*(self.tensor(h) for h in operands))
        torch.set_rng_state(state)
        if not 0 < value.numel() <= MOST or not torch.isfinite(value).all() or value.abs().max() > 1e4:
            return None
        self.made.append(value)
        self.steps.append((name, function, operands))
        return len(self.made) - 1

    def finish(self) -> tuple[Program, list[Tensor]]:
        program, random = self.program, self.random
        order = [i for i, kind in enumerate(self.kinds) if kind == "parameter"]
        inputs = [i for i, kind in enumerate(self.kinds) if kind != "parameter"]
        for i in order:
            program.register_parameter(
                f"w{i}", nn.Parameter(self.leaves[i].clone(), requires_grad=random.random() < 0.9)
            )
        place = {-i - 1: at for at, i in enumerate([*order, *inputs])}
        place |= {i: len(place) + i for i in range(len(self.made))}
        program.steps = [(name, function, tuple(place[h] for h in operands)) for name, function, operands in self.steps]
        used = {h for _, _, operands in self.steps for h in operands}
        ends = [i for i in range(len(self.made)) if i not in used]
        program.returned = tuple(place[i] for i in ends) or (0,)  # nothing is dead: draws of dead code are not made
        program.with_loss = random.random() < 0.7
        program.exact = not any(name == "float32" for name, _, _ in self.steps)
        tensors = [self.leaves[i].clone().requires_grad_(self.kinds[i] == "grad input") for i in inputs]
        return program, tensors


def grow(random: Random, families: tuple[str, ...], length: int, axes: int = 0) -> tuple[Program, list[Tensor]]:
    """A program of about `length` steps and its inputs; with `axes` it may `constrain` values, on the first of AXES."""
    return Grower(random, families, length, axes).finish()


def constraint(g: Grower) -> None:
    h = g.pick(1)
    spec = random_spec(g.random, g.shape(h), dict.fromkeys(g.names, 2))
    g.emit(f"constrain{spec}", lambda x: constrain(x, spec), h)


def random_spec(random: Random, shape: list[int], axes: dict[str, int]) -> tuple[str | tuple[str, ...] | None, ...]:
    """A constraint for a tensor: mostly one that can be met, often unevenly, sometimes open, sometimes impossible."""
    free = list(axes)
    random.shuffle(free)
    spec: list[str | tuple[str, ...] | None] = []
    for size in shape:
        choice = random.random()
        if choice < 0.25:
            spec.append(None)
        elif choice < 0.45 or not free:
            spec.append("?")
        else:
            take = free[: 2 if choice > 0.93 else 1]
            if size < math.prod(axes[a] for a in take) and random.random() < 0.95:
                spec.append("?")
                continue
            free = free[len(take) :]
            spec.append(take[0] if len(take) == 1 else tuple(take))
    return tuple(spec)


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
