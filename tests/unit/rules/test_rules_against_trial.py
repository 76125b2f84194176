"""What our rules miss: every split that a trial finds must be in the rule, or here with the reason why it is not.

That rules claim nothing wrong is the matter of test_rules.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from samples.calls.elementwise import POINTWISE
from samples.calls.groups import GROUPS
from samples.calls.matrices import MATRICES
from samples.calls.sample import Sample, View
from shardc.rules.notation import Rule, maker_of
from shardc.rules.trial.trial import learn

Place = tuple[str, int, int]

MISSED = {
    "aten.cat.default": "an empty tensor that joins is summed with the others: it costs nothing",
    "aten._embedding_bag_backward.default": "decomposed before layouts: the rule is for counts of rows only",
    "shardc.retile.default": "it exists to change atoms, so these dims may not be split through it",
    "aten.scatter_add.default": "a source larger than its index: rare, and parts of it would have to be dropped first",
    "aten.index_put.default": "a mask as index: elementwise only where the value is a single element",
    "aten.convolution_backward.default": "parts of input and weight at once mean nothing to a model",
    "shardc.attention.default": "the value dim: heads are there to be split, and one more factor slows every solve",
    "transformers.grouped_mm_fallback_backward.default": "parts of input and weight at once mean nothing to a model",
}
"""Operators whose rule offers less than it could, and why."""


def _sampled() -> Iterator[Sample]:
    """One call of every operator, the first (of elementwise ones, which share one rule, of every third); of those in
    MISSED all, so that no reason outlives its cause."""
    elementwise = {sample.target: sample for group in POINTWISE for sample in group()}
    yield from list(elementwise.values())[::3]
    seen: set[Any] = set(elementwise)
    for sample in (sample for group in (*GROUPS, *MATRICES) for sample in group()):
        operator = sample.target
        if isinstance(operator, torch._ops.OpOverload) and (operator not in seen or str(operator) in MISSED):
            seen.add(operator)
            yield sample


SAMPLES: dict[str, list[Sample]] = defaultdict(list)
for _sample in _sampled():
    SAMPLES[str(_sample.target)].append(_sample)


def _plain(value: Any) -> Any:
    if isinstance(value, View):
        return value.target(value.base, *value.args)
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def _places(rule: Rule) -> dict[str, set[Place]]:
    """Per factor that may be split the dims that carry it."""
    found: dict[str, set[Place]] = defaultdict(set)
    operands = [names for names in rule.operands if names is not None]
    for side, items in (("operand", operands), ("result", rule.results)):
        for index, names in enumerate(items):
            for dim, name in enumerate(names or ()):
                if name is not None and name not in rule.whole:
                    found[name].add((side, index, dim))
    return found


def missed(sample: Sample) -> str:
    """What the trial finds and the rule has not; empty if nothing."""
    args, kwargs = _plain(sample.args), {name: _plain(value) for name, value in sample.kwargs.items()}
    maker = maker_of(sample.target)
    assert maker is not None
    found = learn(sample.target, args, kwargs)
    if found.refused or found.replicated:
        return ""
    rule, tried = maker(*args, **kwargs), found.rule()
    known = {place for places in _places(rule).values() for place in places}
    factors = [name for name, places in _places(tried).items() if not places & known]
    linear = [set(group) for group in tried.linear if group not in rule.linear]
    return f"{sample}: trial finds {found}; missing are factors {factors}, linear {linear}" if factors or linear else ""


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in MISSED])
def test_nothing_is_missed(name: str) -> None:
    for sample in SAMPLES[name]:
        assert missed(sample) == "", "make the rule wider, or give the reason in MISSED"


@pytest.mark.parametrize("name", MISSED)
def test_reasons_have_a_cause(name: str) -> None:
    # those that show it often stand last
    assert any(map(missed, reversed(SAMPLES[name]))), f"the rule misses nothing any more: drop {name} from MISSED"
