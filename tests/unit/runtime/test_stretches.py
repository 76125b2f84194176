"""Functions that are cut for a compiler compute what they did."""

from __future__ import annotations

import ast
from typing import Any

import torch

from shardc.runtime.execute.stretches import cut

SOURCE = """
def layer(x):
    return aten.sin.default(x)

def forward(w, x):
    made = [aten.neg.default(x)]
    for i in range(2):
        x = layer(x)
        made += [x]
    whole = aten.cat.default([w, *[x.reshape(3) for x in made], *(x for i in range(2) for x in (made[2 - i],))])
    y = aten.add.Tensor(whole, x[0])
    return [x.neg() for x in (y, whole)]
"""


def run(tree: ast.Module) -> list[torch.Tensor]:
    space: dict[str, Any] = {"aten": torch.ops.aten}
    exec(compile(tree, "cut", "exec"), space)
    return space["forward"](torch.ones(3), torch.arange(3.0))


def test_variables_of_comprehensions_are_no_arguments() -> None:
    tree, names = cut(SOURCE)
    assert names == {"layer": False, "forward_1": False}
    (stretch,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "forward_1")
    assert [one.arg for one in stretch.args.args] == ["w", "made", "x"]
    torch.testing.assert_close(run(tree), run(ast.parse(SOURCE)))
