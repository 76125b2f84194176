"""Experts that a model writes out itself run as the one operator, and train like the single device on every mesh.

All ways to write them with --whole-zoo, else those that share least.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from samples import written_experts as written
from samples.written_experts import Program
from shardc.capture.trace import capture
from shardc.errors import CaptureError

EXACT: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)
WAYS = [("ep=2", "exchanged"), ("ep=3", "in_parts"), ("ep=4", "exchanged"), ("dp=2,ep=2", "in_parts"), ("ep=2", "")]
SAMPLE = ["mixtral hits", "sorted", "masks", "switch", "dense stack", "stacked"]
X = torch.randn(4, 6, written.D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model: Any, program: Program, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    program.zero_grad()
    model(x).backward()
    # an expert without tokens has no gradient, or zeros
    leaves = [x, *program.parameters()]
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def compare(model: Any, program: Program, alone: Program, x: Tensor) -> None:
    torch.testing.assert_close(model(x).detach(), alone(x).detach(), **EXACT)
    for one, other in zip(gradients(model, program, x), gradients(alone, alone, x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layer_name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-zoo")
        metafunc.parametrize("layer_name", written.LAYERS if whole else SAMPLE)


def test_trains_like_the_single_device(layer_name: str) -> None:
    """Routings of every kind: as the router says, all tokens to one expert, and tokens that are all alike."""
    program = Program(written.LAYERS[layer_name])
    alone = copy.deepcopy(program)
    mesh, variant = WAYS[list(written.LAYERS).index(layer_name) % len(WAYS)]
    with forced.experts(variant):
        compiled = shardc.compile(program, mesh, (X,), hardware="h100", memory="unbounded")
    assert forced.EXPERT_CALLS[variant] in compiled.code
    assert not [call for call in ("nonzero(", "aten.silu", "aten.gelu") if call in compiled.code]
    for x in (X, X.abs() * 3, X[:1, :1].expand_as(X)):
        compare(compiled, program, alone, x)


class Noisy(written.DenseLoop):
    """Draws within experts, which the operator does not."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.w2 = nn.Sequential(expert.w2, nn.Dropout(0.5))  # type: ignore[assignment]


class Detached(written.DenseLoop):
    """Stops the gradient of an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[1].register_forward_hook(lambda _, __, out: out.detach())


class Unsorted(written.DenseLoop):
    """Gates of all experts, for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


class Crossed(written.DenseLoop):
    """The gate of one expert multiplies another."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities, scores, ids = self.route(x)
        gates = torch.zeros_like(probabilities).scatter(-1, ids, scores).flip(-1)
        return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


@pytest.mark.parametrize("layer", [Noisy, Detached, Unsorted, Crossed])
def test_what_is_something_else_stays_as_it_is(layer: type[nn.Module]) -> None:
    program = Program(layer)
    alone = copy.deepcopy(program)
    captured = capture(program, (X,))
    assert torch.ops.shardc.experts.default not in {node.target for node in captured.graph.nodes}
    if layer is Detached:
        compare(shardc.shard(program, mesh="dp=2"), program, alone, X)


class ReadToo(written.MistralLoop):
    """A sum is read before it is complete."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.view(-1, written.D)
        _, scores, ids = self.route(inputs)
        out, half = torch.zeros_like(inputs), torch.zeros_like(inputs)
        for e, expert in enumerate(self.experts):
            rows, choice = torch.where(ids == e)
            out.index_add_(0, rows, expert(inputs[rows]) * scores[rows, choice, None])
            if e == 2:
                half = out.clone()
        return (out + half.cos()).view(x.shape)


def test_a_sum_may_be_read_before_it_is_complete() -> None:
    program = Program(ReadToo)
    alone = copy.deepcopy(program)
    compare(shardc.shard(program, mesh="dp=2"), program, alone, X)


REFUSED: dict[str, Any] = {
    "sum": lambda x, mask: x[mask].sum(),
    "mean": lambda x, mask: x + x[mask].mean(0),
    "number": lambda x, mask: x / torch.where(mask)[0].shape[0],
    "length": lambda x, mask: x * len(x[mask]),
    "result": lambda x, mask: x[mask],
    "branch": lambda x, mask: x * 2 if mask.any() else x,
    "comparison": lambda x, mask: x * 2 if torch.where(mask)[0].numel() > 3 else x,
    "two masks": lambda x, mask: x.index_add(0, torch.where(mask)[0], x[~mask]),
    "along": lambda x, mask: x.index_add(0, torch.where(mask)[0], x[mask].cumsum(0)),
    "sorted": lambda x, mask: x.index_add(0, torch.where(mask)[0], x[mask].sort(0)[0]),
    "kept": lambda x, mask: x[mask] + 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hangs_on_how_many_rows_there_are_is_refused(name: str) -> None:
    class Selecting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return REFUSED[name](x, x[:, 0] > 0)

    with pytest.raises(CaptureError, match="only known when it runs"):
        capture(Selecting(), (X[0],))


def _counting(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Leaves a number behind in each turn."""
    seen = 0
    for mask in masks:
        if mask.any():
            x = x.index_add(0, torch.where(mask)[0], x[mask] * (2 if seen == 1 else 1))
            seen += 1
    return x


def _numbered(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Adds the experts' rows, each times its place among those that have any."""
    ids = x.topk(2)[1]
    mask = torch.nn.functional.one_hot(ids, written.D).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for place, expert in enumerate((mask.sum((-1, -2)) > 0).nonzero()):
        rows = torch.where(mask[expert].squeeze(0))[1]
        out.index_add_(0, rows, x[rows] * (1 + place))
    return out


JOINT: dict[str, Any] = {
    "one and not another": lambda x, m: x * 2 if m[1].any() and not m[2].any() else x,
    "one or not another": lambda x, m: x * (1 if m[0].any() or not m[3].any() else 2),
    "nested": lambda x, m: (x.sin() if m[3].any() else x) if not m[2].any() else x,
    "two are alike": lambda x, m: x * 2 if bool(m[0].any()) != bool(m[1].any()) else x,
    "a list": lambda x, m: x * 2 if [one for one in m if one.any()][:1] == [m[2]] else x,
    "a number of them": lambda x, m: x * 2 if sum(bool(one.any()) for one in m) == 2 else x,
    "answers added up": lambda x, m: x / max(sum(one.any().item() for one in m), 1),
    "numbers of rows": lambda x, m: x * 2 if x[m[0]].numel() and not x[m[3]].numel() else x,
    "left behind": _counting,
    "places": _numbered,
}


@pytest.mark.parametrize("name", JOINT)
def test_a_branch_that_several_selections_decide_together_is_refused(name: str) -> None:
    class Selecting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return JOINT[name](x, [x[:, place] > 0 for place in range(4)])

    with pytest.raises(CaptureError, match="only known when it runs"):
        capture(Selecting(), (X[0],), grad=False)


ROWS: dict[str, Any] = {
    "mask": lambda x, mask: x.index_add(0, torch.where(mask)[0], torch.layer_norm(x[mask], [written.D]).tanh()),
    "written": lambda x, mask: _written(x.clone(), mask, x[mask].softmax(-1)[:, None].squeeze(1)),
    "added": lambda x, mask: _added(x.clone(), mask, x[mask] @ x.mT[:, :8]),
    "if any": lambda x, mask: _if_any(x.clone(), mask),
}


def _written(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    x[mask] = rows
    return x


def _added(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    x[mask] += rows[:, :1]
    return x


def _if_any(x: Tensor, mask: Tensor) -> Tensor:
    if mask.any():
        x[mask] = x[mask].exp() * 2
    return x


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_mask_go_through_functions_that_work_by_row(name: str) -> None:
    class Selecting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ROWS[name](x, x[:, 0] > 0)

    x = X[0].detach()
    sharded = shardc.shard(Selecting(), mesh="dp=2")
    for given in (x, x.abs(), -x.abs()):
        torch.testing.assert_close(sharded(given), Selecting()(given), **EXACT)


AS_EVER: dict[str, Any] = {
    "a number by index": lambda x: torch.index_select(x[0, 0], 0, PLACES[:1]),
    "the largest of a number": lambda x: (
        x[0, 0].max(0)[0] + x[0, 1].topk(1)[0] + x[0, 2].sort(0)[0] + x[0, 3].argmax(0)
    ),
    "by name": lambda x: torch.index_select(x, dim=0, index=PLACES) + x.index_select(0, index=PLACES),
    "put by name": lambda x: x.sin().index_put(indices=(PLACES[:1],), values=x[:1]),
    "added by name": lambda x: torch.index_add(x, 0, index=PLACES, source=x[:2]),
}
PLACES = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("name", AS_EVER)
def test_calls_that_choose_nothing_are_traced_as_ever(name: str) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return AS_EVER[name](x)

    x = X[0].detach()
    torch.testing.assert_close(shardc.shard(Calls(), mesh="dp=2")(x), Calls()(x), **EXACT)
