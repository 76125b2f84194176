"""The entries of a plan: what was chosen for every operator and value, in one line each.

operators    layers.0.up mm        "m@dp, n@tp -> f32[32@dp, 256@tp]"
operators    layers.0 relu         "d0@dp, d1@tp -> f32[32@dp, 256@tp]; shared as f32[32@dp, 256]; kept"
parameters   layers.0.up.weight    "f32[256@tp, 64]; kept"

A strategy, or the layout of what a program is given, stands first. What is made of it stands behind the arrow. Then, if
it is another layout, the one that its readers share; and under a bound on memory, the one that is kept for backward,
and the one in which backward reads it.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Assignment
from shardc.planning.given.names import Name, names_of, output_entries
from shardc.planning.given.texts import LayoutTexts, strategy_text
from shardc.rules.factors.factored import Factored, Op
from shardc.rules.factors.strategy import make

ARROW = " -> "
END = "; "
SHARED, KEPT, REREAD = "shared", "kept", "read in backward"


def entries_of(factored: Factored, assignment: Assignment, mesh: Mesh) -> dict[Name, str]:
    """The entry of every operator and of all that the program is given."""
    texts, names = LayoutTexts(factored, mesh), names_of(factored)
    return {names[op.node]: _entry(op, factored, assignment, texts, mesh) for op in factored.ops}


def outputs_of(factored: Factored, assignment: Assignment, mesh: Mesh) -> dict[str, str]:
    """The layouts of outputs, by name."""
    texts, names = LayoutTexts(factored, mesh), output_entries(factored.program)
    results = factored.program.results

    def text(index: int, splits: Splits) -> str:
        node = results[index]
        assert node is not None
        return texts.write(factored.values[node], splits)

    return {names[index]: text(index, splits) for index, splits in assignment.outputs.items()}


def _entry(op: Op, factored: Factored, assignment: Assignment, texts: LayoutTexts, mesh: Mesh) -> str:
    node = op.node
    shape, strategy = assignment.shapes[node], assignment.strategies[node]
    made = [make(shape, strategy, index, mesh) for index in range(len(op.results))]
    written = [texts.write(factored.base[result.key], splits) for result, splits in zip(op.results, made, strict=True)]
    if node.op == "placeholder":
        head = written[0] if written else ""
    else:
        head = strategy_text(op.factors, strategy) + ARROW + ", ".join(written)
    return END.join([head, *_clauses(op, factored, assignment, texts, made)])


def _clauses(
    op: Op, factored: Factored, assignment: Assignment, texts: LayoutTexts, made: list[Splits]
) -> Iterator[str]:
    for number, result in enumerate(op.results):
        of, value = of_result(number), factored.base[result.key]
        shared = assignment.shares.get(result.key, made[number])
        if shared != made[number]:
            yield f"{SHARED}{of} as {texts.write(value, shared)}"
        kept = assignment.kept.get(result.key)
        if kept is not None:
            yield f"{KEPT}{of}" if kept == shared else f"{KEPT}{of} as {texts.write(value, kept)}"
            reread = assignment.regathered.get(result.key, kept)
            if reread != kept:
                yield f"{REREAD}{of} as {texts.write(value, reread)}"


def of_result(number: int) -> str:
    """What tells a clause about a further result of an operator from one about the first."""
    return f" (result {number})" if number else ""
