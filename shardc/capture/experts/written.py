"""Experts that a model writes out, as the one operator.

    for e, expert in enumerate(self.experts):      ->    %out = shardc.experts(%x, %ids, %scores, ...)
        out = out + gates[:, e, None] * expert(x)

A first trace records the model as it is written. In its graph, sums over experts are found, and it is shown which
tokens each expert works for. Then the model is traced again: the call that completes such a sum returns what the
operator computes of the same tensors, and what was written is dead code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.canonical import Rewriter, live
from shardc.capture.experts.empty_cases import FIRST_TRACE, EmptyCase, Question
from shardc.capture.experts.events import Event, Events, Record, TensorPlace
from shardc.capture.experts.expressions import ExpressionWriter
from shardc.capture.experts.gathered import GatheredRecipe, gathered_recipe
from shardc.capture.experts.gathered_products import gathered_experts
from shardc.capture.experts.networks import operand
from shardc.capture.experts.outline import Outlines
from shardc.capture.experts.recipe import ExpertsRecipe, recipe
from shardc.capture.experts.selected import SelectedRows
from shardc.capture.experts.sums import ExpertSums, Sum
from shardc.capture.torch_patches.aot_autograd import output_kinds
from shardc.errors import CaptureError
from shardc.ir.facts import Captured, describe
from shardc.ir.program import value_of

aten: Any = torch.ops.aten


class WrittenExperts:
    """What is known of the experts of a model, over all its traces."""

    def __init__(self) -> None:
        self._recipes: dict[Event, ExpertsRecipe | GatheredRecipe] = {}
        self._left = set[Event]()
        self._skipped = set[Event]()
        """Calls that write parts of such a sum, which nothing else reads."""
        self._off = False
        self._shown = False
        self._expected: list[tuple[EmptyCase, list[Any]]] = []
        """What a trace is to compute, where it is told that selections are empty: of those to come."""
        self._asked: CaptureError | None = None
        self._questions: Collection[Question] = ()
        """What code asks where nothing is empty."""
        self._outlines = Outlines()
        self.rows = SelectedRows()
        self.used = False
        """Whether the operator stands in the trace that is running or was the last."""
        self.events = Events()
        self._wanted: Mapping[Event, set[int]] = {}

    @property
    def compares(self) -> bool:
        """Whether the next trace is there to be compared: forward is enough."""
        return bool(self._expected)

    def begin(self) -> None:
        """A trace begins."""
        self.events, self.used = Events(), False
        self.rows = SelectedRows(self._expected[0][0] if self._expected else FIRST_TRACE)

    def stop(self) -> None:
        """From now on, recognise none."""
        self._off, self._recipes, self._wanted, self.used = True, {}, {}, False
        self._skipped.clear()

    def end(self) -> None:
        """The model has run: what is noted of its tensors would keep them."""
        self.events.taken.clear()
        self.rows.forget()

    def call(
        self, run: Callable[[], Any], name: str, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """`run()`, or the sum over experts that this call completes."""
        self.rows.empty.path = path
        replaced = not self._expected

        def called() -> Any:
            if replaced and writes(name):
                number = self.events.next(path)
                if number in self._skipped or number in self._recipes:
                    return None if name == "__setitem__" else args[0]
            return self.rows.call(run, name, args, kwargs)

        event, result = self.events.call(called, name, path, args, kwargs, self._wanted if replaced else {})
        made = self._recipes.get(event) if replaced else None
        if made is None:
            return result
        target = args[0] if result is None else result
        if not isinstance(target, Tensor):
            return result
        try:
            new = made.run(self._taken, target)
        except Exception as error:  # (whatever the model does otherwise than it did when it was recorded)
            raise Changed(event) from error
        self.used = True
        if result is None or (args and result is args[0]):
            target.copy_(new)
            return result
        return new

    def _taken(self, place: TensorPlace) -> Tensor:
        tensor, version = self.events.taken[place]
        if not tensor.is_inference() and tensor._version != version:
            raise ValueError("something is written into an operand before the sum is complete")
        return tensor

    def leave(self, event: Event) -> None:
        """From now on, do not replace what this call completes."""
        self._left.add(event)
        self._recipes.pop(event, None)
        self._skipped.clear()

    def unsure(self, graph: fx.Graph) -> bool:
        """Whether the model is to be traced again: with an answer to whether selections are empty, or with sums over
        experts replaced, which its graph has. Raises CaptureError where the answer makes a difference."""
        if self._expected:
            case, expected = self._expected.pop(0)
            self._shown = True
            more = self.rows.empty.questions.keys() - self._questions
            if more or self._outline(_Copy(graph), case) != expected:
                assert self._asked is not None
                self._expected, self._shown = [], False
                raise self._asked
            return True
        record = self.events.record
        empty = self.rows.empty
        asked = (empty.asked is not None or empty.segmented) and not self._shown
        if not asked and (self._off or not record.chooses):
            return False
        kept = _Copy(graph)
        more = self._search(kept, record) if record.chooses and not self._off else False
        if asked:
            self._expected = [(case, self._outline(kept, case)) for case in empty.cases()]
            self._asked, self._questions = empty.asked or empty.leaked, empty.questions.keys()
        return more or asked

    def _outline(self, kept: _Copy, case: EmptyCase) -> list[Any]:
        """What a graph computes where selections are empty."""
        false = {
            _viewed(kept.env[node]) for node in self.rows.empty.shown(self.rows.masks.items(), case) if node in kept.env
        }
        return self._outlines.of(kept.graph, kept.results, false)

    def _search(self, kept: _Copy, record: Record) -> bool:
        """Whether the graph has sums over experts that are to be replaced."""
        places = {kept.env[node]: found[0] for node, found in record.places.items() if node in kept.env}
        without = {kept.env[node] for node in record.without_gradients if node in kept.env}
        more = False
        for found in ExpertSums().find(kept.order):
            event = kept.event(found.node, record)
            if event is None or event in self._left or event in self._recipes:
                continue
            write = ExpressionWriter(places)
            try:
                made = recipe(found, write)
            except LookupError:
                made = None
            inside = {*found.inside, *found.chain, found.node}
            alone = all(_read_by(node, inside) for node in found.chain)
            if made is None or not alone or not _one_mode(found, write, without):
                self._left.add(event)
                continue
            self._recipes[event] = made
            more = True
            seen = [view for node in found.chain for view in (node, *filter(_same_order, node.users))]
            events = {kept.event(node, record) for node in seen}
            self._skipped |= {one for one in events if one is not None} - {event}
        for several in gathered_experts(kept.order, places.keys(), {}):
            event = kept.event(several.node, record)
            if event is None or event in self._left or event in self._recipes:
                continue
            write = ExpressionWriter(places)
            nodes = {several.node, *several.inside}
            try:
                self._recipes[event] = gathered_recipe(several, write)
            except LookupError:
                self._left.add(event)
                continue
            if not (nodes <= without or not nodes & without):
                self.leave(event)
                continue
            more = True
        wanted: dict[Event, set[int]] = {}
        for made in self._recipes.values():
            for place in made.places():
                wanted.setdefault(place.event, set()).add(place.number)
        self._wanted = wanted
        return more


class Changed(Exception):
    """The operator cannot take the place of a sum, after all."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.event = event


def _one_mode(found: Sum, write: ExpressionWriter, without: set[fx.Node]) -> bool:
    """Whether all that the operator stands for was computed with gradients, or all without."""
    nodes = {found.node, *found.inside, *write.read}
    return nodes <= without or not nodes & without


def _read_by(node: fx.Node, readers: set[fx.Node]) -> bool:
    """Whether nothing but `readers` reads a value, or copies and views of it."""
    copies = (aten.clone.default, aten.view.default)
    return all(user in readers or (user.target in copies and _read_by(user, readers)) for user in node.users)


def _same_order(node: fx.Node) -> bool:
    """Whether a node has the elements of its operand in their order."""
    if node.target is not aten.permute.default:
        return node.target is aten.view.default
    dims = value_of(node.args[0]).shape  # type: ignore[arg-type]
    moved = [dim for dim in node.args[1] if dims[dim] != 1]  # type: ignore[union-attr, index]
    return moved == sorted(moved)


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.target is aten.view.default:
        node = operand(node)
    return node


def writes(name: str) -> bool:
    """Whether a function of torch writes into its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


class _Copy(Rewriter):
    """The forward part of a traced graph in canonical operators, with what stops gradients."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__({})
        results: Iterable[Any] = graph.output_node().args[0]  # type: ignore[assignment]
        kinds = output_kinds(graph)
        wanted = [node for (kind, _), node in zip(kinds, results, strict=True) if kind in ("output", "mutation")]
        calls = live(graph, [node for node in wanted if isinstance(node, fx.Node)])
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.placeholder(node, node.name, node.meta.get("val"))
        self.copy(calls)
        self.results = [self.env[node] if isinstance(node, fx.Node) else None for node in wanted]
        self.order = list(self.graph.nodes)
        self._of: dict[fx.Node, list[fx.Node]] = {}
        for old, new in self.env.items():
            self._of.setdefault(new, []).append(old)

    def _copied(self, old: fx.Node) -> fx.Node:
        if old.target is not aten.detach.default:
            return super()._copied(old)
        new = self.graph.call_function(aten.detach.default, (self.env[old.args[0]],))  # type: ignore[index]
        describe(new, Captured(old.meta.get("val")))
        return new

    def event(self, node: fx.Node, record: Record) -> Event | None:
        """The call that makes the value of a node, or the one that gives it as it is seen by all readers."""
        found = next((record.made[old] for old in self._of.get(node, ()) if old in record.made), None)
        if found is not None or not all(map(_same_order, node.users)):
            return found
        return next((one for user in node.users if (one := self.event(user, record)) is not None), None)
