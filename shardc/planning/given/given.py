"""Decisions that a file gives: read against a program, taken as they are, or held fixed while the rest is solved.

given                                          what becomes of it
"m@dp -> f32[32@dp, 64]"                       this strategy
"-> f32[32@dp, 64]"                            any strategy that makes this layout
"f32[256@tp, 64]"                              (of a parameter) this layout
nothing                                        the solver chooses
"...; kept as f32[32@dp, 64]"                  also this layout of what is kept for backward
"...", with no word of what is kept            the solver chooses that too, if anything is left to choose
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.planning.given.choices import kept_variable, output_variable, reread_variable, share_variable
from shardc.planning.given.entries import ARROW, END, KEPT, REREAD, SHARED, of_result
from shardc.planning.given.names import Name, names_of, output_entries
from shardc.planning.given.proof import Proof
from shardc.planning.given.texts import LayoutTexts, parsed_strategy, strategy_text
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.planning.variables import Variable
from shardc.rules.factors.factored import Factored, Op
from shardc.rules.factors.strategy import Strategy, legal, make

SHOWN = 6
"""So many legal values are named where one is not."""


@dataclass(frozen=True)
class GivenPlan:
    """What `source` says of a program: an entry per operator and value, by name; of what it leaves out there is none.

    `folds` are the axes that may fold a sequence. `proof` is None where the file was edited: then what it says is held
    fixed, and the rest is solved.
    """

    source: str
    entries: dict[Name, str]
    outputs: dict[str, str]
    folds: tuple[str, ...]
    proof: Proof | None

    @property
    def recomputes(self) -> bool:
        """Whether it says what is kept for backward, or made again there."""
        return any(", again" in text or f"{END}{KEPT}" in text for text in self.entries.values())

    def assignment(self, network: CostNetwork) -> Assignment:
        """The assignment that the entries are, for a network that need not be built. Raises ShardcError for an entry
        that is missing, or that is not legal."""
        reader, factored = EntryReader(self, network.factored, network.mesh), network.factored
        chosen = Assignment({}, {}, {}, {})
        for op in factored.ops:
            entry, shape = reader.entry(op), network.options_of(op).shape
            if entry is None:
                raise ShardcError(f"{self.source} says nothing of {' '.join(reader.names[op.node])}; plan anew")
            strategy = entry.strategy or Strategy(entry.made[0].axes)
            if not legal(shape, strategy, network.mesh):
                raise reader.refused(op, network.options_of(op).strategies)
            chosen.strategies[op.node], chosen.shapes[op.node] = strategy, shape
            for number, result in enumerate(op.results):
                shared = entry.shared.get(number) or make(shape, strategy, number, network.mesh)
                if number in entry.shared:
                    chosen.shares[result.key] = shared
                if number in entry.kept:
                    chosen.kept[result.key] = kept = entry.kept[number] or shared
                    chosen.regathered[result.key] = entry.reread.get(number, kept)
        chosen.outputs.update(reader.outputs())
        if isinstance(network, RecomputeNetwork):
            chosen.forward = frozenset(network.schedule.forward)
        return chosen

    def restrict(self, network: CostNetwork) -> None:
        """Forbid, in a network that was built and posed no problem yet, what the entries do not say. Raises ShardcError
        for an entry that nothing in the network fulfils."""
        _Restriction(self, network).run()


@dataclass
class Entry:
    """An entry, read: the strategy, and by number of the result the layouts that are made, shared, kept (None: as it is
    shared) and read in backward."""

    strategy: Strategy | None = None
    made: dict[int, Splits] = field(default_factory=dict[int, Splits])
    shared: dict[int, Splits] = field(default_factory=dict[int, Splits])
    kept: dict[int, Splits | None] = field(default_factory=dict[int, "Splits | None"])
    reread: dict[int, Splits] = field(default_factory=dict[int, Splits])


class EntryReader:
    """Reads the entries of a file for the operators of a program; those of equal layers once."""

    def __init__(self, given: GivenPlan, factored: Factored, mesh: Mesh) -> None:
        self.given, self.factored, self.mesh = given, factored, mesh
        self.names, self.texts = names_of(factored), LayoutTexts(factored, mesh)
        self._known: dict[object, Entry] = {}

    def entry(self, op: Op) -> Entry | None:
        """What the file says of an operator; None if nothing. Raises ShardcError for what cannot be read."""
        text = self.given.entries.get(self.names[op.node])
        if text is None:
            return None
        if (op.kind, text) not in self._known:
            self._known[op.kind, text] = self._read(op, text)
        return self._known[op.kind, text]

    def label(self, op: Op) -> str:
        """How messages name the entry of an operator: the file, the section, the name and what it says."""
        section, name = self.names[op.node]
        return f"{self.given.source}: {section}[{name!r}] is {self.given.entries.get((section, name))!r}"

    def refused(self, op: Op, legal_strategies: Iterable[Strategy]) -> ShardcError:
        """The error for an entry that is not legal, with what is."""
        if op.node.op == "placeholder":
            value = self.factored.base[op.results[0].key]
            texts = [self.texts.write(value, Splits(strategy.split)) for strategy in legal_strategies]
        else:
            texts = [strategy_text(op.factors, strategy) for strategy in legal_strategies]
        return self.not_one_of(self.label(op), texts)

    def not_one_of(self, label: str, texts: Sequence[str]) -> ShardcError:
        """The error for an entry that is none of the legal ones."""
        legal_texts = list(dict.fromkeys(texts))
        more = f" and {len(legal_texts) - SHOWN} more" if len(legal_texts) > SHOWN else ""
        return ShardcError(
            f"{label}, which is not legal there; write one of {'; '.join(legal_texts[:SHOWN])}{more}; or leave the "
            "entry out, and the solver chooses"
        )

    def outputs(self) -> dict[int, Splits]:
        """The layouts of the outputs that the file names, by position."""
        results, found = self.factored.program.results, dict[int, Splits]()
        for index, name in output_entries(self.factored.program).items():
            node, text = results[index], self.given.outputs.get(name)
            if node is not None and text is not None:
                label = f"{self.given.source}: outputs[{name!r}] is {text!r}"
                found[index] = self.texts.read(self.factored.values[node], text, label)
        return found

    def _read(self, op: Op, text: str) -> Entry:
        head, *clauses = text.split(END)
        entry, made = Entry(), head
        if op.node.op != "placeholder":
            strategy, arrow, made = head.partition(ARROW.strip())
            if not arrow and "[" in strategy:
                strategy, made = "", strategy
            if strategy.strip():
                entry.strategy = self._strategy(op, strategy)
        if made.strip():
            entry.made = self._made(op, made)
        for clause in clauses:
            self._clause(op, clause.strip(), entry)
        return entry

    def _strategy(self, op: Op, text: str) -> Strategy:
        try:
            return parsed_strategy(op.factors, text, self.mesh)
        except ShardcError as error:
            raise ShardcError(f"{self.label(op)}: {error}") from error

    def _made(self, op: Op, text: str) -> dict[int, Splits]:
        texts = _typed_parts(text)
        if len(texts) > len(op.results):
            raise ShardcError(f"{self.label(op)}: {len(texts)} layouts for {len(op.results)} results; give one each")
        return {number: self._layout(op, number, one) for number, one in enumerate(texts)}

    def _layout(self, op: Op, number: int, text: str) -> Splits:
        return self.texts.read(self.factored.base[op.results[number].key], text.strip(), self.label(op))

    def _clause(self, op: Op, text: str, entry: Entry) -> None:
        for number in range(len(op.results)):
            of = of_result(number)
            for word, found in ((SHARED, entry.shared), (KEPT, entry.kept), (REREAD, entry.reread)):
                if text.startswith(f"{word}{of} as "):
                    found[number] = self._layout(op, number, text.removeprefix(f"{word}{of} as "))
                    return
            if text == f"{KEPT}{of}":
                entry.kept[number] = None
                return
        raise ShardcError(
            f"{self.label(op)}: cannot read {text!r}; behind ';' write '{SHARED} as LAYOUT', '{KEPT}', "
            f"'{KEPT} as LAYOUT' or '{REREAD} as LAYOUT'"
        )


class _Restriction:
    """Forbids values of the variables of a network."""

    def __init__(self, given: GivenPlan, network: CostNetwork) -> None:
        self.network, self.reader = network, EntryReader(given, network.factored, network.mesh)
        self._arrays: dict[object, tuple[np.ndarray, object]] = {}

    def run(self) -> None:
        network, reader = self.network, self.reader
        for op in network.factored.ops:
            entry = reader.entry(op)
            if entry is not None:
                self._operator(op, entry)
        for index, splits in reader.outputs().items():
            value = network.factored.program.results[index]
            assert value is not None
            self._layouts(output_variable(network, index), splits, f"{reader.given.source}: output {index}", value)

    def _operator(self, op: Op, entry: Entry) -> None:
        variable = self.network.variables[self.network.variable_of(op.node)]
        keep = [self._fulfils(op, entry, strategy) for strategy in variable.domain if isinstance(strategy, Strategy)]
        if not any(keep):
            if entry.strategy is not None and entry.made:
                self._refuse_mismatch(op, entry.strategy)
            raise self.reader.refused(op, [one for one in variable.domain if isinstance(one, Strategy)])
        self._forbid(variable, keep)
        label = self.reader.label(op)
        for number, result in enumerate(op.results):
            shared = entry.shared.get(number)
            if shared is not None:
                self._layouts(share_variable(self.network, result.key), shared, label, op.node)
            kept = entry.kept.get(number) or (entry.shared.get(number) or entry.made.get(number))
            if number in entry.kept and kept is not None:
                self._layouts(kept_variable(self.network, result.key), kept, label, op.node)
            if number in entry.reread:
                self._layouts(reread_variable(self.network, result.key), entry.reread[number], label, op.node)

    def _fulfils(self, op: Op, entry: Entry, strategy: Strategy) -> bool:
        shape, mesh = self.network.options_of(op).shape, self.network.mesh
        if entry.strategy is not None and strategy != entry.strategy:
            return False
        return all(make(shape, strategy, number, mesh) == splits for number, splits in entry.made.items())

    def _refuse_mismatch(self, op: Op, strategy: Strategy) -> None:
        """Raise ShardcError where a legal strategy makes another layout than the entry says."""
        network = self.network
        shape = network.options_of(op).shape
        if strategy in network.variables[network.variable_of(op.node)].domain:
            made = [
                self.reader.texts.write(network.factored.base[result.key], make(shape, strategy, number, network.mesh))
                for number, result in enumerate(op.results)
            ]
            raise ShardcError(
                f"{self.reader.label(op)}, but {strategy_text(op.factors, strategy)} makes {', '.join(made)}: write "
                "that behind the arrow, or leave out one side of it"
            )

    def _layouts(self, number: int | None, splits: Splits, label: str, node: fx.Node) -> None:
        """Allow one layout of a shared, kept or returned value. Where the network has no choice of it, it is not
        needed."""
        if number is None:
            return
        variable = self.network.variables[number]
        keep = [one == splits for one in variable.domain]
        if not any(keep):
            value = self.network.factored.base[self.network.factored.values[node].key]
            known = [one for one in variable.domain if isinstance(one, Splits) and len(one.axes) == len(splits.axes)]
            raise self.reader.not_one_of(label, [self.reader.texts.write(value, one) for one in known])
        self._forbid(variable, keep)

    def _forbid(self, variable: Variable, keep: Sequence[bool]) -> None:
        """Forbid all other values. The tables of equal layers stay the same objects."""
        key = id(variable.unary), tuple(keep)
        if key not in self._arrays:
            self._arrays[key] = np.where(keep, variable.unary, np.inf), variable.unary
        variable.unary = self._arrays[key][0]


def _typed_parts(text: str) -> list[str]:
    """The layouts of a list: `f32[4@dp, 8], f32[4]` has two."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
