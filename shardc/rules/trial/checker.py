"""The checker tests hypotheses about an operator: it cuts the operands, runs the parts, and puts the results together.

A hypothesis holds if the parts recombine to the results for every kind of input that the operator accepts and for every
partition. Partitions have two or three parts, even and uneven ones, down to single elements. Some take every other
element, since an axis may split the minor part of a dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from shardc.rules.trial.recombine import (
    FOLDS,
    Cell,
    How,
    Partition,
    all_close,
    close,
    combines,
    positions,
    precision,
    wrong,
)
from shardc.rules.trial.sample_call import KINDS, InputKind, Path, SampleCall, draw
from shardc.runtime.kernels.widening import LOW


def unchecked(call: SampleCall) -> bool:
    """Whether integers may be indices that the operator does not check. Compiled operators, also torch's, may not."""
    return any(map(_counts, call.dtypes)) and call.operator._schema.name not in OPDEFS


@contextmanager
def undisturbed() -> Generator[None]:
    """For a trial: keep the program's random stream, and run on one thread, which is fastest for tiny operators."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(threads)


class Cut(NamedTuple):
    """A hypothetical factor: the dim of every operand that is cut (`carriers`, None: it stays whole), the integer
    arguments that become the part's size (`scaled`), and the whole operands that become addends (`shares`)."""

    carriers: tuple[int | None, ...]
    scaled: frozenset[Path] = frozenset()
    shares: frozenset[int] = frozenset()


class Run(NamedTuple):
    """A kind of input, operands of that kind, and the results on them."""

    kind: InputKind
    operands: list[Tensor]
    results: list[Tensor | None]


class Unrunnable(Exception):
    """The operator accepts no made-up inputs."""


class Unfit(Exception):
    """The results do not depend on the values of the operands alone, so no rule can describe the operator."""


def partitions(size: int) -> list[Partition]:
    """Partitions of the elements of a dim, most telling first."""
    every = list(range(size))
    result = [[every[:-1], every[-1:]], [every[:1], every[1:]], [every[::2], every[1::2]]]
    if size % 2 == 0:
        result.append([every[: size // 2], every[size // 2 :]])
    if size > 2:
        result += [[every[:1], every[1:-1], every[-1:]], [every[::3], every[1::3], every[2::3]]]
    return [p for i, p in enumerate(result) if p not in result[:i]]


class Checker:
    """A sample call, the inputs that it accepts, and its results on them.

    `brief` means one kind of input and two partitions. `example` has operands of the user, for operators that do not
    accept made-up ones; then the checker only checks the user's rule. Unrunnable if the operator accepts no inputs,
    Unfit if no rule can describe it.
    """

    def __init__(self, call: SampleCall, *, brief: bool = False, example: Sequence[Tensor] | None = None) -> None:
        self.call, self.brief, self.example = call, brief, example
        self._generator = torch.Generator().manual_seed(len(call.shapes))
        self.runs: list[Run] = []
        for self.dtypes in _types(call.dtypes) if example is None else [call.dtypes]:
            self.runs = list(self._accepted())
            if any(_tells(run) for run in self.runs):
                break
        if not any(_tells(run) for run in self.runs):
            raise Unrunnable
        if not brief:
            self._refuse_unfit()
        first = self.runs[0].results
        self.varies = [
            example is not None or any(not close(run.results[i], one, 0.0) for run in self.runs[1:])
            for i, one in enumerate(first)
        ]

    def _accepted(self) -> Iterator[Run]:
        if self.example is not None:
            results = self.results(self.example)
            if results is not None:
                yield Run(KINDS[0], list(self.example), results)
            return
        negative = any(map(_counts, self.dtypes)) and not unchecked(self.call)
        kinds = [kind for kind in KINDS if kind.integers == "index" or negative]
        for kind in kinds[:1] if self.brief else kinds:
            for _ in range(2):
                operands = draw(self.call, kind, self.dtypes, self._generator)
                results = self.results(operands)
                if results is not None and [None if r is None else tuple(r.shape) for r in results] == [
                    *self.call.results
                ]:
                    yield Run(kind, operands, results)

    def results(
        self, operands: Sequence[Tensor], numbers: Mapping[Path, int] | None = None
    ) -> list[Tensor | None] | None:
        """The results on the operands; None if the operator does not accept them."""
        try:
            with torch.no_grad():
                return self.call.run(operands, numbers)
        except Exception:  # an operator may raise anything on operands that it does not accept
            return None

    def _refuse_unfit(self) -> None:
        for run in self.runs[:2]:
            again = self.results(run.operands)
            if again is None or not all_close(again, run.results, 0.0):
                raise Unfit("two runs on equal operands differ, so it draws random numbers or keeps state")
            turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in run.operands]
            other = self.results(turned)
            if other is not None and not all_close(other, run.results, 1e-3):
                raise Unfit("its results depend on the strides of its operands")

    def options(self, cut: Cut) -> list[set[How]] | None:
        """For each result, all effects that the cut may have; None if the parts do not give some result."""
        size, unproven = self._size(cut), self._unproven(cut)
        options: list[set[How]] | None = None
        asked = set[int]()
        for partition in partitions(size)[: 2 if self.brief else None]:
            lengths = {*map(len, partition)} - asked
            if not all(self._plausible(cut, length) for length in lengths):
                return None
            asked |= lengths
            for run in self.runs:
                cells = self.cells(run, [cut], [partition])
                if cells is None:
                    return None
                seen = [
                    self._outcomes(i, whole, [results[i] for results in cells.values()], partition, run.kind, unproven)
                    for i, whole in enumerate(run.results)
                ]
                options = seen if options is None else [a & b for a, b in zip(options, seen, strict=True)]
                if not all(options):
                    return None
        return options

    def _plausible(self, cut: Cut, length: int) -> bool:
        """Whether the meta kernel accepts parts of a length. Real kernels may read out of bounds if operands do not
        fit."""
        shapes = [[*shape] for shape in self.call.shapes]
        for shape, dim in zip(shapes, cut.carriers, strict=True):
            if dim is not None:
                shape[dim] = length
        numbers = {**self.call.numbers, **dict.fromkeys(cut.scaled, length)}
        pairs = zip(shapes, self.dtypes, strict=True)
        try:
            self.call.run([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in pairs], numbers)
        except NotImplementedError:  # there is no meta kernel; the real one will run, and its results will be compared
            return True
        except Exception:
            return False
        return True

    def _size(self, cut: Cut) -> int:
        sizes = {s[d] for s, d in zip(self.call.shapes, cut.carriers, strict=True) if d is not None}
        (size,) = sizes | {self.call.numbers[path] for path in cut.scaled}
        return size

    def _outcomes(
        self, index: int, whole: Tensor | None, parts: list[Tensor | None], partition: Partition, kind: InputKind,
        unproven: bool,
    ) -> set[How]:  # fmt: skip
        if whole is None:
            return {"same"} if all(part is None for part in parts) else set()
        present = [part for part in parts if part is not None]
        if len(present) != len(parts):
            return set()
        outcomes: set[How] = set()
        size = sum(map(len, partition))
        for dim in (d for d, n in enumerate(whole.shape) if n == size):
            pieces = (whole.index_select(dim, positions(tuple(p))) for p in partition)
            if all(close(a, b, precision(whole), kind) for a, b in zip(present, pieces, strict=True)):
                outcomes.add(dim)
        # a result that is equal in all runs cannot show how it depends on the operands
        if self.varies[index] or self.brief:
            if all(close(part, whole, precision(whole), kind) for part in present):
                outcomes.add("same")
            folds = () if unproven or whole.dtype is torch.bool or whole.dtype in LOW else FOLDS
            numeric = {"max", "min"} if whole.is_complex() else set[str]()
            outcomes |= {how for how in folds if how not in numeric and combines(how, present, whole, kind)}
        return outcomes

    def _unproven(self, cut: Cut) -> bool:
        """Whether operands that carry the factor hold integers, of which the trial only tried valid indices."""
        carried = (d for d, dim in zip(self.dtypes, cut.carriers, strict=True) if dim is not None)
        return unchecked(self.call) and self.example is None and any(map(_counts, carried))

    def cells(
        self, run: Run, cuts: Sequence[Cut], partitions: Sequence[Partition]
    ) -> dict[Cell, list[Tensor | None]] | None:
        """The results of every rank, on a mesh with one axis for each of `partitions`.

        None if the operator does not accept the operands of some rank.
        """
        operands = [self._parts(k, x, cuts, partitions) for k, x in enumerate(run.operands)]
        results_of: dict[Cell, list[Tensor | None]] = {}
        for cell in itertools.product(*(range(len(partition)) for partition in partitions)):
            numbers = dict(self.call.numbers)
            for cut, partition, i in zip(cuts, partitions, cell, strict=True):
                numbers |= dict.fromkeys(cut.scaled, len(partition[i]))
            results = self.results([parts(cell) for parts in operands], numbers)
            if results is None or len(results) != len(run.results):
                return None
            results_of[cell] = results
        return results_of

    def _parts(
        self, k: int, x: Tensor, cuts: Sequence[Cut], partitions: Sequence[Partition]
    ) -> Callable[[Cell], Tensor]:
        """The part of operand `k` that a rank holds, by the rank's cell."""
        shared = [i for i, cut in enumerate(cuts) if k in cut.shares]
        addends = self.addends(x, math.prod(len(partitions[i]) for i in shared))

        def part(cell: Cell) -> Tensor:
            number = 0
            for i in shared:
                number = number * len(partitions[i]) + cell[i]
            local = addends[number]
            for cut, partition, i in zip(cuts, partitions, cell, strict=True):
                dim = cut.carriers[k]
                local = local if dim is None else local.index_select(dim, positions(tuple(partition[i])))
            return local

        return part

    def addends(self, x: Tensor, count: int) -> list[Tensor]:
        """Random tensors that sum to `x`."""
        scale = float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()) if x.numel() and count > 1 else 1.0
        terms: list[Tensor] = []
        for _ in range(count - 1):
            noise = torch.randn(x.shape, generator=self._generator, dtype=torch.float64) * (scale or 1.0)
            terms.append(noise.to(x.dtype))
        return [*terms, x - sum(terms) if terms else x]

    def additive(self, group: frozenset[int]) -> bool:
        """Whether the operator is additive in the operands of `group` together."""
        telling, enough = 0, 4 if self.example is None else 1
        for run in self.runs:
            rest, mixed = run.operands, run.kind.floats == "mixed"
            if run.kind.floats == "special":  # infinite addends of one operand, the others finite
                rest = self.runs[0].operands
            for _ in range(6 if mixed or self.example is not None else 1):
                terms = {k: self._terms(run, k, rest[k]) for k in group}
                if not self._sums(rest, terms, run.kind):
                    return False
            telling += run.kind.floats in ("signed", "large", "small", "huge") and _tells(run)
        return telling >= enough

    def _terms(self, run: Run, k: int, x: Tensor) -> list[Tensor]:
        if run.kind.floats == "special":
            return [run.operands[k], x]
        if run.kind.floats != "mixed":
            return self.addends(x, 3)
        # for thresholds: addends and sum differ by at most a few powers of ten
        first = x * torch.randn(x.shape, generator=self._generator, dtype=torch.float64).mul(3).to(x.dtype)
        return [first, x - first]

    def _sums(self, rest: Sequence[Tensor], terms: Mapping[int, list[Tensor]], kind: InputKind) -> bool:
        count = len(next(iter(terms.values())))
        whole = self.results([torch.stack(terms[k]).sum(0) if k in terms else x for k, x in enumerate(rest)])
        parts = [self.results([terms[k][i] if k in terms else x for k, x in enumerate(rest)]) for i in range(count)]
        if whole is None or any(part is None or len(part) != len(whole) for part in parts):
            return False
        for index, total in enumerate(whole):
            present = [part[index] for part in parts if part is not None]
            if total is None and all(one is None for one in present):
                continue
            if total is None or not (total.is_floating_point() or total.is_complex()) or total.dtype in LOW:
                return False
            if not self.varies[index] or not combines("sum", present, total, kind):
                return False
        return True

    def difference(self, cuts: Sequence[Cut], hows: Sequence[Sequence[How]]) -> str:
        """What goes wrong if the cuts, applied together, have the effects `hows` on the results; empty if nothing does.

        `hows` has one sequence for each cut, with one entry for each result.
        """
        several = len(cuts) > 1
        each = [(partitions(self._size(cut))[1:3] or partitions(2)) if several else partitions(self._size(cut))
                for cut in cuts]  # fmt: skip
        for chosen in itertools.islice(itertools.product(*each), 4 if several else None):
            for run in self.runs[:: 3 if several else 1]:
                cells = self.cells(run, cuts, chosen)
                if cells is None:
                    return f"Cut into {' and '.join(map(str, chosen))}, the operator does not accept a part"
                for index, whole in enumerate(run.results):
                    values = {cell: results[index] for cell, results in cells.items()}
                    problem = wrong(whole, values, [how[index] for how in hows], chosen, run.kind)
                    if problem:
                        return f"Cut into {' and '.join(map(str, chosen))}, result {index} {problem}"
        return ""


def _counts(dtype: torch.dtype) -> bool:
    """Whether a dtype is of signed integers."""
    return not (dtype.is_floating_point or dtype.is_complex) and dtype.is_signed


def _types(dtypes: Sequence[torch.dtype]) -> list[tuple[torch.dtype, ...]]:
    """The dtypes of the operands to try, most precise first."""
    widest = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
    candidates = [
        tuple(torch.float64 if d.is_floating_point else widest.get(d, d) for d in dtypes),
        tuple(torch.float32 if d in LOW else d for d in dtypes),
        tuple(dtypes),
    ]
    return [types for i, types in enumerate(candidates) if types not in candidates[:i]]


def _tells(run: Run) -> bool:
    """Whether at least one result consists mostly of finite numbers."""
    return any(x is not None and x.numel() and bool(x.isfinite().double().mean() > 0.5) for x in run.results)
