"""The functions of a generated module, cut for a compiler of tensor code: what only calls operators is a function.

def forward(*given):                                   def forward_1(w, x):
    w, *layers, x = given                                  y = aten.mm.default(x, w)
    y = aten.mm.default(x, w)                              return (aten.relu.default(y),)
    z = aten.relu.default(y)                     ->
    for i in range(4):                                 def forward(*given):
        z, kept = layer(z, *layers[i : i + 1])             w, *layers, x = given
    ...                                                    (z,) = forward_1(w, x)
                                                           for i in range(4): ...

Functions of repeated layers call nothing but operators, so they are taken whole.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Sequence

DRIVERS = ("forward", "backward", "prologue", "epilogue")
"""The functions that the executable calls."""


def cut(source: str, given: Collection[str] = ()) -> tuple[ast.Module, dict[str, bool]]:
    """The module with the stretches of its drivers as functions; and all functions that only call operators, layers
    and stretches, with whether they empty the list that they are given. Lines are those of the source. Without what it
    says of globals that are `given`."""
    tree = ast.parse(source)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.Assign) and {*_names([node], ast.Store)} & {*given})
    ]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    layers = [function.name for function in functions if function.name not in DRIVERS]
    if not any(_called(node) in layers for function in functions for node in ast.walk(function)):
        return tree, {function.name: _empties(function) for function in functions}
    body: list[ast.stmt] = []
    names = {function.name: _empties(function) for function in functions if function.name in layers}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in DRIVERS:
            made = list(_Driver(node, layers).stretches())
            names |= {function.name: False for function in made}
            body += made
        body.append(node)
    tree.body = body
    return ast.fix_missing_locations(tree), names


def _empties(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "clear" for node in ast.walk(function))


class _Driver:
    """A function that calls layers and handles lists. `stretches` takes everything else out of it, in place."""

    def __init__(self, function: ast.FunctionDef, layers: Sequence[str]) -> None:
        self.function, self.layers = function, layers
        arguments = [*function.args.args, *([function.args.vararg] if function.args.vararg else [])]
        self.local = {one.arg for one in arguments} | set(_names(function.body, ast.Store))

    def stretches(self) -> Iterator[ast.FunctionDef]:
        old, self.function.body = self.function.body, []
        run: list[ast.stmt] = []
        for number, statement in enumerate(old):
            made = set(_names(run, ast.Store))
            if self._computes(statement, made) or (run and isinstance(statement, ast.Delete)):
                run.append(statement)
                continue
            yield from self._taken(run, old[number:])
            run = []
            self.function.body.append(statement)

    def _computes(self, statement: ast.stmt, made: set[str]) -> bool:
        """Whether a statement is a call of an operator, or takes one of several results of one in this stretch."""
        if not isinstance(statement, ast.Assign):
            return False
        value = statement.value
        if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
            return value.value.id in made
        return isinstance(value, ast.Call) and _called(value) not in (*self.layers, "take") and not _spreads(value)

    def _taken(self, run: list[ast.stmt], rest: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef]:
        if not any(_is_operator(node) for statement in run for node in ast.walk(statement)):
            self.function.body += run
            return
        deleted = [name for one in run if isinstance(one, ast.Delete) for name in _names([one], ast.Del)]
        run = [statement for statement in run if not isinstance(statement, ast.Delete)]
        made, given = set[str](), dict[str, None]()
        for statement in run:
            given |= dict.fromkeys(n for n in _names([statement], ast.Load) if n in self.local and n not in made)
            made |= set(_names([statement], ast.Store))
        read = set(_names(rest, ast.Load))
        left = [name for name in dict.fromkeys(_names(run, ast.Store)) if name in read]
        name = f"{self.function.name}_{sum(map(self._is_stretch, self.function.body)) + 1}"
        result = ast.Return(ast.Tuple([ast.Name(one, ast.Load()) for one in left], ast.Load()))
        arguments = ast.arguments([], [ast.arg(one) for one in given], None, [], [], None, [])
        stretch = ast.FunctionDef(name, arguments, [*run, result], [], None, None)
        yield ast.copy_location(stretch, run[0])
        call = ast.Call(ast.Name(name, ast.Load()), [ast.Name(one, ast.Load()) for one in given], [])
        target = ast.Tuple([ast.Name(one, ast.Store()) for one in left], ast.Store())
        self.function.body.append(ast.copy_location(ast.Assign([target], call), run[0]))
        gone = [ast.Name(one, ast.Del()) for one in dict.fromkeys(deleted) if one in given]
        if gone:
            self.function.body.append(ast.Delete(list(gone)))

    def _is_stretch(self, statement: ast.stmt) -> bool:
        return isinstance(statement, ast.Assign) and _called(statement.value).startswith(f"{self.function.name}_")


def _names(nodes: Iterable[ast.AST], context: type[ast.expr_context], bound: Collection[str] = ()) -> list[str]:
    """The names in some nodes, but for those that are `bound` and the variables of comprehensions."""
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Name):
            found += [node.id] if isinstance(node.ctx, context) and node.id not in bound else []
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            first, *rest = node.generators
            inner = {*bound, *_names([one.target for one in node.generators], ast.Store)}
            found += _names([first.iter], context, bound)
            found += _names([node.elt, *first.ifs, *(one.iter for one in rest)], context, inner)
        else:
            found += _names(ast.iter_child_nodes(node), context, bound)
    return found


def _called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _spreads(call: ast.Call) -> bool:
    return any(isinstance(argument, ast.Starred) for argument in call.args)


def _is_operator(node: ast.AST) -> bool:
    """Whether a call is more than a view."""
    return (isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("aten.", "torch.ops."))) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )
