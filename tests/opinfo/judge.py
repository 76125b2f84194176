"""What is recorded of one operator: per sample and layout, right or wrong, and whether the work was split.

forward, backward   ok        the value is that of a single device (of a random operator: shape and type)
                    wrong     value, shape or type differ, or ranks disagree about a whole result
                    refused   a ShardcError says that this cannot be done
                    error     any other exception
                    skip      there is nothing to compare with
part                full      every operator computed on a split or partial operand, and nothing was gathered
                    some      at least one operator did
                    none      everything was made whole first
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from opinfo.adapter import Outcome, Step, Traced, run_sharded
from opinfo.database import Sample, detached, is_random, layouts, name_of, samples
from shardc.errors import ShardcError

RELATIVE, ABSOLUTE = 2e-3, 2e-4
"""Tolerances of float32 values, whose sums are taken in another order."""

PHASES = ("forward", "backward")
SAMPLES = 3
"""Samples an operator, besides the hand-made ones."""

RECORDED = Path(__file__).with_name("recorded.json")
"""What the tests hold a fixed sample of operators to, by name and phase."""


@dataclass
class Verdict:
    """One phase of one run."""

    status: str = "skip"
    part: str = ""
    why: str = ""
    steps: list[str] = field(default_factory=list[str])


@dataclass
class Run:
    """One sample in one layout."""

    sample: int
    layout: str
    placements: str
    shapes: str
    forward: Verdict
    backward: Verdict


@dataclass
class Record:
    """All runs of one operator; `status` is "ok", or says why there are none."""

    name: str
    status: str = "ok"
    runs: list[Run] = field(default_factory=list[Run])
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(plain: dict[str, Any]) -> Record:
        runs = [
            Run(**{**run, "forward": Verdict(**run["forward"]), "backward": Verdict(**run["backward"])})
            for run in plain["runs"]
        ]
        return Record(plain["name"], plain["status"], runs, plain["seconds"])


def judge(entry: Any, count: int, device: str = "cpu") -> Record:
    """Run `count` samples of an entry (and its hand-made ones) in every layout, on a device."""
    record = Record(name_of(entry))
    found = samples(entry, count, device)
    if not found:
        record.status = "no samples"
    for number, sample in enumerate(found):
        record.runs += _runs(sample, number, bool(entry.supports_autograd), is_random(entry))
    return record


@dataclass
class _Reference:
    """What a single device gives."""

    outputs: list[Any]
    tangents: dict[int, Tensor]
    gradients: list[Tensor | None] | None


def _runs(sample: Sample, number: int, grad: bool, random: bool) -> list[Run]:
    try:
        reference = _reference(sample, grad)
    except Exception:
        return []
    found: list[Run] = []
    shapes = str([tuple(t.shape) for t in sample.tensors])
    traced = Traced(sample, detached(sample.args, grad), detached(sample.kwargs, grad))
    for name, placements in layouts(sample.tensors).items():
        forward, backward = _verdicts(traced, placements, reference, random)
        found.append(Run(number, name, " ".join(placements), shapes, forward, backward))
    return found


def _reference(sample: Sample, grad: bool) -> _Reference:
    torch.default_generator.manual_seed(7)  # torch.manual_seed tells every kind of device, which takes longer
    args, kwargs = detached(sample.args, grad), detached(sample.kwargs, grad)
    outputs = tree_leaves(sample.function(*args, **kwargs))
    generator = torch.Generator().manual_seed(3)
    tangents = {
        i: torch.randn(out.shape, dtype=out.dtype, generator=generator).to(out.device)
        for i, out in enumerate(outputs)
        if isinstance(out, Tensor) and out.requires_grad and grad
    }
    wanted = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    try:
        gradients = torch.autograd.grad(
            [outputs[i] for i in tangents], wanted, list(tangents.values()), allow_unused=True
        )
    except Exception:
        return _Reference(outputs, {}, None)
    return _Reference(outputs, tangents, list(gradients))


def _verdicts(
    traced: Traced, placements: Sequence[str], reference: _Reference, random: bool
) -> tuple[Verdict, Verdict]:
    torch.default_generator.manual_seed(7)
    try:
        outcome = run_sharded(traced, placements, reference.tangents)
    except Exception as error:
        return _failed(error), Verdict()
    wrong = _differs(outcome.outputs, reference.outputs, random)
    if not wrong and outcome.disagree and not random:
        wrong = f"ranks disagree about {', '.join(outcome.disagree)}"
    forward = _judged(wrong, outcome, "forward")
    if not reference.tangents:
        return forward, Verdict()
    if outcome.backward_error is not None:
        return forward, _failed(outcome.backward_error)
    return forward, _judged(_gradients_differ(outcome, reference, random), outcome, "backward")


def _failed(error: Exception) -> Verdict:
    status = "refused" if isinstance(error, ShardcError) else "error"
    return Verdict(status, "", f"{type(error).__name__}: {str(error)[:600]}")


def _judged(wrong: str, outcome: Outcome, phase: str) -> Verdict:
    steps = [step for step in outcome.steps if step.phase == phase]
    return Verdict("wrong" if wrong else "ok", part_of(steps), wrong, [str(step) for step in steps[:12]])


def part_of(steps: Sequence[Step]) -> str:
    """How much of the work was split; views, copies and constants count only where there is nothing else."""
    computing = [s for s in steps if not s.view and s.operands] or list(steps)
    # what has no operands is split if it is made in parts
    split = [s for s in computing if any(placement != "R" for placement in s.operands or s.results)]
    if not split:
        return "none" if computing else ""
    gathered = any(before != "R" and now == "R" for step in steps for before, now in step.moves)
    return "some" if gathered or len(split) < len(computing) else "full"


def _differs(given: Sequence[Any], expected: Sequence[Any], random: bool) -> str:
    if len(given) != len(expected):
        return f"{len(given)} outputs, should be {len(expected)}"
    for index, pair in enumerate(zip(given, expected, strict=True)):
        if why := differs(*pair, random):
            return f"output {index}: {why}"
    return ""


def _gradients_differ(outcome: Outcome, reference: _Reference, random: bool) -> str:
    assert outcome.gradients is not None and reference.gradients is not None
    for index, (given, expected) in enumerate(zip(outcome.gradients, reference.gradients, strict=True)):
        if given is None or expected is None:
            other = expected if given is None else given
            if other is not None and other.abs().max().item() != 0:
                return f"gradient {index}: {'missing' if given is None else 'there should be none'}"
        elif why := differs(given, expected, random):
            return f"gradient {index}: {why}"
    return ""


def differs(given: Any, expected: Any, random: bool = False) -> str:
    """Why a result is not what it should be; empty if it is."""
    if isinstance(expected, Tensor):
        return _tensor_differs(given, expected, random)
    if random or expected is None or isinstance(expected, (torch.dtype, torch.device, torch.layout)):
        return ""
    if isinstance(expected, float):
        near = abs(float(given) - expected) < 1e-3 * max(1, abs(expected)) or math.isnan(expected)
        return "" if near else f"{given}, should be {expected}"
    return "" if given == expected else f"{given}, should be {expected}"


def _tensor_differs(given: Any, expected: Tensor, random: bool) -> str:
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return f"{given.dtype}{list(given.shape)}, should be {expected.dtype}{list(expected.shape)}"
    if random:
        return ""
    given, expected = (t.detach().resolve_conj().resolve_neg() for t in (given, expected))
    if not (expected.is_floating_point() or expected.is_complex()):
        return "" if torch.equal(given, expected) else "other values"
    try:
        torch.testing.assert_close(given, expected, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).splitlines()[2:4])
    return ""
