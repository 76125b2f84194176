"""Sample calls: a call of an operator without its tensors, made small, and run on inputs of many kinds.

The sizes of a call are shrunk one by one (or grown, so that a dim of two can be cut in three). A smaller call is as
good as the original if the operator's fake kernel accepts it, and the shapes of its results change consistently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

Path = tuple[int, int | None]
"""The position of an integer argument, and its index if the argument is a list."""

MOST_ELEMENTS = 1 << 18
"""A sample call with more elements, operands and results together, does not run."""

_SIZES = ((4, 6, 5, 7, 8, 9, 10, 12, 16, 24, 32), (6, 9, 5, 10, 7, 12, 14, 4, 8, 18, 48))
"""Small sizes of two sample calls, in order of preference. What holds for one must hold for the other."""


class SampleOperand(NamedTuple):
    """Placeholder in an argument list for tensor number `number`."""

    number: int


@dataclass(frozen=True)
class SampleCall:
    """A call of `operator`: `args` and `kwargs` hold a `SampleOperand` in place of every tensor.

    `actual` are the shapes of the operands in the program, `shapes` those in this sample. `given` are the integers
    among the positional arguments in the program, `numbers` those in this sample. `results` are the shapes of the
    results.
    """

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...]
    actual: tuple[tuple[int, ...], ...]
    given: Mapping[Path, int]
    shapes: tuple[tuple[int, ...], ...]
    numbers: Mapping[Path, int]
    results: tuple[tuple[int, ...] | None, ...] = ()

    @staticmethod
    def of(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SampleCall:
        """The sample of a call with the sizes of the program. Its tensors may be fake."""
        tensors: list[Tensor] = []

        def take(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
                return SampleOperand(len(tensors) - 1)
            if isinstance(value, (list, tuple)):
                return [take(item) for item in value]
            return value

        template = tuple(take(value) for value in args), {name: take(value) for name, value in kwargs.items()}
        shapes = tuple(tuple(int(n) for n in x.shape) for x in tensors)
        numbers = dict(_numbers(template[0]))
        return SampleCall(operator, *template, tuple(x.dtype for x in tensors), shapes, numbers, shapes, numbers)

    def run(self, operands: Sequence[Tensor], numbers: Mapping[Path, int] | None = None) -> list[Tensor | None]:
        """The results on these operands. `numbers` replaces the integers of this sample.

        TypeError if the operator returns something other than tensors and None.
        """
        numbers = self.numbers if numbers is None else numbers

        def put(value: Any, path: Path) -> Any:
            if isinstance(value, SampleOperand):
                return operands[value.number]
            if isinstance(value, list):
                return [put(item, (path[0], i)) for i, item in enumerate(value)]  # type: ignore[misc]
            return numbers.get(path, value)

        args = [put(value, (i, None)) for i, value in enumerate(self.args)]
        kwargs = {name: put(value, (-1, None)) for name, value in self.kwargs.items()}
        results = self.operator(*args, **kwargs)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        if not all(one is None or isinstance(one, Tensor) for one in results):
            raise TypeError("it returns something that is not a tensor")
        return results

    def fake(self) -> tuple[tuple[int, ...] | None, ...] | None:
        """The shapes of the results, from the fake kernel; None if it does not accept the call."""
        try:
            with _quiet(), FakeTensorMode(), torch.no_grad():
                results = self.run([torch.empty(s, dtype=d) for s, d in zip(self.shapes, self.dtypes, strict=True)])
            return tuple(None if x is None else tuple(int(n) for n in x.shape) for x in results)
        except Exception:  # an operator may raise anything on a call that it does not accept
            return None

    @property
    def elements(self) -> int:
        """The number of elements of all operands and results."""
        return sum(math.prod(shape) for shape in (*self.shapes, *(s for s in self.results if s is not None)))


@contextmanager
def _quiet() -> Generator[None]:
    """Silence torch's log of calls that a fake kernel does not accept, because here many are expected."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _numbers(args: Sequence[Any]) -> Iterator[tuple[Path, int]]:
    for position, value in enumerate(args):
        if type(value) is int:
            yield (position, None), value
        elif isinstance(value, list):
            yield from (((position, i), item) for i, item in enumerate(value) if type(item) is int)  # type: ignore[misc]


def sample_calls(call: SampleCall) -> list[SampleCall]:
    """The call at two sets of small sizes, then at its original sizes. Samples too large to run are left out."""
    shapes = call.fake()
    if shapes is None:
        return []
    call = replace(call, results=shapes)
    samples = [*(_small(call, order) for order in _SIZES), call]
    unique = [s for i, s in enumerate(samples) if s.shapes not in [t.shapes for t in samples[:i]]]
    return [sample for sample in unique if sample.elements <= MOST_ELEMENTS]


def _small(call: SampleCall, order: Sequence[int]) -> SampleCall:
    """The call with every size replaced by a small one, one after the other.

    Two sizes change at once if one divides the other, as a dim and its half.
    """
    sizes = sorted({n for shape in call.actual for n in shape if n > 1}, reverse=True)
    chosen: dict[int, int] = {}
    best = call

    def attempt(change: Mapping[int, int]) -> SampleCall | None:
        mapping = {**chosen, **change}
        kept = [n for n in sizes if n not in mapping]
        if len({*mapping.values(), *kept}) < len(mapping) + len(kept):
            return None  # different sizes stay different
        return _resized(call, mapping, best.numbers, change)

    for size in sizes:
        if size in chosen:
            continue
        halves = sorted({size >> k for k in range(1, 24) if size >> k > max(order)})
        changes: list[dict[int, int]] = [{size: n} for n in (*order, *halves) if n != size]
        for other in sizes:
            if other not in chosen and other != size and (size % other == 0 or other % size == 0):
                low, high = sorted((size, other))
                changes += [{low: n, high: n * (high // low)} for n in order if n < low]
        for change in changes:
            sample = attempt(change)
            if sample is not None:
                best, chosen = sample, {**chosen, **change}
                break
    return best


def _resized(
    call: SampleCall, mapping: Mapping[int, int], numbers: Mapping[Path, int], change: Mapping[int, int]
) -> SampleCall | None:
    """The call with other sizes, if the operator accepts them and the shapes of its results change alike.

    An integer argument that equals a size may or may not be that size. A small one is first assumed not to be.
    """
    shapes = tuple(tuple(mapping.get(n, n) for n in shape) for shape in call.actual)
    moved = {path: change[n] for path, n in call.given.items() if n in change}
    variants = [{**numbers, **moved}, numbers] if all(n > 8 for n in change) else [numbers, {**numbers, **moved}]
    for variant in variants if moved else [numbers]:
        sample = replace(call, shapes=shapes, numbers=variant)
        results = sample.fake()
        if results is None or len(results) != len(call.results):
            continue
        pairs = zip(call.results, results, strict=True)
        if all(_consistent(before, after, mapping) for before, after in pairs):
            return replace(sample, results=results)
    return None


def _consistent(before: tuple[int, ...] | None, after: tuple[int, ...] | None, mapping: Mapping[int, int]) -> bool:
    if before is None or after is None:
        return before is after
    return len(before) == len(after) and all(
        a == mapping.get(b, a) and (a == 1) == (b == 1) for b, a in zip(before, after, strict=True)
    )


class InputKind(NamedTuple):
    """A kind of input: floats by name, integers by name, and the share of true among booleans."""

    floats: str
    integers: str
    true: float


KINDS = (
    InputKind("signed", "index", 0.5),
    InputKind("large", "index", 0.7),
    InputKind("ties", "index", 0.3),
    InputKind("positive", "index", 0.5),
    InputKind("unit", "index", 0.9),
    InputKind("small", "index", 0.1),
    InputKind("tiny", "index", 0.5),
    InputKind("huge", "index", 0.5),
    InputKind("vast", "index", 0.5),
    InputKind("mixed", "index", 0.5),
    InputKind("special", "index", 0.5),
    InputKind("signed", "signed", 0.5),
    InputKind("signed", "wide", 0.5),
    InputKind("definite", "index", 0.5),
)
"""Floats: both signs, magnitudes far apart and mixed (so that both sides of a threshold occur), ties, the domain (0,
1), infinities and NaN, positive definite matrices. Integers: valid indices, indices that may count from the end,
others."""

SCALES = {"signed": 1.0, "large": 30.0, "small": 1e-3, "tiny": 1e-15, "huge": 1e5, "vast": 1e25}
"""Kinds of floats with both signs, with their magnitude."""


def draw(call: SampleCall, kind: InputKind, dtypes: Sequence[torch.dtype], generator: torch.Generator) -> list[Tensor]:
    """Random operands for a sample call, with these dtypes."""
    sizes = [n for shape in call.shapes for n in shape if n > 1]
    # indices must be in range for any dim, also for that of a result whose size is an argument
    limit = min([*sizes, *(n for n in call.numbers.values() if n > 1)], default=4)
    return [_one(s, d, kind, limit, generator) for s, d in zip(call.shapes, dtypes, strict=True)]


def _one(shape: Sequence[int], dtype: torch.dtype, kind: InputKind, limit: int, generator: torch.Generator) -> Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < kind.true
    if dtype.is_complex:
        parts = [_floats(shape, kind.floats, generator) for _ in range(2)]
        return torch.complex(*parts).to(dtype)
    if dtype.is_floating_point:
        return _floats(shape, kind.floats, generator).to(dtype)
    low, high = {"index": (0, limit), "signed": (-limit, limit), "wide": (-100, 100)}[kind.integers]
    return torch.randint(low if dtype.is_signed else 0, high, tuple(shape), generator=generator).to(dtype)


def _floats(shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if kind == "ties":
        return (uniform() * 5).floor() - 2
    if kind == "positive":
        return normal().exp()
    if kind == "unit":
        return uniform() * 0.98 + 0.01
    if kind == "definite" and len(shape) > 1 and shape[-1] == shape[-2]:
        x = normal()
        return x @ x.mT + shape[-1] * torch.eye(shape[-1], dtype=torch.float64)
    if kind == "mixed":
        return normal() * 10 ** (40 * uniform() - 20)
    values = normal() * (0.7 * normal()).exp()
    if kind == "special":
        odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0], dtype=torch.float64)
        picks = odd[torch.randint(0, len(odd), tuple(shape), generator=generator)]
        return torch.where(uniform() < 0.15, picks, values)
    return values * SCALES.get(kind, 1.0)
