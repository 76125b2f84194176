"""Rules for operators of the user: `shardc.rule(my_op, "m k, k n -> m n")`. Each is checked on small inputs first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

from shardc.errors import RuleError
from shardc.rules.notation import Dims, Rule, Size, maker_of, parse
from shardc.rules.trial.checker import Checker, Cut, Unfit, Unrunnable, undisturbed
from shardc.rules.trial.guard import survivors
from shardc.rules.trial.recombine import How
from shardc.rules.trial.sample_call import SampleCall, sample_calls
from shardc.rules.trial.trial import refusal

_GIVEN: dict[OpOverload, list[Rule]] = {}
_SIZES = (6, 4, 10, 9, 8, 12, 14, 15, 16, 18)


def rule(
    operator: OpOverload | OpOverloadPacket | CustomOpDef,
    text: str,
    *,
    linear: Iterable[Iterable[int]] = (),
    reads: Iterable[Iterable[int]] | None = None,
    sizes: Mapping[int, Size] | None = None,
    example: Sequence[Any] | None = None,
) -> None:
    """Say how an operator of `torch.library` may be split, for calls whose tensors have as many dims as in `text`.

    In `"m k, k n -> m n"` every letter is a factor. If all operands that carry a factor are cut along it, the results
    that carry it are cut likewise. The others are parts of a sum, or of another reduction: `k:max`, `k:min`, `k:prod`.
    `s!` is never split, `1` is a dim of size one, `_` an absent operand or result.

    - `linear`: groups of operands, by position among the tensors, in which the operator is additive if the other
      operands are fixed.
    - `reads`: for each result, the operands that it depends on (default: all).
    - `sizes`: by position of an integer argument, the factor whose size it is; of a list, its factors.

    Operators of the backward are operators too; each needs a rule. An operator may have several rules. If none fits a
    call, shardc looks for a rule by trial.

    The rule is checked on small inputs. `example` has the positional arguments of a call for operators whose inputs
    cannot be made up from the text: those with arguments without defaults, with indices, or with integers that must fit
    each other. RuleError if a claim does not hold, with the factor and the values that differ.
    """
    overload = _overload(operator)
    if maker_of(overload) is not None:
        raise RuleError(f"{overload} already has a rule in shardc, which a text cannot replace: leave yours out")
    reason = refusal(overload)
    if reason:
        raise RuleError(f"{overload} cannot have a rule: {reason}")
    parsed = parse(text, linear, reads, sizes, even=True)  # the checker does not try padding
    if parsed.indices or parsed.parted:
        raise RuleError(f"rule {text!r} of {overload}: `#` and `~` need more than a text; see shardc/rules/notation.py")
    _check(overload, parsed, text, example)
    _GIVEN.setdefault(overload, []).insert(0, parsed)


def given_rule(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> Rule | None:
    """The user's rule for one call; None if no rule fits the shapes of its tensors."""
    rules = _GIVEN.get(operator, [])
    call = SampleCall.of(operator, args, kwargs) if rules else None
    results = results if isinstance(results, (tuple, list)) else [results]
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in results]
    return next((rule for rule in rules if call is not None and not _misfit(rule, call.actual, shapes)), None)


def _overload(operator: Any) -> OpOverload:
    if isinstance(operator, CustomOpDef):
        return operator._opoverload
    if isinstance(operator, OpOverloadPacket):
        names = operator.overloads()
        if len(names) != 1:
            raise RuleError(f"{operator} has the overloads {', '.join(names)}: give each one a rule")
        return getattr(operator, names[0])
    if isinstance(operator, OpOverload):
        return operator
    raise RuleError(f"{operator!r} is not an operator of torch.library: wrap the function with torch.library.custom_op")


def _misfit(rule: Rule, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int] | None]) -> str:
    """Why a rule does not fit the shapes of a call; empty if it does."""
    named = [names for names in rule.operands if names is not None]
    if len(named) != len(operands):
        return f"it has {len(named)} operands, the call {len(operands)}"
    if len(rule.results) != len(results):
        return f"it has {len(rule.results)} results, the call {len(results)}"
    sizes: dict[str, int] = {}
    pairs = [*zip(named, operands, strict=True), *zip(rule.results, results, strict=True)]
    for names, shape in pairs:
        if names is None or shape is None:
            if names is not None or shape is not None:
                return "a result is absent in one and present in the other"
            continue
        if len(names) != len(shape):
            return f"{' '.join(n or '1' for n in names)!r} stands for a tensor of shape {tuple(shape)}"
        for name, size in zip(names, shape, strict=True):
            if name is None and size != 1:
                return f"'1' stands for a dim of size {size}"
            if name is not None and sizes.setdefault(name, size) != size:
                return f"{name} has the sizes {sizes[name]} and {size}"
    return ""


def _check(operator: OpOverload, rule: Rule, text: str, example: Sequence[Any] | None) -> None:
    """RuleError if the operator does not do what the rule claims."""
    title = f"rule {text!r} of {operator}"
    args = list(example) if example is not None else _made_up(operator, rule, title)
    call = SampleCall.of(operator, args, {})
    samples = sample_calls(call)
    if not samples:
        raise RuleError(f"{title} cannot be checked: {_complaint(call)}. Pass example=(...), the arguments of a call")
    misfit = _misfit(rule, samples[-1].actual, samples[-1].results)
    if misfit:
        raise RuleError(f"{title} does not fit a call with shapes {list(call.actual)}: {misfit}")
    (problem,) = survivors(lambda _: _verdict(rule, samples, example), [None], patience=300.0)
    if problem is None:
        raise RuleError(f"{title} cannot be checked: the operator does not survive a trial. Pass example=(...)")
    if problem:
        raise RuleError(f"{title}{problem}")


def _verdict(rule: Rule, samples: Sequence[SampleCall], example: Sequence[Any] | None) -> str:
    """What is wrong with the claim; empty if nothing is."""
    with undisturbed():
        try:
            checkers = list(_checkers(samples))
            if not checkers and example is not None:
                checkers = [Checker(samples[-1], example=list(_tensors(example)))]
        except Unfit as error:
            return f": the operator cannot have a rule: {error}"
        except Unrunnable:
            checkers = []
        if not checkers:
            return " cannot be checked: the operator does not run on made-up inputs. Pass example=(...)"
        return next(filter(None, (_Claim(checker, rule).check() for checker in checkers)), "")


def _checkers(samples: Sequence[SampleCall]) -> Iterator[Checker]:
    """A checker for each sample call that runs on made-up inputs."""
    for call in samples:
        with suppress(Unrunnable):
            yield Checker(call)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)  # type: ignore[arg-type]


def _made_up(operator: OpOverload, rule: Rule, title: str) -> list[Any]:
    """Arguments that fit the rule: tensors of its shapes, sizes where it names them, else the schema's defaults."""
    names = dict.fromkeys(n for dims in (*rule.operands, *rule.results) if dims for n in dims if n)
    size = {name: _SIZES[i % len(_SIZES)] for i, name in enumerate(names)}

    def shape(dims: Dims) -> list[int]:
        return [size[name] if name is not None else 1 for name in dims]

    operands = iter(rule.operands)
    args: list[Any] = []
    for position, argument in enumerate(operator._schema.arguments):
        type_ = str(argument.type)
        meaning = rule.sizes.get(position)
        if type_ in ("Tensor", "Optional[Tensor]"):
            dims = next(operands, None)
            args.append(None if dims is None else torch.empty(shape(dims)))
        elif isinstance(meaning, str):
            args.append(size[meaning])
        elif isinstance(meaning, tuple):
            args.append([n if isinstance(n, int) else size[n] for n in meaning])
        elif meaning is not None:
            args.append(shape(rule.results[meaning] or ()))
        elif argument.has_default_value():
            args.append(argument.default_value)
        else:
            raise RuleError(f"{title}: the rule does not say what to pass for {argument.name!r}; pass example=(...)")
    return args


def _complaint(call: SampleCall) -> str:
    """The error of the operator's fake kernel on a call that cannot be run, or why it is too large."""
    try:
        with FakeTensorMode():
            call.run([torch.empty(s, dtype=d) for s, d in zip(call.shapes, call.dtypes, strict=True)])
    except Exception as error:
        return f"on shapes {list(call.shapes)} it raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"a call with shapes {list(call.shapes)} is too large to be run"


class _Claim:
    """The claims of a rule about one sample call, factor by factor."""

    def __init__(self, checker: Checker, rule: Rule) -> None:
        self.checker, self.rule = checker, rule
        self.operands = [names for names in rule.operands if names is not None]

    def check(self) -> str:
        """What does not hold; empty if everything holds."""
        confirmed: list[tuple[Cut, list[How]]] = []
        for name in self._factors():
            cut, hows = self._cut(name), self._hows(name)
            problem = self.checker.difference([cut], [hows])
            if problem:
                return f": factor {name} does not hold. {problem}"
            confirmed.append((cut, hows))
        for one, other in itertools.combinations(confirmed, 2):
            problem = self.checker.difference([one[0], other[0]], [one[1], other[1]])
            if problem:
                return f": two of its factors do not hold together. {problem}"
        wrong = next((group for group in self.rule.linear if not self.checker.additive(group)), None)
        return "" if wrong is None else f": it is not linear in operands {set(wrong)}: f(a + b) is not f(a) + f(b)"

    def _factors(self) -> list[str]:
        """The factors that may be split and have more than one element in the sample call."""
        factors: dict[str, None] = {}
        for names, shape in zip(self.operands, self.checker.call.shapes, strict=True):
            factors |= {n: None for n, size in zip(names, shape, strict=True) if n and size > 1}
        for names, shape in zip(self.rule.results, self.checker.call.results, strict=True):
            if names is not None and shape is not None:
                factors |= {n: None for n, size in zip(names, shape, strict=True) if n and size > 1}
        return [name for name in factors if name not in self.rule.whole]

    def _hows(self, name: str) -> list[How]:
        return [
            names.index(name) if names is not None and name in names else self._reduced(name, i) or "same"
            for i, names in enumerate(self.rule.results)
        ]

    def _reduced(self, name: str, index: int) -> str:
        read = range(len(self.operands)) if self.rule.reads is None else self.rule.reads[index]
        names = self.rule.results[index]
        carried = any(name in self.operands[k] for k in read)
        return self.rule.reductions.get(name, "sum") if carried and names is not None and name not in names else ""

    def _cut(self, name: str) -> Cut:
        carriers = tuple(names.index(name) if name in names else None for names in self.operands)
        scaled = {path for path in self.checker.call.given if self._sized(path[0], path[1], name)}
        additive = frozenset.intersection(*self.rule.linear) if self.rule.linear else frozenset[int]()
        reduces = any(self._reduced(name, i) for i in range(len(self.rule.results)))
        shares = frozenset(k for k in additive if carriers[k] is None) if reduces else frozenset[int]()
        return Cut(carriers, frozenset(scaled), shares)

    def _sized(self, position: int, place: int | None, name: str) -> bool:
        meaning = self.rule.sizes.get(position)
        if isinstance(meaning, int):
            names = self.rule.results[meaning]
            return names is not None and place is not None and names[place] == name
        return meaning == name if place is None else isinstance(meaning, tuple) and meaning[place] == name
