"""The model as a tree of modules: what each computes, sends and holds. Repeated layers stand in one group.

model                      {"name": "model", "children": [
  layers.0 ... layers.31     {"name": "layers", "children": [{"name": "0–31", "group": [...]}]}
  norm                       {"name": "norm", ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import fx, nn

from shardc.analysis.timeline import Pace
from shardc.explain.plan import Placed, Plan
from shardc.ir.facts import origin_of
from shardc.rules.factors.chosen import chosen_of


@dataclass
class _ModuleNode:
    """One module with its own figures, those of its children apart: seconds of compute, per axis seconds and bytes
    sent, bytes at the peak, and the numbers of its parameters among the tensors of the report."""

    name: str
    compute: float = 0.0
    sent: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    peak: float = 0.0
    parameters: list[int] = field(default_factory=list[int])
    children: dict[str, _ModuleNode] = field(default_factory=dict[str, "_ModuleNode"])

    def at(self, path: str) -> _ModuleNode:
        """The module at a path below this one, made if it is not there."""
        module = self
        for name in path.split(".") if path else ():
            module = module.children.setdefault(name, _ModuleNode(name))
        return module


def module_tree(
    plan: Plan, graph: fx.Graph, pace: Pace, tensors: Sequence[Placed], peak: Mapping[str, float], model: nn.Module
) -> dict[str, Any]:
    """The tree of a plan. `graph` is the one that runs, `peak` the bytes of the peak by module."""
    root = _ModuleNode(type(model).__name__)
    modules = dict[str, str]()
    for node in graph.nodes:
        chosen = chosen_of(node)
        modules[node.name] = origin_of(node).module
        if chosen is not None:
            root.at(origin_of(node).module).compute += pace.operator(chosen).compute
    for one in plan.conversions:
        sum_of = root.at(modules[one.name]).sent.setdefault(one.axis, [0.0, 0.0])
        sum_of[0] += one.seconds
        sum_of[1] += one.sent
    for path, held in peak.items():
        root.at(path).peak += held
    for index, tensor in enumerate(tensors):
        if tensor.role == "parameter":
            root.at(tensor.name.rpartition(".")[0]).parameters.append(index)
    kinds = {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}
    return _Tree(plan.mesh.names, tensors, kinds).record(root, "")


class _Tree:
    def __init__(self, axes: Sequence[str], tensors: Sequence[Placed], kinds: Mapping[str, str]) -> None:
        self.axes, self.tensors, self.kinds = axes, tensors, kinds

    def record(self, module: _ModuleNode, path: str) -> dict[str, Any]:
        below = [(child, f"{path}.{child.name}" if path else child.name) for child in module.children.values()]
        below.sort(key=lambda pair: (pair[0].name.isdigit(), int(pair[0].name) if pair[0].name.isdigit() else 0))
        children = [self.record(child, at) for child, at in below]
        shapes = [self._shape(child, at) for child, at in below]
        sent = [[_short(figure) for figure in module.sent.get(axis, (0.0, 0.0))] for axis in self.axes]
        figures: dict[str, Any] = {
            "kind": self.kinds.get(path, "") if path else "",  # the name of the root says it
            "compute": _short(module.compute),
            "sent": sent if any(map(any, sent)) else [],
            "peak": module.peak,
            "parameters": module.parameters,
            "children": list(_grouped(children, shapes)),
        }
        return {"name": module.name, **{name: figure for name, figure in figures.items() if figure}}

    def _shape(self, module: _ModuleNode, path: str) -> object:
        """What repeated layers have in common: the modules in them, and their parameters with their layouts."""
        own = [self.tensors[index] for index in module.parameters]
        parameters = tuple((one.name.rpartition(".")[2], one.dtype, str(one.layout)) for one in own)
        children = sorted(module.children.values(), key=lambda child: child.name)
        return self.kinds.get(path), parameters, tuple(
            (child.name, self._shape(child, f"{path}.{child.name}")) for child in children
        )  # fmt: skip


def _grouped(children: list[dict[str, Any]], shapes: list[object]) -> Iterable[dict[str, Any]]:
    """The children, neighbours with numbers for names and equal shapes as one group."""

    def alike(pair: tuple[int, dict[str, Any]]) -> object:
        return shapes[pair[0]] if pair[1]["name"].isdigit() else pair[0]

    for _, several in groupby(enumerate(children), alike):
        group = [child for _, child in several]
        if len(group) == 1:
            yield group[0]
        else:
            yield {"name": f"{group[0]['name']}–{group[-1]['name']}", "kind": group[0].get("kind", ""), "group": group}


def _short(figure: float) -> float:
    """A figure with four digits that count."""
    return float(f"{figure:.4g}")
