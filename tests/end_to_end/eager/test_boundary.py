"""What Python sees of a trace: text of sizes, hooks on all modules, switches of a part, checkpoints."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from shardc import ShardcError, shard

LOGGER = logging.getLogger(__name__)


def both(model: nn.Module) -> tuple[Any, Any]:
    """The model on one device, and the same on a mesh."""
    return model, shard(copy.deepcopy(model), mesh="a=2")


class Spells(nn.Module):
    """Makes texts of sizes, which change from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.seen = nn.Linear(4, 4), dict[str, Any]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen[f"{x.shape[0]}x{x.shape[1]}"] = str(x.shape), f"{x.shape[0] / 4}"
            setattr(self, f"of_{len(x)}", repr(x.size(0)))
        print(x.shape, {"rows": x.shape[0]})
        LOGGER.warning("of %s", x.shape)
        return self.up(x)


@pytest.mark.parametrize("training", [True, False])
def test_sizes_that_change_are_digits_in_texts(
    training: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    for model in both(Spells().train(training)):
        caplog.clear()
        for rows in (3, 5, 6, 7, 5):
            model(torch.ones(rows, 4))
        left = {name: value for name, value in vars(model).items() if name.startswith("of_")}
        logged = [one.getMessage() for one in caplog.records if one.name == LOGGER.name]
        seen.append((model.seen, left, capsys.readouterr().out, logged))
    assert seen[0] == seen[1] and "s" not in seen[0][2].replace("torch.Size", "").replace("rows", "")


def test_hooks_on_all_modules_run_once_in_every_call() -> None:
    single, many = both(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    x, seen = torch.randn(2, 4), list[Any]()
    torch.testing.assert_close(many(x), single(x))  # before there are any

    def hook(part: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen.append((type(part).__name__, output.detach().mean()))
        return output * 2 if isinstance(part, nn.ReLU) else None

    register: Any = of_all_modules.register_module_forward_hook
    handle = register(hook)
    try:
        expected = [single(x * call) for call in range(2)]
        ours = list(seen)
        seen.clear()
        torch.testing.assert_close([many(x * call) for call in range(2)], expected)
    finally:
        handle.remove()
    assert [name for name, _ in seen] == [name for name, _ in ours]
    torch.testing.assert_close([mean for _, mean in seen], [mean for _, mean in ours])
    torch.testing.assert_close(many(x), single(x))


class OfDefaultDtype(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return x + 1, torch.linspace(0, 1, 8), torch.full((2,), 0.5), torch.full((2,), 3)
        finally:
            torch.set_default_dtype(before)


def test_a_part_of_forward_has_its_default_dtype() -> None:
    single, many = both(OfDefaultDtype())
    torch.testing.assert_close(many(torch.ones(4)), single(torch.ones(4)), rtol=0, atol=0)


def test_integers_that_a_default_dtype_of_forward_makes_floating_are_refused() -> None:
    def thirds(x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        y = torch.arange(8) / 3
        torch.set_default_dtype(torch.float32)
        return x * y

    with pytest.raises(ShardcError, match=r"test_boundary\.py:\d+.*convert the integers"):
        shard(thirds, mesh="a=2")(torch.ones(8))


class Views(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, bool]:
        try:
            return x.view(4, -1), x.is_contiguous()
        except RuntimeError:
            return x.reshape(4, -1) * 2, x.is_contiguous()


def test_the_memory_of_inputs_decides_which_views_there_are() -> None:
    single, many = both(Views())
    whole = torch.randn(4, 8, 16)
    for x in (whole[:, :4, :8], whole[:, :4, ::2], whole[:, :1, :8].expand(4, 4, 8), whole[:, :4], whole[:, ::2]):
        torch.testing.assert_close(many(x), single(x))


class Checkpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.part = nn.Sequential(self.up, nn.Dropout(0.5), self.down)

    def forward(self, x: Tensor, early: bool) -> Tensor:
        h = x if early else self.first(x)  # without gradients of its arguments, a part has none
        return self.first(checkpoint(self.part, h, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("early", [False, True])
def test_parts_that_are_computed_again_by_a_backward_of_their_own(early: bool) -> None:
    seen: list[Any] = []
    for model in both(Checkpoints()):
        torch.manual_seed(3)
        loss = model(torch.ones(6, 4), early).square().mean()
        loss.backward()
        seen.append((loss, [p.grad for p in model.parameters()], torch.rand(1)))
    assert pytree.tree_structure(seen[0]) == pytree.tree_structure(seen[1])
    for a, b in zip(*map(pytree.tree_leaves, seen), strict=True):
        torch.testing.assert_close(b, a) if a is not None else None


class AsksItsBuffers(nn.Module):
    """Starts with its first batch, writes into a ring, and counts."""

    started: Tensor
    mean: Tensor
    ring: Tensor
    at: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.sizes = nn.Linear(4, 4), torch.tensor([2, 2])  # no buffer
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("ring", torch.zeros(4, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.started:
            self.mean.copy_(x.detach().mean(0))
            self.started.data.fill_(True)
        at = int(self.at)
        h = self.up(x - self.mean)
        self.ring[at : at + 2] = h.detach()
        self.at[0] = (at + 2) % 4
        self.steps += 1
        h = h * 2 if self.steps > 2 else h
        return h.sum(), h.view(-1, *self.sizes.tolist())


def test_values_of_the_models_own_small_tensors_may_be_asked_for() -> None:
    seen, programs = list[Any](), list[Any]()
    for model in both(AsksItsBuffers()):
        for step in range(7):
            if step == 5:
                model.started.fill_(False)
            torch.manual_seed(step)
            loss, h = model(torch.randn(2, 4))
            model.zero_grad()
            (h.square().sum() if step == 3 else loss).backward()  # from an output for which no gradient was planned
            seen.append([loss, h, model.up.weight.grad, *(one.clone() for one in model.buffers())])
            programs.append(getattr(model, "compiled", None))
    torch.testing.assert_close(seen[7:], seen[:7])
    assert programs[-1] is programs[-3] is not programs[-2]  # of each place in the ring one, whatever the count is


def test_layers_that_differ_in_what_they_ask_for() -> None:
    class Layer(nn.Linear):
        on: Tensor

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("on", torch.tensor(True))

        def forward(self, input: Tensor) -> Tensor:
            return input + super().forward(input) if self.on else input

    single, many = both(nn.Sequential(*(Layer() for _ in range(7))))
    x = torch.randn(2, 4)
    for turned in (3, 5):
        single[turned].on.logical_not_()
        many[turned].on.logical_not_()
        torch.testing.assert_close(many(x), single(x))


def test_another_thread_goes_backward_while_a_model_is_traced() -> None:
    other, weight = nn.Linear(4, 4), list[Any]()

    def train() -> None:
        other(torch.ones(2, 4)).sum().backward()
        weight.append(other.weight.grad)

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            return x * 2

    torch.testing.assert_close(shard(Waits(), mesh="a=2")(torch.ones(4)), torch.full((4,), 2.0))
    assert weight and weight[0] is not None


def keeps_its_graph(x: Tensor) -> Tensor:
    kept = STATE.get("h", torch.zeros(4))
    STATE["h"] = kept + x
    return STATE["h"] * 2


def multiplies_types(x: Tensor) -> Tensor:
    return (x @ torch.ones(4, 4)) @ torch.ones(4, 4, dtype=torch.float64)


def keeps_a_number(x: Tensor) -> Tensor:
    STATE["n"] = x.sum().item()
    return x * 2


STATE: dict[str, Any] = {}


@pytest.mark.parametrize(
    "function, message",
    [
        (keeps_its_graph, r"STATE\['h'\], a tensor of shape \(4,\) through which backward would go on"),
        (multiplies_types, r"test_boundary\.py:\d+: an operator gets float32 and float64, and takes one type"),
        (keeps_a_number, r"test_boundary\.py:\d+.*take the tensor itself"),
    ],
)
def test_refusals_name_what_and_the_way_out(function: Any, message: str, caplog: pytest.LogCaptureFixture) -> None:
    STATE.clear()
    model = shard(function, mesh="a=2")
    x = torch.ones(2, 4, requires_grad=True) if function is multiplies_types else torch.ones(4, requires_grad=True)
    with pytest.raises(ShardcError, match=message):
        for _ in range(2):
            model(x)
    assert not [one for one in caplog.records if one.name.startswith("torch._subclasses")]
