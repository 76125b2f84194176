"""A hash of a program by which a plan knows it again: operators, arguments, shapes, dtypes, structure; not weights.

%h = mm(%x, %w)    ->   "layers.0.up mm": hash of "mm(inputs input:0, permute(parameters layers.*.up.weight, ...)) ..."

Every operator has a hash of its own, so that it can be told which have changed; those of equal layers are equal. Where
the code stands, what devices it names, how many threads run it, and the values of tensors do not count. What rules say
of an operator does, but for what it allocates.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardc.ir.layout import SHORT_DTYPES
from shardc.ir.program import Program, Role, name_of, value_of
from shardc.planning.given.names import OPERATORS, folded, names_of, output_entries, pattern_of
from shardc.rules.factors.factored import Factored, Kind
from shardc.rules.factors.strategy import shape_of

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

LEFT_OUT = {"folds", "workspace"}
"""Fields of rules and kinds that do not count: what a kernel allocates depends on its threads, and torchrun gives each
process one."""


@dataclass(frozen=True)
class Fingerprint:
    """`operators` has a short hash for every operator, by name; `given` and `returned` the dtypes and shapes of what
    the program is given (by section and name) and returns. `trains` tells whether it makes gradients of parameters."""

    operators: Mapping[str, str]
    given: Mapping[tuple[str, str], str]
    returned: Mapping[str, str]
    trains: bool
    structure: str
    """A hash of which values every operator reads: repeated layers have one hash an operator, and this tells them
    apart."""

    @property
    def digest(self) -> str:
        """One hash for all of it."""
        given = {" ".join(name): text for name, text in self.given.items()}
        parts = [*given.items(), *self.operators.items(), *self.returned.items(), self.trains, self.structure]
        return digest(parts, 32)

    def as_json(self) -> dict[str, Any]:
        """It as plain data, in which repeated layers are one entry with their number."""
        return {
            "fingerprint": self.digest,
            "trains": self.trains,
            "given": _counted({" ".join(name): text for name, text in self.given.items()}),
            "returned": _counted(self.returned),
            "operators": _counted(self.operators),
        }


_known: weakref.WeakKeyDictionary[fx.Graph, Fingerprint] = weakref.WeakKeyDictionary()


def fingerprint(factored: Factored) -> Fingerprint:
    """The fingerprint of a program. Which axes may fold a sequence does not count."""
    graph = factored.program.graph
    if graph not in _known:
        _known[graph] = _made(factored)
    return _known[graph]


def _made(factored: Factored) -> Fingerprint:
    program, names, texts = factored.program, names_of(factored), dict[fx.Node, str]()
    kinds: dict[Kind, str] = {}
    operators: dict[str, str] = {}
    given: dict[tuple[str, str], str] = {}
    by_node = {op.node: op for op in factored.ops}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node not in by_node:
            texts[node] = _call(node, texts)
            continue
        section, name = names[node]
        texts[node] = f"{section} {pattern_of(name)}"
        if section != OPERATORS:
            given[section, name] = typed(value_of(node))
            continue
        op = by_node[node]
        if op.kind not in kinds:
            kinds[op.kind] = canonical(shape_of(op))
        operators[name] = digest([_call(node, texts), typed(value_of(node)), kinds[op.kind]], 8)
    return Fingerprint(operators, given, _returned(program, texts), bool(program.trained), _structure(program))


def _structure(program: Program) -> str:
    numbers = {node: number for number, node in enumerate(program.graph.nodes)}
    return digest([[numbers[one] for one in node.all_input_nodes] for node in numbers], 32)


def _counted(entries: Mapping[str, str]) -> dict[str, str]:
    """The entries folded, with how many are one."""
    short, count = folded(entries), Counter((pattern_of(name), text) for name, text in entries.items())
    return {
        name: f"{text} x{count[name, text]}" if count[name, text] > 1 and "*" in name else text
        for name, text in short.items()
    }


def _returned(program: Program, texts: Mapping[fx.Node, str]) -> dict[str, str]:
    """What every output is: a short hash of where it comes from, and its dtype and shape."""
    results, names = program.results, output_entries(program)
    returned: dict[str, str] = {}
    for index, (port, node) in enumerate(zip(program.outputs, results, strict=True)):
        if node is not None:
            attached = index in program.attached or port.role is Role.GRADIENT
            returned[names[index]] = f"{typed(value_of(node))} {digest([texts[node], attached], 8)}"
    return returned


def _call(node: fx.Node, texts: Mapping[fx.Node, str]) -> str:
    arguments = [_argument(argument, texts) for argument in node.args]
    arguments += [f"{key}={_argument(argument, texts)}" for key, argument in node.kwargs.items()]
    return f"{_target(node)}({', '.join(arguments)})"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(node.target) if isinstance(node.target, str) else name_of(node.target)


def _argument(argument: Any, texts: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return texts[argument]
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join([_argument(item, texts) for item in argument])}]"
    if isinstance(argument, (torch.device, torch.Generator)):
        return "any"
    return canonical(argument)


def typed(value: Any) -> str:
    """`f32[256, 64]`: dtype and shape of a value; of several, all of them."""
    if isinstance(value, Tensor):
        return f"{SHORT_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(typed, value))
    return type(value).__name__


def digest(parts: Any, length: int) -> str:
    """So many hex digits of a hash of what parts are made of."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:length]


def canonical(value: Any) -> str:
    """A text of a value that is the same in every process: sets in order, no addresses."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(canonical, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join([f'{canonical(key)}: {canonical(one)}' for key, one in value.items()])}}}"
    if is_dataclass(value):
        own = ", ".join([canonical(getattr(value, one.name)) for one in fields(value) if one.name not in LEFT_OUT])
        return f"{type(value).__name__}({own})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(canonical, value))}]"
    return _ADDRESS.sub("", repr(value))
