"""Variants: how many strategies they make, which groups one axis splits together, what is refused."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from checks.brute_force import Call
from samples.calls.sample import Sample, real
from samples.paired_operator import SCRATCH, prefix_mix_in_parts
from shardc.errors import RuleError
from shardc.ir.mesh import Mesh
from shardc.planning.strategies import OperatorOptions, strategies_of
from shardc.rules.factors.bodies import work
from shardc.rules.factors.strategy import PLAIN, Strategy, demand, legal, make, variants_of, workspace
from shardc.rules.notation import ONLY, Band, Send, Travel, Variant, parse
from shardc.runtime import VirtualMesh, all_reduce, permute

aten = torch.ops.aten
PAIR: Any = torch.ops.paired.prefix_mix.default
TWO_WAYS: Any = torch.ops.paired.prefix_mix_two_ways.default
ONE = Mesh((("a", 2),))
TWO = Mesh((("a", 2), ("b", 2)))
MESHES: tuple[tuple[tuple[str, int], ...], ...] = (
    (("a", 2),),
    (("a", 3),),
    (("a", 4),),
    (("a", 5),),
    (("a", 2), ("b", 2)),
    (("a", 2), ("b", 3)),
)


def body(*_: Any) -> None: ...


def paired(rows: int = 6, columns: int = 12, target: Any = PAIR) -> Sample:
    return Sample(target, (real(rows, 4), real(columns, 4), real(rows, columns)))


def softmax(operator: Any = aten._softmax.default) -> Sample:
    return Sample(operator, (real(6, 12), 1, False))


def test_a_strategy_for_every_split_and_variant() -> None:
    strategies = Call(softmax()).strategies(ONE)
    assert [(s.split, s.variant) for s in strategies] == [
        (((), ()), PLAIN),
        ((("a",), ()), PLAIN),
        (((), ("a",)), "all_reduce"),
        (((), ("a",)), "all_gather"),
    ]


@pytest.mark.parametrize(
    "sample", [softmax(), paired(), paired(target=TWO_WAYS), Sample(aten.logsumexp.default, (real(6, 1, 12), [0, -1]))]
)
@pytest.mark.parametrize("mesh", [ONE, TWO])
def test_no_strategy_is_offered_twice(sample: Sample, mesh: Mesh) -> None:
    call = Call(sample)
    strategies = call.strategies(mesh)
    assert len(set(strategies)) == len(strategies)
    assert all(legal(call.shape, strategy, mesh) for strategy in strategies)
    for split in {s.split for s in strategies}:
        passes = {s.passes for s in strategies if s.split == split}
        names = variants_of(call.shape, split)
        assert len([s for s in strategies if s.split == split]) == len(names) * len(passes)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(aten.cumsum.default, (real(6, 12), 1)),
        Sample(aten.mm.default, (real(6, 4), real(4, 12))),
        Sample(aten.native_layer_norm.default, (real(6, 4, 12), [4, 12], None, None, 1e-5)),
        Sample(aten.roll.default, (real(6, 12), [5], [1])),
    ],
)
def test_one_variant_makes_no_more_strategies_and_no_other_order(sample: Sample) -> None:
    """Axes choose in the order: nothing, each factor, each linear group; each split has its orders of axes."""
    call = Call(sample)
    strategies = strategies_of(call.shape, TWO).strategies
    free = [i for i, factor in enumerate(call.shape.factors) if not factor.whole]
    groups = [f"group {g}" for g in range(len(call.shape.linear))]
    expected: list[tuple[Any, Any]] = []
    for a in [None, *free, *groups]:
        for b in [None, *free, *groups]:
            passes = tuple((axis, int(c[6:])) for axis, c in (("a", a), ("b", b)) if isinstance(c, str))
            split: dict[int, list[str]] = {}
            for axis, c in (("a", a), ("b", b)):
                if isinstance(c, int):
                    split.setdefault(c, []).append(axis)
            both = [i for i, axes in split.items() if len(axes) == 2]
            for order in permutations("ab") if both else ["ab"]:
                held = {i: tuple(order) if i in both else tuple(axes) for i, axes in split.items()}
                expected.append((tuple(held.get(i, ()) for i in range(len(call.shape.factors))), passes))
    offered = [(s.split, s.passes) for s in strategies]
    kept = set(offered)
    assert offered == [one for one in expected if one in kept]
    for strategy in strategies:
        parted = any(f.parting and axes for f, axes in zip(call.shape.factors, strategy.split, strict=True))
        assert strategy.variant == (ONLY if parted else PLAIN)


def test_an_axis_splits_a_group_together_or_not_at_all() -> None:
    call = Call(paired())
    places = {factor.name: i for i, factor in enumerate(call.shape.factors)}
    for mesh in (ONE, TWO):
        strategies = call.strategies(mesh)
        assert all(s.split[places["i"]] == s.split[places["j"]] for s in strategies)
        assert any(s.split[places["i"]] for s in strategies)
    orders = {s.split[places["i"]] for s in call.strategies(TWO)}
    assert orders == {(), ("a",), ("b",), ("a", "b"), ("b", "a")}
    alone = Strategy(tuple(("a",) if i == places["i"] else () for i in range(3)), variant="gathered")
    assert not legal(call.shape, alone, ONE)


def test_what_carries_a_group_is_split_along_its_first_factor() -> None:
    call = Call(paired())
    strategy = next(s for s in call.strategies(ONE) if s.variant == "gathered")
    assert [demand(call.shape, strategy, k, ONE).axes for k in range(3)] == [(("a",), ()), (("a",), ()), (("a",), ())]
    assert make(call.shape, strategy, 0, ONE).axes == (("a",), ())
    _, moved = work(call.shape, strategy, ONE)
    assert moved == 8 * (3 * 4 + 6 * 4 + 3 * 12 + 3 * 4)


def test_what_a_variant_allocates() -> None:
    call = Call(paired(target=TWO_WAYS))
    sizes = {s.variant: workspace(call.shape, s, ONE) for s in call.strategies(ONE)}
    assert sizes == {PLAIN: 0, "frugal": 0, "roomy": 4 * 8 * SCRATCH}


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("target", [PAIR, TWO_WAYS])
def test_a_group_is_right_on_every_rank(axes: tuple[tuple[str, int], ...], rows: int, target: Any) -> None:
    mesh, machine = Mesh(axes), VirtualMesh(dict(axes))
    call = Call(paired(rows, 12, target))
    split = 0
    for strategy in call.strategies(mesh):
        told = call.check(strategy, mesh, machine)
        assert not told, f"{strategy}: {told}"
        split += strategy.variant != PLAIN
    assert split


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("operator", [aten._softmax.default, aten._log_softmax.default])
def test_every_variant_of_a_softmax_is_right(axes: tuple[tuple[str, int], ...], operator: Any) -> None:
    mesh, machine = Mesh(axes), VirtualMesh(dict(axes))
    x = real(6, 7)
    x[0], x[1, 0], x[2, 1], x[3, :4] = -torch.inf, torch.inf, torch.nan, -torch.inf
    call = Call(Sample(operator, (x, 1, False)))
    names = set[str]()
    for strategy in call.strategies(mesh):
        told = call.check(strategy, mesh, machine)
        assert not told, f"{strategy}: {told}"
        names.add(strategy.variant)
    assert names == {PLAIN, "all_reduce", "all_gather"}


def test_variants_that_differ_in_their_body_alone_are_one_shape() -> None:
    one, other = Call(softmax()).shape, Call(softmax(aten._log_softmax.default)).shape
    assert one == other and hash(one) == hash(other)


ROUND = Send(permute, ("s",), 8, travel=Travel.ROUND)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "two of one name": ("s~ -> s~", {"variants": [Variant("x", body), Variant("x", body)]}, "or used twice: 'x'"),
    "no name": ("s~ -> s~", {"variants": [Variant("", body)]}, "name is empty or used twice: ''"),
    "body twice": ("s~ -> s~", {"variants": [Variant("x", body)], "body": body}, "has a body and variants"),
    "unknown": ("r~, s~ -> r~", {"variants": [Variant("x", body, together=(("r", "t"),))]}, "splits t together"),
    "not parted": ("r, s~ -> r", {"variants": [Variant("x", body, together=(("r", "s"),))]}, "splits r together"),
    "alone": ("r~ -> r~", {"variants": [Variant("x", body, together=(("r",),))]}, "two or more factors"),
    "twice": ("r~, s~ -> r~", {"variants": [Variant("x", body, together=(("r", "r"),))]}, "two or more factors"),
    "no ring": (
        "r~, s~ -> r~", {"variants": [Variant("x", body, {"s": [ROUND]}, together=(("r", "s"),))]}, "needs a band",
    ),
    "apart": ("r~, s~ -> r~", {"variants": [Variant("x", body, {"s": [ROUND]})], "band": Band("r", "s")}, "together"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    text, given, message = REFUSED[case]
    with pytest.raises(RuleError, match=message) as error:
        parse(text, **given)
    assert repr(text) in str(error.value)


def test_a_body_is_the_only_variant() -> None:
    sends = {"s": [Send(all_reduce, (), 8)]}
    rule = parse("s~ -> s~", body=prefix_mix_in_parts, sends=sends)
    assert [(v.name, v.body, v.sends) for v in rule.variants] == [(ONLY, prefix_mix_in_parts, sends)]
    assert rule.variant(ONLY) is rule.variants[0]
    assert parse("s -> s").variants == ()


def test_seconds_are_those_of_the_variant() -> None:
    from shardc.cost.hardware import hardware

    call = Call(softmax())
    options = OperatorOptions(call.shape, ONE, hardware("h100"), [], [], frozenset())
    found = dict(zip([s.variant for s in options.strategies], options.seconds, strict=True))
    assert found["all_gather"] < found["all_reduce"]  # two ranks: the same bytes in one message
