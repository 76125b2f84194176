"""Plans as files: saved and loaded they are the same plan, and still answer; edited by hand, what they say holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from samples.causal_decoder import CausalDecoder
from samples.textbook import MLP
from samples.towers import Tower
from shardc.api import Compiled
from shardc.errors import ShardcError
from shardc.explain.plan_file.as_json import as_json, written
from shardc.passes import assign

SCHEMA = json.loads(files("shardc.explain.plan_file").joinpath("schema.json").read_text())


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        vocab_size=32, use_cache=False,
    ))  # fmt: skip


def experts() -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4))


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    mesh: str
    inputs: Callable[[], Any]
    asked: Mapping[str, Any] = MappingProxyType({})
    solved: Callable[[], AbstractContextManager[None]] = nullcontext
    says: str = ""
    """What the file says of some operator."""


TOKENS = torch.arange(8).repeat(2, 1)
KINDS = {
    "mlp": Kind(lambda: MLP(16, 32), "dp=2,tp=2", lambda: (torch.ones(8, 16),), {"constraints": {"up.weight": "tp,-"}}),
    "recomputed": Kind(
        lambda: Tower(blocks=2), "dp=2", lambda: (torch.ones(512, 32),),
        {"memory": "690KB", "optimizer": "sgd"}, says=", again",
    ),
    "llama": Kind(llama, "tp=2", lambda: {"input_ids": TOKENS, "labels": TOKENS}, {"memory": "45KB"}, says=", again"),
    "experts": Kind(
        experts, "ep=2", lambda: (torch.ones(8, 16), torch.arange(2).repeat(8, 1), torch.ones(8, 2)),
        {"hardware": "h100", "memory": "unbounded"}, lambda: forced.experts("exchanged"), "variant exchanged",
    ),
    "ring": Kind(
        lambda: CausalDecoder("-", "cp~folded", layers=1), "cp=2", lambda: (torch.arange(16)[None] % 24,),
        solved=lambda: forced.attention(forced.ring("cp")), says=", variant ring -> ",
    ),
    "dynamic": Kind(
        lambda: MLP(16, 32), "dp=2", lambda: (torch.ones(8, 16),),
        {"dynamic": {"x": {0: "batch"}}, "constraints": {"up": ("dp", None)}}, says="m@dp",
    ),
}  # fmt: skip


def compiled(kind: Kind, **options: Any) -> Compiled:
    return shardc.compile(kind.make(), kind.mesh, kind.inputs(), **options)


class Saved(NamedTuple):
    kind: Kind
    program: Compiled
    path: Path


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    kind, path = KINDS[request.param], tmp_path_factory.mktemp("plans") / "plan.json"
    with kind.solved():
        program = compiled(kind, **kind.asked)
    program.plan.save(path)
    return Saved(kind, program, path)


@pytest.fixture
def unsolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be solved."""

    def solve(*_: object, **__: object) -> None:
        raise AssertionError("this solves")

    monkeypatch.setattr(assign, "solve", solve)
    monkeypatch.setattr(assign, "Frontier", solve)


def printed(program: Compiled) -> str:
    return str(program.plan).rpartition("\n")[0]


def test_a_file_is_the_same_plan(saved: Saved, unsolved: None) -> None:
    """Without solving, and without naming what was asked for; and it is written the same."""
    text = saved.path.read_text()
    jsonschema.validate(json.loads(text), SCHEMA)
    assert saved.kind.says in text
    again = compiled(saved.kind, plan=saved.path)
    assert again.code == saved.program.code
    assert printed(again) == printed(saved.program)
    assert written(as_json(again.plan)) == text


@pytest.mark.parametrize("saved", ["mlp", "recomputed"], indirect=True)
def test_it_answers_as_the_one_that_was_solved(saved: Saved) -> None:
    plan, again = saved.program.plan, compiled(saved.kind, plan=str(saved.path)).plan
    name = next(one.name for one in plan.placed if one.name.endswith(".weight"))
    if saved.kind is KINDS["mlp"]:
        assert str(again.why("down.weight")) == str(plan.why("down.weight"))
        assert str(again.why_not("down.weight", "-,-")) == str(plan.why_not("down.weight", "-,-"))
        assert again.conflicts() == plan.conflicts() and again.assumes() == plan.assumes()
    else:
        assert again.why(name).readers == plan.why(name).readers
    assert again.check() == pytest.approx(plan.check(), rel=1e-6)


@pytest.mark.parametrize("saved", ["dynamic"], indirect=True)
def test_sizes_other_than_those_of_the_file_take_its_strategies(saved: Saved, unsolved: None) -> None:
    model = saved.kind.make()
    other = shardc.compile(model, "dp=2", (torch.ones(12, 16),), plan=saved.path)
    assert "planned at batch=8" in str(other.plan) and "12@dp" in str(other.plan)
    assert "10@dp" in str(other.at(_call(model, torch.ones(10, 16)), [torch.ones(10, 16)]).plan)


def _call(model: nn.Module, x: Tensor) -> Any:
    from shardc.ir.model_call import ModelCall

    return ModelCall.of(model, (x,))


class Edited(NamedTuple):
    data: dict[str, Any]
    path: Path

    def compiled(self, **options: Any) -> Compiled:
        self.path.write_text(json.dumps(self.data))
        return compiled(KINDS["mlp"], plan=self.path, **options)


@pytest.fixture(scope="module")
def mlp() -> dict[str, Any]:
    return as_json(compiled(KINDS["mlp"], hardware="h100", memory="unbounded").plan)


@pytest.fixture
def edited(mlp: dict[str, Any], tmp_path: Path) -> Edited:
    return Edited(json.loads(json.dumps(mlp)), tmp_path / "edited.json")


def test_an_edited_layout_holds_and_the_rest_stays(edited: Edited) -> None:
    """The parameter lies as the file says, its reader runs as before: the weight is gathered in between."""
    assert edited.data["parameters"]["up.weight"] == "f32[32, 16]"
    edited.data["parameters"]["up.weight"] = "f32[32@tp, 16]"
    plan = edited.compiled().plan
    assert "parameter  up.weight    f32[32@tp, 16]" in str(plan)
    assert (
        plan.why("mm").strategy == compiled(KINDS["mlp"], hardware="h100", memory="unbounded").plan.why("mm").strategy
    )
    assert any(one.kind == "all_gather" and one.value == "up.weight" for one in plan.conversions)
    assert "edited.json was edited" in str(plan) and plan.cost >= plan.lower_bound > 0


def test_what_is_left_out_is_solved_again(edited: Edited) -> None:
    """All operators left out, the layouts of parameters are constraints: the plan is that of compiling with these."""
    edited.data["parameters"] = {"up.weight": "f32[32@tp, 16]", "down.weight": "f32[16, 32@tp]"}
    edited.data["operators"] = {}
    asked: dict[str, Any] = {"up.weight": "tp,-", "down.weight": "-,tp"}
    right = compiled(KINDS["mlp"], hardware="h100", memory="unbounded", constraints=asked)
    found = edited.compiled()
    assert found.plan.cost == pytest.approx(right.plan.cost) and found.plan.placed == right.plan.placed
    assert found.plan.check() == pytest.approx(found.plan.cost)
    edited.data["parameters"] = {"*.weight": None}
    assert edited.compiled().plan.cost == pytest.approx(edited.data["proof"]["cost"], rel=1e-6)


def test_an_operator_may_be_told_by_what_it_makes(edited: Edited) -> None:
    edited.data["operators"]["up mm"] = "-> f32[8, 32@tp]"
    assert edited.compiled().plan.layouts["mm"] == shardc.Layout.parse("f32[8, 32@tp]")
    edited.data["operators"]["up mm"] = "n@tp"
    assert edited.compiled().plan.why("mm").strategy == "tp splits n"


def test_an_edited_plan_stays_within_the_bound_on_memory(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    kind = Kind(lambda: Tower(8, 1), "dp=2", lambda: (torch.ones(256, 8),), {"memory": "70KB", "optimizer": "sgd"})
    data = as_json(compiled(kind, **kind.asked).plan)
    forward = {name: text for name, text in data["operators"].items() if "backward" not in name}
    path.write_text(json.dumps({**data, "operators": forward}))
    plan = compiled(kind, plan=path).plan
    assert plan.memory.peak <= 70e3 and plan.cost == pytest.approx(data["proof"]["cost"], rel=0.01)
    path.write_text(json.dumps({**data, "operators": dict.fromkeys(forward, "whole")}))
    with pytest.raises(ShardcError, match=r"plan.json says held fixed: no plan was found for dp=2 that holds at most"):
        compiled(kind, plan=path)


@pytest.mark.parametrize(("section", "name", "text", "told"), [
    ("parameters", "up.weight", "f32[32@dq, 16]", "no axis 'dq'"),
    ("parameters", "up.weight", "f32[32@tp]", "1 entry for a tensor of shape"),
    ("parameters", "up.weight", "f32[(4 8@tp), 16]", "cuts dim 0 into 4 x 8"),
    ("parameters", "up.weight", "f32[32, 16] +sum@tp", "write one of f32[32, 16]"),
    ("parameters", "down.wait", "f32[16, 32]", "names nothing in the program; it has 'up.weight', 'down.weight'"),
    ("operators", "up mm", "q@tp", "which axes split which of its factors (m, k, n)"),
    ("operators", "up mm", "m@tp, n@tp", "write one of"),
    ("operators", "up mm", "m@dp -> f32[8, 32@dp]", "m@dp makes f32[8@dp, 32]"),
    ("operators", "up mm", "m@dp; stored as f32[8, 32]", "behind ';' write"),
])  # fmt: skip
def test_what_is_not_legal_is_told_by_entry_and_value(
    edited: Edited, section: str, name: str, text: str, told: str
) -> None:
    edited.data[section][name] = text
    with pytest.raises(ShardcError, match=re.escape(told)) as raised:
        edited.compiled()
    assert f"edited.json: {section}[{name!r}]" in str(raised.value)
