"""Dynamic sizes: one capture and one plan serve calls of many sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shardc
from samples.models import MODELS, loss_of
from samples.odd_sizes import DIVIDES, Decoder, train, words
from shardc.errors import ShardcError

BATCH_AND_SEQUENCE = {0: "batch", 1: "seq"}


@pytest.mark.parametrize("mesh", ["dp=4", "dp=2,tp=2", "a=3"])
def test_one_trace_serves_many_sizes(mesh: str, traces: list[object]) -> None:
    torch.manual_seed(0)
    single = Decoder().double()
    model = shardc.shard(
        Decoder().double(), mesh=mesh, hardware=DIVIDES,
        dynamic={"words": BATCH_AND_SEQUENCE, "labels": BATCH_AND_SEQUENCE},
    )  # fmt: skip
    model.load_state_dict(single.state_dict())
    for batch, length in ((8, 12), (6, 9), (7, 5), (16, 12), (8, 12)):
        inputs = words(batch, length)
        (loss, gradients), (expected, right) = train(model, inputs), train(single, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients, right, rtol=1e-10, atol=1e-10)
    assert len(traces) == 1
    assert "assign" in model.compiled.plan.phases and "capture" in model.compiled.plan.phases
    model(*words(9, 7))
    assert any("planned at batch=8, seq=12" in note for note in model.plan.notes)


def test_sizes_that_break_an_assumption_are_traced_on_their_own(traces: list[object]) -> None:
    single = Decoder().double()
    model = shardc.shard(Decoder().double(), mesh="dp=2", dynamic={"words": {0: "batch"}, "labels": {0: "batch"}})
    model.load_state_dict(single.state_dict())
    for batch in (4, 1, 2):
        inputs = words(batch, 6)
        torch.testing.assert_close(train(model, inputs)[0], train(single, inputs)[0], rtol=1e-10, atol=1e-10)
    assert len(traces) == 2


def test_compiled_ahead_of_time(traces: list[object]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    compiled = shardc.compile(model, "dp=2,tp=2", (torch.randn(4, 8).double(),), dynamic={"input": {0: "batch"}})
    for batch in (4, 6, 5, 32):
        x = torch.randn(batch, 8).double()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    assert len(traces) == 1


def test_a_transformer_of_the_zoo(traces: list[object]) -> None:
    torch.manual_seed(0)
    single, inputs = MODELS["llama"](torch.float64)
    names = {name: BATCH_AND_SEQUENCE for name in inputs}
    compiled = shardc.compile(single, "dp=2,tp=2", inputs, dynamic=names, hardware="cpu")
    for batch, length in ((2, 8), (6, 5), (3, 16)):
        given = {name: torch.randint(0, 64, (batch, length)) for name in inputs}
        torch.testing.assert_close(loss_of(compiled(**given)), loss_of(single(**given)), rtol=1e-10, atol=1e-10)
    assert len(traces) == 1


def test_inputs_that_disagree_on_a_size() -> None:
    model = shardc.shard(Decoder(), mesh="dp=2", dynamic={"words": {0: "batch"}, "labels": {0: "batch"}})
    with pytest.raises(ShardcError, match="dynamic size 'batch' is 4 in input 0 but 6 in dim 0 of input 1"):
        model(words(4, 6)[0], words(6, 6)[0])


@pytest.mark.parametrize(
    ("dynamic", "says"),
    [
        ({"word": {0: "batch"}}, "has no argument 'word'; it has words, labels"),
        ({"words": {2: "batch"}}, r"dim 2 is out of range for shape \(4, 6\)"),
    ],
)
def test_dynamic_dims_that_do_not_exist(dynamic: dict[str, dict[int, str]], says: str) -> None:
    with pytest.raises(ShardcError, match=says):
        shardc.compile(Decoder(), "dp=2", words(4, 6), dynamic=dynamic)


def test_a_size_that_the_model_fixes() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(4, 3)

    with pytest.raises(ShardcError, match="'batch' is declared dynamic, but the model's code fixes it to 4"):
        shardc.compile(Fixed(), "dp=2", (torch.ones(4, 3),), dynamic={"x": {0: "batch"}})


def test_functions_and_parameters_without_names(traces: list[object]) -> None:
    def scaled(x: Tensor, *more: Tensor, mask: Tensor) -> Tensor:
        return sum(more, x).cumsum(0) * mask

    sharded = shardc.shard(scaled, mesh="dp=2", dynamic={"x": {0: "batch"}, "mask": {0: "batch"}})
    for batch in (4, 6, 7):
        x, mask, more = torch.randn(batch, 3), torch.randn(batch, 1), (torch.randn(3), torch.randn(1, 3))
        torch.testing.assert_close(sharded(x, *more, mask=mask), scaled(x, *more, mask=mask))
    assert len(traces) == 1
