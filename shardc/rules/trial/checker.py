"""The bench on which hypotheses about an operator are tried: cut the operands, run the parts, put them together.

A hypothesis holds if the parts recombine to the results on every kind of inputs that the operator accepts, for every
way to cut: at even and uneven points, in two and in three, down to single elements, and in every other element, since
an axis may split the minor part of a dim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from shardc.rules.trial.recombine import FOLDS, Cell, How, Partition, all_close, close, combines, precision, wrong
from shardc.rules.trial.sample_call import KINDS, InputKind, Path, SampleCall, draw
from shardc.runtime.kernels.widening import LOW


def unchecked(call: SampleCall) -> bool:
    """Whether integers may be indices into memory that nobody checks: of compiled operators, torch's own too."""
    return any(map(_counts, call.dtypes)) and call.operator._schema.name not in OPDEFS


@contextmanager
def undisturbed() -> Generator[None]:
    """For a trial: the program's random stream stays where it is, and tiny operators do not wait for threads."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(threads)


class Cut(NamedTuple):
    """Which dim of every operand is cut, which integer arguments shrink along, which whole operands come as addends."""

    carriers: tuple[int | None, ...]
    scaled: frozenset[Path] = frozenset()
    shares: frozenset[int] = frozenset()


class Run(NamedTuple):
    """One kind of inputs, the operands drawn, and the results on them."""

    kind: InputKind
    operands: list[Tensor]
    results: list[Tensor | None]


class Unrunnable(Exception):
    """The operator accepts no inputs that can be made up for it."""


class Unfit(Exception):
    """The operator is no function of the values of its operands: no rule can describe it."""


def partitions(size: int) -> list[Partition]:
    """Ways to cut the elements of a dim, in order of how much they tell."""
    every = list(range(size))
    found = [[every[:-1], every[-1:]], [every[:1], every[1:]], [every[::2], every[1::2]]]
    if size % 2 == 0:
        found.append([every[: size // 2], every[size // 2 :]])
    if size > 2:
        found += [[every[:1], every[1:-1], every[-1:]], [every[::3], every[1::3], every[2::3]]]
    return [p for i, p in enumerate(found) if p not in found[:i]]


class Checker:
    """A specimen, the inputs that it accepts, and its results on them. `brief`: one kind of inputs, two ways to cut.

    `example`: operands of the user, for operators that do not take made-up ones; what is tried on them is a claim.
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
        """What the operator makes of the operands; None if it does not take them."""
        try:
            with torch.no_grad():
                return self.call.run(operands, numbers)
        except Exception:  # whatever it raises on operands that it does not like
            return None

    def _refuse_unfit(self) -> None:
        for run in self.runs[:2]:
            again = self.results(run.operands)
            if again is None or not all_close(again, run.results, 0.0):
                raise Unfit("two runs on equal operands differ: it draws random numbers or keeps a state")
            turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in run.operands]
            other = self.results(turned)
            if other is not None and not all_close(other, run.results, 1e-3):
                raise Unfit("its results depend on how its operands lie in memory")

    def options(self, cut: Cut) -> list[set[How]] | None:
        """Per result all that the cut may do to it; None if some result cannot be had from the parts."""
        size, unproven = self._size(cut), self._unproven(cut)
        found: list[set[How]] | None = None
        for partition in partitions(size)[: 2 if self.brief else None]:
            if not self._plausible(cut, partition):
                return None
            for run in self.runs:
                cells = self.cells(run, [cut], [partition])
                if cells is None:
                    return None
                seen = [
                    self._outcomes(i, whole, [made[i] for made in cells.values()], partition, run.kind, unproven)
                    for i, whole in enumerate(run.results)
                ]
                found = seen if found is None else [a & b for a, b in zip(found, seen, strict=True)]
                if not all(found):
                    return None
        return found

    def _plausible(self, cut: Cut, partition: Partition) -> bool:
        """Whether the meta kernel accepts the parts: real ones may run past the end of operands that do not fit."""
        for part in partition:
            shapes = [[*shape] for shape in self.call.shapes]
            for shape, dim in zip(shapes, cut.carriers, strict=True):
                if dim is not None:
                    shape[dim] = len(part)
            numbers = {**self.call.numbers, **dict.fromkeys(cut.scaled, len(part))}
            pairs = zip(shapes, self.dtypes, strict=True)
            try:
                self.call.run([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in pairs], numbers)
            except NotImplementedError:  # there is no such kernel to object: the real one will be run and compared
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
        made = [part for part in parts if part is not None]
        if len(made) != len(parts):
            return set()
        found: set[How] = set()
        size = sum(map(len, partition))
        for dim in (d for d, n in enumerate(whole.shape) if n == size):
            pieces = (whole.index_select(dim, torch.tensor(p)) for p in partition)
            if all(close(a, b, precision(whole), kind) for a, b in zip(made, pieces, strict=True)):
                found.add(dim)
        # a result that is never anything else (no NaN, no error) tells nothing about where it comes from
        if self.varies[index] or self.brief:
            if all(close(part, whole, precision(whole), kind) for part in made):
                found.add("same")
            folds = () if unproven or whole.dtype is torch.bool or whole.dtype in LOW else FOLDS
            numeric = {"max", "min"} if whole.is_complex() else set[str]()
            found |= {how for how in folds if how not in numeric and combines(how, made, whole, kind)}
        return found

    def _unproven(self, cut: Cut) -> bool:
        """Whether the factor runs over integers of which only those were tried that may be indices."""
        carried = (d for d, dim in zip(self.dtypes, cut.carriers, strict=True) if dim is not None)
        return unchecked(self.call) and self.example is None and any(map(_counts, carried))

    def cells(self, run: Run, cuts: Sequence[Cut], ways: Sequence[Partition]) -> dict[Cell, list[Tensor | None]] | None:
        """The results of every rank of the mesh that `ways` makes; None where the operator refuses its part."""
        operands = [self._parts(k, x, cuts, ways) for k, x in enumerate(run.operands)]
        found: dict[Cell, list[Tensor | None]] = {}
        for cell in itertools.product(*(range(len(way)) for way in ways)):
            numbers = dict(self.call.numbers)
            for cut, way, i in zip(cuts, ways, cell, strict=True):
                numbers |= dict.fromkeys(cut.scaled, len(way[i]))
            made = self.results([parts(cell) for parts in operands], numbers)
            if made is None or len(made) != len(run.results):
                return None
            found[cell] = made
        return found

    def _parts(self, k: int, x: Tensor, cuts: Sequence[Cut], ways: Sequence[Partition]) -> Callable[[Cell], Tensor]:
        """What every rank holds of operand `k`."""
        shared = [i for i, cut in enumerate(cuts) if k in cut.shares]
        addends = self.addends(x, math.prod(len(ways[i]) for i in shared))

        def part(cell: Cell) -> Tensor:
            which = 0
            for i in shared:
                which = which * len(ways[i]) + cell[i]
            own = addends[which]
            for cut, way, i in zip(cuts, ways, cell, strict=True):
                dim = cut.carriers[k]
                own = own if dim is None else own.index_select(dim, torch.tensor(way[i]))
            return own

        return part

    def addends(self, x: Tensor, count: int) -> list[Tensor]:
        """Random tensors that sum to `x`."""
        scale = float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()) if x.numel() and count > 1 else 1.0
        found: list[Tensor] = []
        for _ in range(count - 1):
            noise = torch.randn(x.shape, generator=self._generator, dtype=torch.float64) * (scale or 1.0)
            found.append(noise.to(x.dtype))
        return [*found, x - sum(found) if found else x]

    def additive(self, group: frozenset[int]) -> bool:
        """Whether the operator is additive in the operands of `group` together."""
        told, enough = 0, 4 if self.example is None else 1
        for run in self.runs:
            rest, mixed = run.operands, run.kind.floats == "mixed"
            if run.kind.floats == "special":  # infinite addends of one operand, the others finite
                rest = self.runs[0].operands
            for _ in range(6 if mixed or self.example is not None else 1):
                terms = {k: self._terms(run, k, rest[k]) for k in group}
                if not self._sums(rest, terms, run.kind):
                    return False
            told += run.kind.floats in ("signed", "large", "small", "huge") and _tells(run)
        return told >= enough

    def _terms(self, run: Run, k: int, x: Tensor) -> list[Tensor]:
        if run.kind.floats == "special":
            return [run.operands[k], x]
        if run.kind.floats != "mixed":
            return self.addends(x, 3)
        # around a threshold: addends and sum lie within a few powers of ten of each other
        first = x * torch.randn(x.shape, generator=self._generator, dtype=torch.float64).mul(3).to(x.dtype)
        return [first, x - first]

    def _sums(self, rest: Sequence[Tensor], terms: Mapping[int, list[Tensor]], kind: InputKind) -> bool:
        count = len(next(iter(terms.values())))
        whole = self.results([torch.stack(terms[k]).sum(0) if k in terms else x for k, x in enumerate(rest)])
        parts = [self.results([terms[k][i] if k in terms else x for k, x in enumerate(rest)]) for i in range(count)]
        if whole is None or any(part is None or len(part) != len(whole) for part in parts):
            return False
        for index, total in enumerate(whole):
            made = [part[index] for part in parts if part is not None]
            if total is None and all(one is None for one in made):
                continue
            if total is None or not (total.is_floating_point() or total.is_complex()) or total.dtype in LOW:
                return False
            if not self.varies[index] or not combines("sum", made, total, kind):
                return False
        return True

    def difference(self, cuts: Sequence[Cut], hows: Sequence[Sequence[How]]) -> str:
        """What goes wrong when one or several cuts at once do to the results what `hows` say, per cut; empty if
        nothing does."""
        several = len(cuts) > 1
        each = [(partitions(self._size(cut))[1:3] or partitions(2)) if several else partitions(self._size(cut))
                for cut in cuts]  # fmt: skip
        for ways in itertools.islice(itertools.product(*each), 4 if several else None):
            for run in self.runs[:: 3 if several else 1]:
                cells = self.cells(run, cuts, ways)
                if cells is None:
                    return f"Cut into {' and '.join(map(str, ways))}, the operator refuses its part"
                for index, whole in enumerate(run.results):
                    values = {cell: made[index] for cell, made in cells.items()}
                    told = wrong(whole, values, [how[index] for how in hows], ways, run.kind)
                    if told:
                        return f"Cut into {' and '.join(map(str, ways))}, result {index} {told}"
        return ""


def _counts(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex) and dtype.is_signed


def _types(dtypes: Sequence[torch.dtype]) -> list[tuple[torch.dtype, ...]]:
    """The operands' types to try, the most precise first."""
    widest = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
    found = [
        tuple(torch.float64 if d.is_floating_point else widest.get(d, d) for d in dtypes),
        tuple(torch.float32 if d in LOW else d for d in dtypes),
        tuple(dtypes),
    ]
    return [types for i, types in enumerate(found) if types not in found[:i]]


def _tells(run: Run) -> bool:
    """Whether at least one result is mostly finite numbers."""
    return any(x is not None and x.numel() and bool(x.isfinite().double().mean() > 0.5) for x in run.results)
