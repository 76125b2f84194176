"""Capture: the graph computes what the model computes, and leaves the model alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.captured import execute, operators, verify
from samples.small import Small, X
from shardc.capture.torch_patches.aot_autograd import joint_graph
from shardc.capture.trace import capture
from shardc.errors import CaptureError
from shardc.ir.program import Role


def test_shared_modules_are_tied() -> None:
    inner = nn.Linear(4, 4)
    module = nn.Sequential(inner, nn.Tanh(), inner)
    program = verify(module, X, scalar=False)
    assert program.tied == {"2.weight": "0.weight", "2.bias": "0.bias"}


@pytest.mark.parametrize("reads", [False, True])
def test_a_model_that_changes_something_is_traced_in_full_once(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    class Counts(nn.Module):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return x * int(self.steps) if reads else x

    graphs: list[Any] = []

    def noted(*arguments: Any) -> Any:
        graphs.append(joint_graph(*arguments))
        return graphs[-1]

    monkeypatch.setattr("shardc.capture.model_trace.joint_graph", noted)
    model = Counts()
    capture(model, (X,))
    assert len(graphs) == 1 and model.steps == 0


def test_placeholder_names_are_unique_identifiers() -> None:
    module = Small(lambda self, y: (y * self.lambda_ * self.inner_weight).sum())
    module.register_parameter("lambda_", nn.Parameter(torch.ones(4)))
    module.register_parameter("inner_weight", nn.Parameter(torch.ones(4)))
    names = [node.target for node in verify(module, X).placeholders]
    assert len(set(names)) == len(names)


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float
    extra: Tensor | None = None


@dataclasses.dataclass
class Answer:
    mean: Tensor
    rest: dict[str, Any]


def test_structures_come_back() -> None:
    def then(self: nn.Module, y: Tensor, batch: Batch) -> Answer:
        y = y * batch.scale
        rest = {"list": [y, (y, None, 3)], "input": batch.x, "ids": y.argmax(-1), "same": y, "view": y[0], "flag": True}
        return Answer((y * batch.x).mean(), rest)

    program = verify(Small(then), X, Batch(X + 1, 2.0))
    assert [port.index for port in program.inputs if port.role is Role.INPUT] == [0, 1]


def test_choice_of_the_differentiable_outputs() -> None:
    def then(self: nn.Module, y: Tensor) -> Any:
        return y.sum(), y * 2, y.argmax()

    def tangents(**options: Any) -> list[int]:
        program = capture(Small(then).double(), (X,), **options)
        return [port.index for port in program.inputs if port.role is Role.TANGENT]

    assert tangents() == [0]
    assert tangents(differentiable=frozenset({0, 1})) == [0, 1]
    assert tangents(differentiable=frozenset({1})) == [1]
    assert tangents(differentiable=frozenset()) == []
    with pytest.raises(CaptureError, match=r"output 2 does not require a gradient"):
        tangents(differentiable=frozenset({2}))


def test_inputs_may_require_gradients_and_be_overwritten() -> None:
    module = Small(lambda self, y: (y * y).sum()).double()
    program = capture(module, (X.clone().requires_grad_(),))
    _, _, grads = execute(program, module, (X,), {})
    torch.testing.assert_close(grads["input:0"], 2 * module.inner(X) @ module.inner.weight)

    module = Small(lambda self, y, count: (y.sum(), count.add_(1))[0]).double()
    program = capture(module, (X, torch.zeros(3)))
    _, mutations, _ = execute(program, module, (X, torch.zeros(3)), {})
    torch.testing.assert_close(mutations["input:1"], torch.ones(3))


def test_buffers_assigned_or_written_are_mutations() -> None:
    def assign(self: Any, y: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return y.sum()

    def write(self: Any, y: Tensor) -> Tensor:
        self.steps += y.detach().mean(0)
        return y.sum() + self.steps.sum()

    for then in (assign, write):
        program = verify(Small(then), X)
        assert [port.name for port in program.outputs if port.role is Role.MUTATION] == ["steps"]


def test_constants_become_placeholders() -> None:
    table = torch.arange(4, dtype=torch.float64)
    program = verify(Small(lambda self, y: ((y + table) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()), X)
    assert len(program.constants) == 2
    assert [port.name for port in program.inputs if port.role is Role.CONSTANT] == list(program.constants)


def test_recurrent_and_multihead_attention_layers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.rnn(x)
            return self.attention(x, x, x, need_weights=False)[0].square().mean()

    program = verify(Mixed(), torch.randn(2, 3, 4, dtype=torch.float64))
    assert operators(program)["shardc.attention.default"] == 1


@pytest.mark.parametrize("kind", ["gqa", "mask", "float mask", "learned mask", "3-D", "scale", "broadcast"])
def test_attention_means_what_torch_means(kind: str) -> None:
    def then(self: nn.Module, y: Tensor, q: Tensor, mask: Tensor) -> Tensor:
        k = torch.stack([y, y * 2]).unsqueeze(0).expand(2, 2, 2, 4)
        bias = y.sum(-1).expand(2, 4, 2, 2)
        options: dict[str, dict[str, Any]] = {
            "gqa": {"enable_gqa": True, "is_causal": True},
            "mask": {"attn_mask": mask, "enable_gqa": True},
            "float mask": {"attn_mask": mask.double(), "enable_gqa": True},
            "learned mask": {"attn_mask": bias, "enable_gqa": True},
            "scale": {"scale": 0.3, "enable_gqa": True},
        }
        if kind == "3-D":
            return F.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 1], is_causal=True).sum()
        if kind == "broadcast":
            return F.scaled_dot_product_attention(q[:, :1], k[:1, :1], k[:1, :1]).sum()
        return F.scaled_dot_product_attention(q, k, k + 1, **options[kind]).square().sum()

    q = torch.randn(2, 4, 2, 4, dtype=torch.float64)
    program = verify(Small(then), X, q, torch.tensor([[True, False], [True, True]]))
    fused = operators(program)["shardc.attention.default"]
    assert fused == (0 if kind == "learned mask" else 1)
    assert not any("scaled_dot" in name for name in operators(program))


def snapshot(module: nn.Module) -> Any:
    registries = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    parts = [
        (part.training, sorted(vars(part)), *[dict(vars(part)[r]) for r in registries]) for part in module.modules()
    ]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    return parts, values, torch.get_rng_state(), torch.compiler._is_compiling_flag, F.scaled_dot_product_attention


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails: bool) -> None:
    def then(self: Any, y: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        self.last = y
        y = F.dropout(self.norm(y)) + torch.rand(4)
        return y.sum() if not fails or y.sum() > 0 else y.mean()

    module = Small(then)
    module.norm = nn.BatchNorm1d(4)
    parts, values, rng, *flags = snapshot(module)
    with pytest.raises(CaptureError) if fails else nullcontext():
        capture(module, (X.float(),))
    now_parts, now_values, now_rng, *now_flags = snapshot(module)
    assert len(parts) == len(now_parts)
    for before, now in zip(parts, now_parts, strict=True):
        assert before[:2] == now[:2]
        for old, new in zip(before[2:], now[2:], strict=True):
            assert old.keys() == new.keys() and all(old[key] is new[key] for key in old)
    assert all(torch.equal(values[name], now_values[name]) for name in values)
    assert torch.equal(rng, now_rng) and flags == now_flags
    assert not nn.modules.module._global_forward_hooks and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "branch",
    [
        lambda y: y if y.sum() > 0 else -y,
        lambda y: y * y.max().item(),
        lambda y: y[y > 0],
        lambda y: y[: int(y.argmax())],
        lambda y: y.nonzero(),
    ],
)
def test_data_dependence_is_explained(branch: Callable[[Tensor], Tensor]) -> None:
    class Gate(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return branch(y)

    module = nn.ModuleDict({"gate": Gate()})
    module.forward = lambda x: module["gate"](x).sum()
    with pytest.raises(CaptureError) as caught:
        capture(module, (X,))
    message = str(caught.value)
    assert "'gate'" in message and "test_trace.py:" in message and "lambda y: y" in message and "torch.where" in message
    assert caught.value.__cause__ is not None


def test_other_failures_keep_their_cause() -> None:
    with pytest.raises(CaptureError, match=r"module 'inner'") as caught:
        capture(Small(lambda self, y: y), (torch.zeros(2, 5),))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_arguments_stand_where_the_schema_has_them() -> None:
    program = verify(Small(lambda self, y: y.sum(dim=0).softmax(dim=-1, dtype=torch.float64).std(correction=0)), X)
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.sum.dim_IntList:
            assert len(node.args) >= 2
    assert math.isclose(sum(n.op == "output" for n in program.graph.nodes), 1)
