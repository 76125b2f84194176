"""Rules found by trial: what is found for operators that were made to mislead it, and what is refused."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks.brute_force import Call
from samples.calls.sample import Sample
from samples.odd_operators import FOUND, ints, real
from shardc.errors import RuleError
from shardc.ir.mesh import Mesh
from shardc.rules.trial import learned as memory
from shardc.rules.trial.guard import survivors
from shardc.rules.trial.learned import learned
from shardc.rules.trial.trial import Learned, learn
from shardc.runtime import VirtualMesh

aten = torch.ops.aten


def tried(operator: Any, *args: Any, **kwargs: Any) -> Learned:
    return learn(operator, args, kwargs)


@pytest.mark.parametrize("name", FOUND)
def test_odd_operators(name: str) -> None:
    args, text = FOUND[name]
    found = tried(getattr(torch.ops.odd, name).default, *args)
    assert found.text == text, found


@pytest.mark.parametrize("name", FOUND)
def test_every_strategy_of_what_was_found_is_right(name: str) -> None:
    """The rule goes the way of every other: lowered under each strategy and run on every rank."""
    generator = torch.Generator().manual_seed(5)
    drawn = [
        a if not isinstance(a, Tensor)
        else torch.randn(a.shape, generator=generator, dtype=torch.float64) if a.is_floating_point()
        else torch.randint(-9, 9, a.shape, generator=generator)
        for a in FOUND[name][0]
    ]  # fmt: skip
    sample = Sample(getattr(torch.ops.odd, name).default, tuple(drawn))
    for split, axes in (("no", (("a", 2),)), ("minor", (("a", 2),)), ("no", (("a", 2), ("b", 2)))):
        mesh, call = Mesh(axes), Call(sample, split)
        for strategy in call.strategies(mesh):
            assert call.check(strategy, mesh, VirtualMesh(dict(axes))) == ""


LINEAR = {
    "threshold_far_out": [], "dead_zone": [], "rarely_coupled": [], "running_sum": [{0}], "rotated_pairs": [{0}],
    "square_product": [{0}, {1}], "gated_product": [{0}, {2}], "scaled_product": [{0}, {1}, {2}], "clamped_sum": [],
    "plus_squares": [], "norm": [], "largest_magnitude": [],
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operands(name: str) -> None:
    found = tried(getattr(torch.ops.odd, name).default, *FOUND[name][0])
    assert [set(group) for group in found.linear] == LINEAR[name]


@pytest.mark.parametrize(
    "operator, args, text",
    [
        (aten.addmm.default, (real(6), real(12, 4), real(4, 6)), "a, b c, c a -> b a"),
        (aten.mm.default, (real(8, 8), real(8, 8)), "a b, b c -> a c"),
        (aten.add.Tensor, (real(8, 8), real(8)), "a b, b -> a b"),
        (aten.amax.default, (real(4, 6), [1], True), "a b:max -> a 1"),
        (aten._softmax.default, (real(4, 6), -1, False), "a b! -> a c!"),
        (aten.topk.default, (real(400, 1000), 50), "a b! -> a c!, a d!"),
        (aten.isnan.default, (real(4, 6),), "a b -> a b"),
        (aten.any.default, (real(4, 6),), "a! b! -> "),  # of random numbers none is ever zero
        (aten.count_nonzero.dim_IntList, (real(4, 6), [0]), "a b -> b"),
        (aten.linalg_cholesky_ex.default, (real(8, 5, 5),), "a b! c! -> a d! e!, a"),
        (aten.convolution.default, (real(8, 64, 9), real(32, 64, 3), real(32), [1], [1], [1], False, [0], 1),
         "a b d!, c b e!, c -> a c f!"),
    ],
)  # fmt: skip
def test_operators_of_torch(operator: Any, args: tuple[Any, ...], text: str) -> None:
    assert tried(operator, *args).text == text


def test_sizes_become_local() -> None:
    assert tried(torch.ops.odd.sized.default, real(8, 6), 6).sizes == {1: "b"}
    assert tried(aten.new_zeros.default, real(8, 6), [12, 5]).sizes == {1: ("a", "b")}


def test_a_large_call_is_tried_on_small_sizes() -> None:
    found = tried(torch.ops.odd.square_product.default, real(4096, 4096), real(4096, 4096))
    assert found.text == "a b, b c -> a c"
    assert tried(aten.pixel_shuffle.default, real(64, 4096, 32, 32), 2).text == "a b! c! d! -> a e! f! g!"


@pytest.mark.parametrize(
    "operator, args, why",
    [
        (aten.rand_like.default, (real(4, 6),), "random"),
        (aten.nonzero.default, (real(4, 6),), "known only when it runs"),
        (aten.add_.Tensor, (real(4, 6), real(4, 6)), "changes its arguments"),
        (aten.as_strided.default, (real(4, 6), [4], [1]), "strides of its operand"),
    ],
)
def test_what_no_rule_can_describe(operator: Any, args: tuple[Any, ...], why: str) -> None:
    assert why in tried(operator, *args).refused


_calls = 0


@torch.library.custom_op("odd::forgetful", mutates_args=())
def forgetful(x: Tensor) -> Tensor:
    global _calls
    _calls += 1
    return x + _calls


@torch.library.custom_op("odd::transposer", mutates_args=())
def transposer(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, (x.shape[1], 1)).clone()


for _operator in (forgetful, transposer):
    _operator.register_fake(torch.empty_like)


def test_state_and_memory_are_found_out() -> None:
    assert "two runs" in tried(torch.ops.odd.forgetful.default, real(4, 6)).refused
    assert "strides of its operands" in tried(torch.ops.odd.transposer.default, real(6, 6)).refused


def test_the_random_stream_stays_where_it_is() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tried(aten.mm.default, real(4, 6), real(6, 5))
    assert torch.equal(before, torch.get_rng_state())


def test_disk_remembers_operators_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "_KNOWN", {})
    found = learned(aten.addmm.default, (real(6), real(12, 4), real(4, 6)), {})
    (file,) = (tmp_path / "shardc" / "rules").iterdir()
    monkeypatch.setattr(memory, "_KNOWN", {})
    monkeypatch.setattr(memory, "learn", lambda *_: pytest.fail("tried again"))
    again = learned(aten.addmm.default, (real(6), real(12, 4), real(4, 6)), {})
    assert again == found and again.rule() == found.rule()

    monkeypatch.setattr(memory, "learn", learn)
    for damaged in ("", "{", "[]", file.read_text().replace("->", "")):
        file.write_text(damaged)
        monkeypatch.setattr(memory, "_KNOWN", {})
        assert learned(aten.addmm.default, (real(6), real(12, 4), real(4, 6)), {}) == found


def test_disk_does_not_remember_operators_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    learned(torch.ops.odd.turned.default, (real(9, 9),), {})
    assert not (tmp_path / "shardc").exists()


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.ops.odd.square_product(self.up(x).detach(), x)
        return torch.ops.odd.sum_of_squares(torch.ops.odd.nothing_splits(h)) + torch.ops.odd.rolled(h, 3).sum(1)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2", "dp=4"])
def test_a_model_of_operators_without_rules(mesh: str) -> None:
    model, x = Odd(), torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(shardc.compile(model, mesh, (x,))(x), expected)


def test_integers_are_not_taken_for_linear() -> None:
    assert tried(aten.abs.default, ints(4, 6)).linear == ()


def test_refusal_names_the_place() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.odd.forgetful(x)

    with pytest.raises(RuleError, match=r"odd.forgetful.default \(test_trial.py:\d+\).*two runs"), torch.no_grad():
        shardc.compile(Model(), "dp=2", (torch.randn(4, 6),))


def test_the_plan_lists_what_was_tried_and_what_runs_whole() -> None:
    with torch.no_grad():
        plan = shardc.compile(Odd(), "dp=2", (torch.randn(8, 8, dtype=torch.float64),)).plan
    (whole,) = [one for one in plan.tried if one.replicated]
    assert whole.operator == "odd.nothing_splits.default" and "test_trial.py:" in whole.place
    assert whole.seconds > 0
    text = str(plan)
    assert "odd.rolled.default" in text and '"a b! -> a c!"' in text
    assert "run whole on every rank, for want of a rule\n  odd.nothing_splits.default  x1" in text


def test_gathers_before_an_unknown_operator_are_counted() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.odd.nothing_splits(x)

    x = torch.randn(64, 64)
    with torch.no_grad():
        plan = shardc.compile(nn.Sequential(nn.Linear(64, 64), Model()), "dp=2", (x,), mode="propagate",
                              constraints={"0": ("dp", None)}).plan  # fmt: skip
    (whole,) = plan.tried
    assert whole.gathered == 64 * 64 * 4 / 2 and whole.gather_seconds > 0


def test_on_unknown_error_names_operator_place_and_way_out() -> None:
    with pytest.raises(RuleError) as caught, torch.no_grad():
        shardc.compile(Odd(), "dp=2", (torch.randn(8, 8, dtype=torch.float64),), on_unknown="error")
    assert "odd.nothing_splits.default (test_trial.py:" in str(caught.value)
    assert "shardc.rule" in str(caught.value) and "on_unknown='replicate'" in str(caught.value)
    with pytest.raises(shardc.ShardcError, match="on_unknown='ignore' is not known; it is one of replicate, error"):
        shardc.compile(Odd(), "dp=2", (torch.randn(8, 8),), on_unknown="ignore")


def _fatal(item: int) -> int:
    if item == 1:
        os.abort()
    if item == 3:
        time.sleep(60)
    if item == 5:
        raise ValueError(item)
    return item * item


def test_a_trial_may_die_hang_or_raise() -> None:
    assert survivors(_fatal, range(7), patience=2.0) == [0, None, 4, None, 16, None, 36]


@torch.library.custom_op("odd::wild", mutates_args=())
def wild(x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        os.abort()
    return x.sum(1)


wild.register_fake(lambda x: x.new_empty(x.shape[0]))


def test_an_operator_that_dies_on_some_parts_can_be_split_elsewhere() -> None:
    assert tried(torch.ops.odd.wild.default, real(8, 6)).text == "b! a -> c!"
