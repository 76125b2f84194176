"""Answers of a plan that was read from a file: its problem is posed when somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from shardc.explain.explanations import Assumption, Conflict, Why, WhyNot
from shardc.explain.why import Questions
from shardc.planning.compilation import Compilation
from shardc.planning.given.posing import posed_again
from shardc.planning.given.proof import Proof


class PosedWhenAsked:
    """An `Explainer` that takes its time at the first question, where the file told the plan. `questions` makes what
    answers, of the compilation with its solution."""

    def __init__(self, c: Compilation, proof: Proof, questions: Callable[[Compilation], Questions]) -> None:
        self.c = c
        self._proof, self._make = proof, questions

    @cached_property
    def _questions(self) -> Questions:
        return self._make(posed_again(self.c, self._proof))

    def why(self, name: str, /, compare: bool = True) -> Why:
        """See `Questions.why`."""
        return self._questions.why(name, compare)

    def alternatives(self, name: str, /) -> tuple[str, ...]:
        """See `Questions.alternatives`."""
        return self._questions.alternatives(name)

    def why_not(self, name: str, layout: str, /) -> WhyNot:
        """See `Questions.why_not`."""
        return self._questions.why_not(name, layout)

    def conflicts(self) -> tuple[Conflict, ...]:
        """See `Questions.conflicts`."""
        return self._questions.conflicts()

    def assumes(self) -> tuple[Assumption, ...]:
        """See `Questions.assumes`."""
        return self._questions.assumes()

    def checked(self) -> float:
        """See `Questions.checked`."""
        return self._questions.checked()
