"""Generated code that Inductor compiles: one program for each of its functions, the numbers and the order of
collectives of the code as it is written, and a cost that knows of fused kernels."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

import shardc
from shardc import shard
from shardc.cost.hardware import hardware
from shardc.runtime import Context, Executable, RankError, load

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(x)) * self.up(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


IDS = torch.arange(64).view(4, 16) % 32
SPLIT = {"layers.*.up.weight": ("a", None)}


def step(model: nn.Module) -> list[Any]:
    loss = model(IDS)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def plain(graph: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
    """In place of Inductor: the traced graph as it is, which takes no time to compile."""
    return graph


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    torch.manual_seed(0)
    return Decoder()


def sharded(model: nn.Module, mesh: str, **asked: Any) -> Any:
    asked = {"hardware": "h100", "constraints": SPLIT, **asked}
    return shard(copy.deepcopy(model), mesh=mesh, **asked)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The collectives that rank 0 starts, with their axes and shapes, in order."""
    seen: list[Any] = []
    send = Context.send

    def noted(self: Context, collective: Any, axis: str, operand: Tensor, op: str) -> Callable[[], Tensor]:
        if self.rank == 0:
            seen.append((collective.name, axis, tuple(operand.shape), op))
        return send(self, collective, axis, operand, op)

    monkeypatch.setattr(Context, "send", noted)
    return seen


def test_every_function_is_one_program_with_the_collectives_of_the_code(
    decoder: nn.Module, starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", plain)
    written = sharded(decoder, "a=2")
    expected = step(written)
    order, starts[:] = list(starts), []
    compiled = sharded(decoder, "a=2", compile="inductor")
    torch.testing.assert_close(step(compiled), expected)
    assert order and {one[0] for one in starts} == {one[0] for one in order}
    kinds = compiled.compiled.executable.module.COMPILED
    layers = {name for name in kinds if name.startswith("layer")}
    assert layers == {name for name in re.findall(r"def (\w+)", compiled.code) if name.startswith("layer")} != set()
    assert {kind.reason for kind in kinds.values()} == {""}
    assert all(kind.programs in (1, 2) for kind in kinds.values())  # 2 where a rank's place decides what it computes
    starts[:] = []
    compiled(IDS).backward()
    again, starts[:] = list(starts), []
    sharded_code = Executable(load(compiled.code))
    state = {**dict(compiled.named_parameters()), **dict(compiled.named_buffers())}
    sharded_code.run(state, [IDS])[0].backward()
    assert again == starts  # what is compiled starts the collectives of the text, in its order
    assert all(kind.programs in (1, 2) for kind in kinds.values())


@needs_compiler
def test_inductor_with_a_cpp_compiler_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x, results = torch.randn(8, 8), []
    torch._dynamo.utils.counters.clear()
    for how in ("none", "inductor"):
        made: Any = shard(copy.deepcopy(model), mesh="a=2", hardware="cpu", compile=how, constraints={"0": (None, "a")})
        y = made(x)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in made.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    kinds = made.compiled.executable.module.COMPILED
    assert list(kinds) == ["forward", "backward"] and all(kind.programs in (1, 2) for kind in kinds.values())
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_draws_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", plain)
    model: Any = shard(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), mesh="a=2", compile="inductor")
    torch.manual_seed(0)
    y = model(torch.ones(4, 8))
    torch.manual_seed(0)
    torch.testing.assert_close(y, F.dropout(F.linear(torch.ones(4, 8), model[0].weight, model[0].bias)))
    y.sum().backward()
    kinds = model.compiled.executable.module.COMPILED
    assert "no random generator" in kinds["forward"].reason and kinds["backward"].programs == 1


class Numbered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.arange(x.shape[0])[:, None]).tanh().sum()


def test_what_depends_on_the_place_in_the_batch_is_compiled_for_each_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", plain)
    x = torch.randn(8, 4)
    made = shard(Numbered(), mesh="a=2", compile="inductor", microbatches=4)
    torch.testing.assert_close(made(x), Numbered()(x))


def test_one_source_for_many_sizes_is_compiled_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", plain)
    model = nn.Linear(4, 4)
    made: Any = shard(copy.deepcopy(model), mesh="a=2", compile="inductor")
    for rows in (8, 6, 7, 9, 11, 12):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(made(x), model(x))
    assert "SIZES" in made.code


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: object, given: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.raises(RankError, match=r"compile='inductor' needs a C\+\+ compiler.*install g\+\+"):
        shard(nn.Linear(8, 8), mesh="a=1", compile="inductor")(torch.ones(4, 8))


class Chain(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x.sin() * y).exp()


def test_a_chain_of_elementwise_operators_is_read_and_written_once() -> None:
    h100, size = hardware("h100"), 2**22
    inputs = (torch.empty(size), torch.empty(size))
    with torch.no_grad():
        costs = [
            shardc.compile(Chain(), "a=1", inputs, hardware=h100, compile=how).plan.compute  # type: ignore[arg-type]
            for how in ("none", "inductor")
        ]
    one = 4 * size / h100.memory_bandwidth
    assert costs == pytest.approx([9 * one + 4 * h100.launch, 3 * one + h100.launch])
