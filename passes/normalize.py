"""Normalize: rewrite operators that have no rule, or a rule too narrow, into ones that have.

Means become global sums divided by the global count, so they stay right however the dim is split; random masks become factories
of global shape, so every mesh draws the single-device stream.

    %m = mean(%x, [1])                 ->   %s = sum(%x, [1]);  %m = div(%s, 512)
    %y, %k = native_dropout(%x, 0.1)   ->   %k = bernoulli([32, 512], 0.9);  %y = mul(mul(%x, %k), 1.11)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from shardc.graph import Program, value_of
from shardc.rules.decompositions import DECOMPOSITIONS, Builder


def normalize(program: Program) -> Program:
    """Replace every operator that has a decomposition, in place; drop what became dead."""
    graph = program.graph
    for node in list(graph.nodes):
        decomposition = DECOMPOSITIONS.get(node.target) if node.op == "call_function" else None
        if decomposition is None:
            continue
        with graph.inserting_before(node):
            results = decomposition(Builder(graph, node), *node.args, **node.kwargs)
        if results is not None:
            _replace(node, results)
    graph.eliminate_dead_code()
    return program


def _replace(node: fx.Node, results: Any) -> None:
    if not isinstance(results, (tuple, list)):
        node.replace_all_uses_with(results)
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        replacement = results[user.args[1]]  # type: ignore[index]
        assert isinstance(value_of(replacement), torch.Tensor)
        user.replace_all_uses_with(replacement)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
