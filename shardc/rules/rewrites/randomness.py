"""Random operators, rewritten so that every mesh draws the same numbers as a single device, or independent ones.

The same ones: every rank goes through the stream of the global tensor, and may keep only its part. So a split saves
memory and later work, but not the drawing. Bernoulli numbers are drawn from a state of the generator, which takes no
time to move on: a rank draws its part alone, in backward again if that is cheaper than to keep it.

Independent ones (`Builder.independent`): a rank draws its part from a seed, as often as it is needed. What is drawn by
the values of operands (`multinomial` and its like) remains the single device's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import captured
from shardc.ir.program import value_of
from shardc.rules.drawn import Drawn
from shardc.rules.notation import ONLY, Rule, Variant, Workspace, letters, mark, parse, rule
from shardc.rules.rewrites.builder import Builder
from shardc.runtime.kernels import random
from shardc.runtime.kernels.bernoulli import BLOCK

aten = torch.ops.aten
Decomposition = Callable[..., Any]


@rule(random.draw)
def draw(shape: Any, *_: Any, dtype: torch.dtype, **__: Any) -> Rule:
    x = torch.empty(shape, device="meta")
    drawn = Drawn((), x.numel(), dtype.itemsize)
    return parse(f"-> {mark(letters(x), range(x.dim()), '~')}", body=random.draw, drawn=drawn)


@rule(random.bernoulli_state)
def bernoulli_state(shape: Any, **_: Any) -> Rule:
    return parse("-> n!")


@rule(random.bernoulli)
def bernoulli_from(state: torch.Tensor, shape: Any, *_: Any, **__: Any) -> Rule:
    """A rank draws whole blocks of the last dims, and of those before only its part (see `streams.filled`)."""
    x, factors = torch.empty(shape, device="meta"), list[str]()
    while len(factors) < x.dim() and (not factors or math.prod(shape[len(factors) :]) > BLOCK):
        factors.append(f"d{len(factors)}")
    drawn = Drawn(tuple(factors), math.prod(shape[len(factors) :]), itemsize=1)
    dims = mark(letters(x), range(x.dim()), "~")
    needed = Workspace((), 1, min(x.numel(), BLOCK), most=BLOCK)
    body = Variant(ONLY, random.bernoulli, workspace=(needed,))
    return parse(f"n! -> {dims}", drawn=drawn, variants=[body], workspace=(needed,))


@rule(random.fresh_seed)
def fresh_seed() -> Rule:
    return parse("-> n!")


@rule(random.draw_from)
def draw_from(seed: torch.Tensor, shape: Any, *_: Any, **__: Any) -> Rule:
    x = torch.empty(shape, device="meta")
    drawn = Drawn(tuple(f"d{dim}" for dim in range(x.dim())), stream=False)
    return parse(f"n! -> {mark(letters(x), range(x.dim()), '~')}", body=random.draw_from, drawn=drawn)


@rule(random.randperm)
def randperm(count: int, **_: Any) -> Rule:
    return parse(f"-> {'n!' if count != 1 else '1'}")


@rule(random.multinomial)
def multinomial(weights: torch.Tensor, count: int, *_: Any, **__: Any) -> Rule:
    """Every rank goes through the random numbers of all rows, and uses the weights of its rows only."""
    *rows, last = letters(weights)
    batch = mark(rows, range(len(rows)), "~")
    column = f"{last}!" if last != "1" else "1"
    return parse(f"{batch} {column} -> {batch} {'j!' if count != 1 else '1'}", body=random.multinomial)


@rule(random.poisson, random.binomial, random.standard_gamma, random.sample_dirichlet)
def elementwise(*operands: torch.Tensor, **_: Any) -> Rule:
    return parse(f"{', '.join(_whole(x) for x in operands)} -> {_whole(operands[0])}")


@rule(random.rrelu)
def rrelu(x: torch.Tensor, *_: Any, **__: Any) -> Rule:
    return parse(f"{_whole(x)} -> {_whole(x)}, {_whole(x)}")


def _whole(x: torch.Tensor) -> str:
    return mark(letters(x), range(x.dim()))


def _filled(distribution: str, *defaults: float) -> Decomposition:
    """The decomposition of a functionalised in-place method: its operand has the shape, its parameters are numbers."""

    def decomposition(b: Builder, x: fx.Node, *parameters: float) -> fx.Node:
        return b.draw(distribution, *parameters, *defaults[len(parameters) :], strides=_strides(x))

    return decomposition


def _made(distribution: str, *parameters: float) -> Decomposition:
    """The decomposition of a factory or its `_like`: the parameters of its distribution are fixed."""

    def decomposition(b: Builder, *_: Any, **__: Any) -> fx.Node:
        return b.draw(distribution, *parameters)

    return decomposition


def randint(b: Builder, *arguments: Any, **_: Any) -> fx.Node:
    """`arguments`: `[low,] high, size` or `x, [low,] high`."""
    bounds = [number for number in arguments if isinstance(number, int)]
    return b.draw("random", *([0] * (2 - len(bounds))), *bounds)


def normal(b: Builder, mean: fx.Node | float, std: fx.Node | float = 1.0, *_: Any, **__: Any) -> fx.Node:
    """If mean or deviation is a tensor, it shifts or scales a standard normal tensor."""
    if not isinstance(mean, fx.Node) and not isinstance(std, fx.Node):
        return b.draw("normal", mean, std)
    return b(aten.add.Tensor, b(aten.mul.Tensor, b.draw("normal", 0.0, 1.0), std), mean)


def bernoulli(b: Builder, x: fx.Node, chance: fx.Node | float | None = None) -> fx.Node:
    """Without `chance`, `x` holds the chances. A tensor of chances is compared with uniform numbers, as in torch."""
    if isinstance(chance, (int, float)):
        return b.bernoulli(chance, strides=_strides(x))
    chances, strides = (x, None) if chance is None else (chance, _strides(x))
    dtype = torch.float64 if value_of(chances).dtype == torch.float64 else torch.float32
    return b(aten.lt.Tensor, b.draw("uniform", 0.0, 1.0, dtype=dtype, strides=strides), chances)


def native_dropout(b: Builder, x: fx.Node, probability: float, train: bool | None = True) -> tuple[fx.Node, fx.Node]:
    """Results: `x` with dropped elements zero and the others scaled, and the mask of the elements that stay."""
    shape = value_of(x).shape
    if train is False or probability == 0:
        return x, b.full(x, shape, True, torch.bool)
    if probability == 1:
        return b.zeros(x, shape), b.full(x, shape, False, torch.bool)
    mask = b.bernoulli(1 - probability, dtype=torch.bool, strides=_strides(x))
    return b(aten.mul.Tensor, b(aten.mul.Tensor, x, mask), 1 / (1 - probability)), mask


def rrelu_with_noise(
    b: Builder, x: fx.Node, noise: fx.Node, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
) -> tuple[fx.Node, fx.Node]:  # fmt: skip
    if not training:
        return b(aten.leaky_relu.default, x, (lower + upper) / 2), noise
    results = b.run(random.rrelu, x, lower, upper, strides=_strides(x))
    return b.item(results, 0), b.item(results, 1)


def rrelu_backward(
    b: Builder, grad: fx.Node, x: fx.Node, noise: fx.Node, lower: float, upper: float, training: bool, is_result: bool
) -> fx.Node:
    if training and upper - lower > 1e-6:
        return b(aten.mul.Tensor, noise, grad)
    return b(aten.leaky_relu_backward.default, grad, x, (lower + upper) / 2, is_result)


def _sampled(function: Callable[..., Any]) -> Decomposition:
    """The decomposition of an operator whose draws depend on the values of its operands."""

    def decomposition(b: Builder, *operands: Any) -> fx.Node:
        return b.run(function, *operands, strides=_strides(operands[0]))

    return decomposition


def multinomial_of(b: Builder, weights: fx.Node, count: int, replacement: bool = False) -> fx.Node:
    """Without replacement, as in ATen: the indices with the largest ratio of weight to an exponential random number."""
    value = value_of(weights)
    if replacement and count > 1:
        return b.run(random.multinomial, weights, count, strides=_strides(weights))
    lowest, highest = (b(operator, weights, [-1], False) for operator in (aten.amin.default, aten.amax.default))
    bounded = b(aten.logical_and.default, b(aten.gt.Scalar, highest, 0), b(aten.lt.Scalar, highest, float("inf")))
    good = b(aten.all.default, b(aten.logical_and.default, b(aten.ge.Scalar, lowest, 0), bounded))
    message = "multinomial: every row needs a weight above 0, and no weight may be negative or infinite"
    checked = b(torch.ops.shardc.confirmed.default, weights, good, message)
    shape = [int(n) for n in value.shape]
    chances = b.draw("exponential", 1.0, dtype=value.dtype, strides=_strides(weights), shape=shape)
    scores = b(aten.div.Tensor, checked, chances)
    if count == 1:
        return b(aten.argmax.default, scores, -1, True)
    return b.item(b(aten.topk.default, scores, count), 1)


def _drawn(b: Builder, like: fx.Node, shape: Any) -> fx.Node:
    value = value_of(like)
    return b.seed(value) if b.independent else b.state(value, [int(n) for n in shape])


def _permuted(b: Builder, count: int, **_: Any) -> fx.Node:
    return b.run(random.randperm, count, dtype=b.result.dtype)


def _strides(x: fx.Node) -> list[int]:
    """The strides of the tensor into which eager mode draws for the operand `x`: those of `x`, unless elements
    overlap."""
    value = value_of(x)
    strides = captured(x).strides or value.stride()
    shared = any(stride == 0 and n > 1 for n, stride in zip(value.shape, strides, strict=True))
    return [int(n) for n in (torch.empty_like(value).stride() if shared else strides)]


DECOMPOSITIONS: Mapping[Any, Decomposition] = {
    aten.rand.default: _made("uniform", 0.0, 1.0),
    aten.rand_like.default: _made("uniform", 0.0, 1.0),
    aten.randn.default: _made("normal", 0.0, 1.0),
    aten.randn_like.default: _made("normal", 0.0, 1.0),
    aten.randint.default: randint,
    aten.randint.low: randint,
    aten.randint_like.default: randint,
    aten.randint_like.low_dtype: randint,
    aten.uniform.default: _filled("uniform", 0.0, 1.0),
    aten.normal_functional.default: _filled("normal", 0.0, 1.0),
    aten.exponential.default: _filled("exponential", 1.0),
    aten.cauchy.default: _filled("cauchy", 0.0, 1.0),
    aten.log_normal.default: _filled("log_normal", 1.0, 2.0),
    aten.geometric.default: _filled("geometric"),
    aten.random.default: _filled("random"),
    getattr(aten.random, "from"): _filled("random"),
    aten.random.to: _filled("random"),
    aten.normal.float_float: normal,
    aten.normal.Tensor_float: normal,
    aten.normal.float_Tensor: normal,
    aten.normal.Tensor_Tensor: normal,
    aten.bernoulli.default: bernoulli,
    aten.bernoulli.p: bernoulli,
    aten.bernoulli.Tensor: bernoulli,
    aten.native_dropout.default: native_dropout,
    aten.rrelu_with_noise_functional.default: rrelu_with_noise,
    aten.rrelu_with_noise_backward.default: rrelu_backward,
    aten.multinomial.default: multinomial_of,
    aten.poisson.default: _sampled(random.poisson),
    aten.binomial.default: _sampled(random.binomial),
    aten._standard_gamma.default: _sampled(random.standard_gamma),
    aten._sample_dirichlet.default: _sampled(random.sample_dirichlet),
    aten.randperm.default: _permuted,
    torch.ops.shardc.attention_draw.default: _drawn,
}
