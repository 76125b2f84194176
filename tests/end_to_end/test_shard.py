"""What a person does with `shard`: on instances, classes and functions, in training, copied, saved."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from samples.pairs import MESH, MLP, Decorated, Tied, check, inputs, pair
from shardc import shard


def test_on_an_instance_keeps_paths_class_and_state() -> None:
    single, model = pair()
    assert isinstance(model, MLP) and type(model).__name__ == "MLP"
    assert list(model.state_dict()) == list(single.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in single.named_modules()]
    check(single, model, inputs())


def test_on_a_class() -> None:
    model = Decorated().double()
    single = MLP().double()
    single.load_state_dict(model.state_dict())
    check(single, model, inputs())
    assert str(model.plan.mesh) == MESH


def test_each_instance_of_a_class_has_its_own_plan() -> None:
    one, other = Decorated(), Decorated(12)
    one(torch.zeros(2, 8))
    other(torch.zeros(6, 12))
    assert one.plan is not other.plan
    assert "12" in other.graph("capture") and "[2, 12]" not in one.graph("capture")


def test_on_a_function() -> None:
    @shard(mesh=MESH)
    def attention(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
        return torch.softmax(q @ k.T * scale, -1)

    q, k = inputs(4, 8).requires_grad_(), inputs(6, 8)
    found = attention(q, k, scale=0.5)
    expected = torch.softmax(q @ k.T * 0.5, -1)
    torch.testing.assert_close(found, expected)
    weight = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    grads = [torch.autograd.grad((out * weight).sum(), q)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(attention(q, k, scale=2.0), torch.softmax(q @ k.T * 2.0, -1))


@dataclass
class Pair:
    first: Tensor
    rest: dict[str, Tensor]


torch.utils._pytree.register_dataclass(Pair)


class Nested(nn.Module):
    """Structures in and out, with leaves that are no tensors."""

    def forward(
        self, batch: dict[str, Tensor], pair: Pair, flag: bool, *, names: tuple[str, ...] = ()
    ) -> dict[str, object]:
        total = batch["x"] * 2 + pair.first
        return {
            "total": total if flag else -total,
            "pair": Pair(pair.rest["y"] + 1, {"z": total.sum()}),
            "names": names,
            "none": None,
        }


def test_structures_in_and_out() -> None:
    model = shard(Nested(), mesh=MESH)
    x = inputs()
    for flag in (True, False):
        found = model({"x": x}, Pair(x + 1, {"y": x - 1}), flag, names=("a", "b"))
        expected = Nested()({"x": x}, Pair(x + 1, {"y": x - 1}), flag, names=("a", "b"))
        assert isinstance(found["pair"], Pair) and found["names"] == ("a", "b") and found["none"] is None
        torch.testing.assert_close(found["total"], expected["total"])
        torch.testing.assert_close(found["pair"].first, expected["pair"].first)
        torch.testing.assert_close(found["pair"].rest["z"], expected["pair"].rest["z"])


class Dropping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.dropout(self.up(x), 0.5, self.training))


def test_training_and_inference_alternate() -> None:
    single, model = pair(Dropping)
    x = inputs()
    for training in (True, False, True):
        single.train(training)
        model.train(training)
        torch.manual_seed(5)
        one = single(x)
        torch.manual_seed(5)
        torch.testing.assert_close(model(x), one)
        with torch.no_grad():
            torch.manual_seed(6)
            one = single(x)
            torch.manual_seed(6)
            other = model(x)
        torch.testing.assert_close(other, one)
        assert not other.requires_grad
    with torch.inference_mode():
        model.eval()
        torch.testing.assert_close(model(x), single.eval()(x))


def test_new_shapes_compile_again_and_old_ones_do_not() -> None:
    single, model = pair()
    check(single, model, inputs(4, 8))
    first = model.plan
    check(single, model, inputs(6, 8))
    assert model.plan is not first
    check(single, model, inputs(2, 3, 8))
    check(single, model, inputs(4, 8))
    assert model.plan is first


def test_deepcopy_and_pickle() -> None:
    single, model = pair()
    check(single, model, inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(Decorated()))):
        assert isinstance(twin, MLP)
        twin.double().load_state_dict(single.state_dict())
        check(single, twin, inputs())
        assert str(twin.plan.mesh) == MESH


def test_pickle_of_a_sharded_instance() -> None:
    single, model = pair()
    check(single, model, inputs())
    check(single, pickle.loads(pickle.dumps(model)), inputs())


def test_torch_save_of_the_state() -> None:
    _, model = pair()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = MLP().double()
    other.load_state_dict(torch.load(file))
    check(other, model, inputs())


def test_parameter_names_that_start_with_digits() -> None:
    single, model = pair(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    check(single, model, inputs())
    compile(model.code, "generated", "exec")


def test_tied_weights() -> None:
    single, model = pair(Tied)
    assert model.head.weight is model.embed.weight
    check(single, model, torch.arange(8).view(2, 4))


class Counting(nn.Module):
    """A buffer that is read, one that changes, and a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.norm(x @ self.frozen + self.shift)


def test_buffers_and_frozen_parameters() -> None:
    single, model = pair(Counting)
    for _ in range(3):
        check(single, model, inputs())
    assert int(model.steps) == 3
    torch.testing.assert_close(model.norm.running_mean, single.norm.running_mean)
    model.frozen.requires_grad_()
    single.frozen.requires_grad_()
    check(single, model, inputs())
    assert model.frozen.grad is not None


def test_inputs_that_require_gradients() -> None:
    single, model = pair()
    found: list[Tensor] = []
    for part in (single, model):
        x = inputs().requires_grad_()
        part(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_sharded_model_inside_a_larger_program() -> None:
    single, model = pair()
    head = nn.Linear(8, 1).double()
    check(nn.Sequential(single, head), nn.Sequential(model, copy.deepcopy(head)), inputs())


def test_sharding_again_replaces_the_request() -> None:
    single, model = pair()
    check(single, model, inputs())
    model = shard(model, mesh="x=4")
    check(single, model, inputs())
    assert str(model.plan.mesh) == "x=4"


def test_plain_decorator_uses_the_whole_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    model = shard(MLP())
    monkeypatch.undo()
    model(torch.zeros(4, 8))
    assert str(model.plan.mesh) == "dp=4"


def test_optimizer_made_before_sharding_keeps_its_parameters() -> None:
    single = MLP().double()
    model = copy.deepcopy(single)
    optimizers = [torch.optim.AdamW(part.parameters(), 1e-2) for part in (single, model)]
    model = shard(model, mesh=MESH)
    for _ in range(3):
        check(single, model, inputs())
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(single.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
