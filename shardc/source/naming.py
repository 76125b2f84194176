"""Names of values in generated code, from the paths of the user's modules.

layers.3.mlp.up_proj, its last value        mlp_up in the function of a layer, layers_3_mlp_up outside
the same module, a value before             mlp_up_view
the gradient of layers.3.mlp.up_proj.weight grad_mlp_up_weight
a collective that is under way              mlp_up_ar_started
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import fx

from shardc.ir.facts import Key, lowered
from shardc.ir.program import Port, Program, Role, name_of
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import wait

MOST_PARTS = 5
"""Parts of a path that a name has at most: the last ones."""

NEARLY_ALL = 0.8
"""What part of the paths must begin alike for names to leave the beginning out."""

_SHORT = {
    "to_copy": "cast", "permute": "t", "getitem": "item", "scaled_dot_product_attention": "sdpa",
    "all_reduce": "ar", "all_gather": "ag", "reduce_scatter": "rs", "all_to_all": "a2a",
    "all_reduce_bucket": "ar_bucket", "reduce_scatter_bucket": "rs_bucket",
}  # fmt: skip
"""Operators and collectives that people call by a shorter word."""

_WORDS = (("self_attention", "attn"), ("self_attn", "attn"), ("attention", "attn"), ("layernorm", "norm"),
          ("layer_norm", "norm"), ("_proj", ""), ("embeddings", "embed"), ("embedding", "embed"))  # fmt: skip
"""What names of modules say in more letters than it takes."""


class Naming:
    """What the values of a program are called, before names are made unique in a function."""

    def __init__(self, graph: fx.Graph, program: Program) -> None:
        nodes = list(graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.ports: Mapping[fx.Node, Port] = dict(zip(placeholders, program.inputs, strict=True))
        results = zip(program.outputs, graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
        self.gradients: dict[Key | None, str] = {}
        self.made: dict[fx.Node, str] = {}
        for port, node in results:
            if isinstance(node, fx.Node) and port.role is Role.GRADIENT and node not in self.ports:
                self.gradients[lowered(node).base] = port.name
                self.made[node] = port.name
        self.gradients.pop(None, None)
        modules = [lowered(node).origin.module for node in nodes if node.op == "call_function"]
        stored = [p.name.rpartition(".")[0] for p in program.inputs if p.role in (Role.PARAMETER, Role.BUFFER)]
        self.root = _common({path for path in (*modules, *stored) if path})
        self.last = {self._group(node): node for node in nodes if node.op == "call_function"}

    def of(self, node: fx.Node, layer: bool) -> str:
        """What a value is called; with `layer`, in the function of a repeated layer, which knows its own number not."""
        if node.target is wait and isinstance(started := node.args[0], fx.Node):
            return self.of(started, layer).removesuffix("_started")
        name = self._of(node, layer)
        under_way = any(user.target is wait for user in node.users)
        return f"{name}_started" if under_way else name

    def _of(self, node: fx.Node, layer: bool) -> str:
        port = self.ports.get(node)
        if port is not None:
            return self._path(port.name, layer) if port.role in _STORED else node.name
        if node in self.made:
            return f"grad_{self._path(self.made[node], layer)}"
        module = lowered(node).origin.module
        what = name_of(node.target).strip("_")
        if not node.name.startswith(what) and not module:
            return node.name  # somebody has named it
        what = _SHORT.get(what, what)
        if isinstance(node.target, Bucket):
            return what  # it is of no module alone
        base = lowered(node).base
        if base in self.gradients:
            return f"grad_{self._path(self.gradients[base], layer)}_{what}"
        path = self._path(module, layer) if module else ""
        if not path:
            return what
        return path if self.last.get(self._group(node)) is node else f"{path}_{what}"

    def _group(self, node: fx.Node) -> tuple[str, str]:
        place = lowered(node).origin
        return place.module, place.phase

    def _path(self, path: str, layer: bool) -> str:
        parts = path.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if layer and numbers:
            below = parts[numbers[0] + 1 :]
            parts = below or [_singular(parts[numbers[0] - 1] if numbers[0] else "layer")]
        elif path.startswith(self.root):
            parts = path[len(self.root) :].split(".")
        name = "_".join(parts[-MOST_PARTS:])
        for long, short in _WORDS:
            name = name.replace(long, short)
        return identifier(name.strip("_") or "value")


_STORED = (Role.PARAMETER, Role.BUFFER)


def identifier(text: str) -> str:
    """A name that Python takes, as near to a text as can be."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    return name if name.isidentifier() else f"layer_{name}"


def layer_name(modules: Iterable[str]) -> str:
    """What a repeated layer is called: `layer` for `model.layers.3.mlp`."""
    for module in modules:
        parts = module.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers:
            return identifier(_singular(parts[numbers[0] - 1])) if numbers[0] else "layer"
    return "layer"


def _singular(word: str) -> str:
    return {"h": "layer", "": "layer"}.get(word, word.removesuffix("s") or "layer")


def _common(paths: Collection[str]) -> str:
    """The modules that nearly all paths begin with, with a point behind: `model.`; "" if there are none."""
    heads = [path.split(".") for path in paths]
    root = ""
    while heads:
        first, count = Counter(parts[0] for parts in heads).most_common(1)[0]
        inner = [parts[1:] for parts in heads if parts[0] == first and len(parts) > 1]
        if first.isdigit() or count < NEARLY_ALL * len(heads) or len(inner) < NEARLY_ALL * len(heads):
            break
        if Counter(parts[0].isdigit() for parts in inner).most_common(1)[0][0]:
            break
        root, heads = f"{root}{first}.", inner
    return root


RESERVED = frozenset({*dir(builtins), *keyword.kwlist, *keyword.softkwlist})


class Scope:
    """The names of one function: every value has its own."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = {*RESERVED, *taken}
        self._counts: Counter[str] = Counter()

    def name(self, wanted: str) -> str:
        """The name that is wanted, or with a number behind it if that is taken."""
        name = wanted
        while name in self.taken:
            self._counts[wanted] += 1
            name = f"{wanted}_{self._counts[wanted] + 1}"
        self.taken.add(name)
        return name
