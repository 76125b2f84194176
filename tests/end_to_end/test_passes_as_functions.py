"""Passes are functions of a compilation: what one was given is there afterwards, and parts of the list run again."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn

import shardc
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.printing import printed
from shardc.ir.verifier import VARIABLE
from shardc.options import Options
from shardc.passes import localize, reshard
from shardc.passes.pipeline import NAMES, PIPELINE, part, run
from shardc.planning.compilation import Compilation
from shardc.rules.notation import RuleError, parse
from shardc.source.calls import CallTexts, imported


class Narrow(nn.Module):
    """Small weights, whose gradients share a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def compiled(memory: str | None = None) -> dict[str, Compilation]:
    snapshots: dict[str, Compilation] = {}
    call = ModelCall.of(Narrow(), (torch.zeros(4096, 16),))
    run(PIPELINE, Compilation(call, Mesh.parse("dp=4"), Options(hardware="cpu", memory=memory)), snapshots)
    return snapshots


@pytest.mark.parametrize("memory", [None, "2MB"])
def test_every_part_of_the_list_runs_again_from_what_a_pass_left(memory: str | None) -> None:
    snapshots = compiled(memory)
    code = snapshots["codegen"].code()
    for before, after in itertools.pairwise(NAMES[4:]):
        assert run(part(after, "codegen"), snapshots[before]).code() == code, f"from {after} on"


def test_what_a_pass_left_reads_as_it_did_after_later_passes_took_it() -> None:
    left: dict[str, str] = {}
    c = Compilation(ModelCall.of(Narrow(), (torch.zeros(64, 16),)), Mesh.parse("dp=4"), Options(hardware="cpu"))
    snapshots: dict[str, Compilation] = {}
    for one in PIPELINE:
        c = run([one], c, snapshots)
        if c.has("lowered"):
            left[one.name] = printed(c.lowered.lines(), c.mesh)
    assert left == {name: printed(snapshots[name].lowered.lines(), c.mesh) for name in left}


def test_graphs_are_written_once_while_a_program_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)  # the verifier reads what was taken, which is written again for it
    written: list[str] = []
    for module, name in ((reshard, "resharded"), (localize, "localized")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, name=name: (written.append(name), real(*args))[1])
    compiled()
    assert written == ["resharded", "localized"]


def test_what_people_call_can_be_pickled() -> None:
    for function in (shardc.shard, shardc.compile, shardc.search_mesh):
        assert pickle.loads(pickle.dumps(function)) is function


def test_a_dynamic_program_keeps_no_input_alive() -> None:
    model = nn.Linear(8, 8)
    inputs = [torch.randn(4, 8), torch.randn(6, 8)]
    program = shardc.compile(model, "dp=2", (inputs[0],), dynamic={"input": {0: "batch"}})
    for x in inputs:
        program(x)
    seen = [weakref.ref(x) for x in inputs]
    del x
    inputs.clear()
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_sizes_may_be_computed_with_as_fractions() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.shape[0] ** 0.5 / (x.shape[0] / 2)

    program = shardc.compile(Scaled(), "dp=2", (torch.ones(4, 8),), dynamic={"x": {0: "batch"}})
    for batch in (4, 6):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(program(x), Scaled()(x))


def test_bodies_of_one_name_are_told_apart() -> None:
    def module(name: str, source: str) -> ModuleType:
        made = ModuleType(name)
        exec(source, vars(made))
        return made

    one, other = (module(name, "def softmax(x): return x") for name in ("users_one", "users_other"))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(other.softmax, (graph.call_function(one.softmax, (x,)),)))
    assert sorted(imported(CallTexts(graph, {"softmax"}).bodies)) == [
        "from users_one import softmax as softmax_1",
        "from users_other import softmax as softmax_2",
    ]


def test_a_body_that_no_module_has_is_refused() -> None:
    with pytest.raises(RuleError, match=r"generated code cannot import; write it as a function of its module"):
        parse("a s~ -> a s~", body=lambda x, *, s: x)
