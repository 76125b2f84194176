"""Factor: which pieces of dims the operands and results of operators share.

Views are no operators any more: a value that is a view keeps references into its base value.

    %h = mm(%x, %w)              f32[32, 16]        ->   %h: (0: 32) (2: 4, 3: 4), the last dim is two atoms
    %v = view(%h, [32, 4, 4])    f32[32, 4, 4]      ->   %v: (0: 32) (2: 4) (3: 4), a view of %h
"""

from __future__ import annotations

from dataclasses import replace

from shardc.errors import RuleError
from shardc.ir.program import where
from shardc.options import INDUCTOR
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.planning.fusion import fuse
from shardc.rules.factors import factoring
from shardc.rules.factors.factored import Factored


@compiler_pass
def factor(c: Compilation) -> Compilation:
    """Find the factors of every operator. Raises RuleError."""
    result = factoring.factor(c.program)
    if c.options.on_unknown == "error":
        _refuse_unknown(result)
    return replace(c, factored=fuse(result) if c.options.compile == INDUCTOR else result)


def _refuse_unknown(program: Factored) -> None:
    """RuleError for the first operator that runs on whole operands, because it has no rule and trial found no split."""
    for op in program.ops:
        if op.learned is not None and op.learned.replicated:
            place = f" ({where(op.node)})" if where(op.node) else ""
            raise RuleError(
                f"operator {op.node.target}{place} has no rule and would run whole on every rank: "
                f"{op.learned.replicated}. Give it a rule with shardc.rule, write this part of the model with "
                "operators that have rules, or accept it with on_unknown='replicate'"
            )
