"""Checkpoints in one process: what they hold, what is refused, and what a failure leaves."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import shardc
from shardc.errors import ShardcError
from shardc.runtime.checkpoint import files, state
from shardc.runtime.checkpoint.storage import CheckpointWriter

X = torch.linspace(-1, 1, 24).view(4, 6)


class Tied(nn.Module):
    """Weights that are tied, frozen, and without a gradient; a buffer; dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.norm(torch.tanh(self.first(x)))))


class Place:
    """A place in the data."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def run_of(seed: int, sharded: bool) -> tuple[Any, dict[str, Any]]:
    """A model, and everything else of a run."""
    model: Any = Tied(seed)
    averaged = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    model = shardc.shard(model, mesh="dp=2", hardware="cpu") if sharded else model
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=0.05)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    return model, {"optimizer": optimizer, "scheduler": scheduler, "ema": averaged, "data": Place()}


def losses(model: Any, run: dict[str, Any], steps: int) -> list[float]:
    """Train on."""
    made: list[float] = []
    for _ in range(steps):
        loss = model(X).square().mean()
        run["optimizer"].zero_grad()
        loss.backward()
        run["optimizer"].step()
        run["scheduler"].step()
        run["ema"].update_parameters(model)
        run["data"].value += 1
        made.append(loss.item())
    return made


def saved(folder: Path, *steps: int) -> nn.Module:
    """A small model, saved after each of `steps` with other values."""
    model = nn.Linear(2, 2)
    for step in steps:
        with torch.no_grad():
            model.weight.fill_(step)
        shardc.save_checkpoint(folder, model, step=step).result()
    return model


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)], ids=["from sharded", "to sharded"])
def test_a_run_goes_on_as_if_nothing_had_been(tmp_path: Path, before: bool, after: bool) -> None:
    model, run = run_of(0, before)
    losses(model, run, 3)
    place = shardc.save_checkpoint(tmp_path, model, step=3, **run).result()
    expected = losses(model, run, 3)
    assert (place / "plan.json").exists() == before
    other, theirs = run_of(1, after)
    assert shardc.load_checkpoint(tmp_path, other, **theirs) == 3
    assert losses(other, theirs, 3) == pytest.approx(expected, abs=1e-6)
    assert theirs["data"].value == 6
    for one, two in zip(run["ema"].state_dict().values(), theirs["ema"].state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True, foreach=False),
    **{
        name: getattr(torch.optim, name)
        for name in (
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adamax",
            "ASGD",
            "LBFGS",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
        )
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch(tmp_path: Path, name: str) -> None:
    """Also before its first step, which saving does not take."""

    def run(seed: int) -> tuple[Any, Any, Callable[[], Any]]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
        optimizer: Any = OPTIMIZERS[name](model.parameters())

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = model(X).square().mean()
            value.backward()
            return value

        return model, optimizer, lambda: optimizer.step(loss)

    model, optimizer, step = run(0)
    shardc.save_checkpoint(tmp_path, model, optimizer, step=0).result()
    assert all(not held for held in optimizer.state.values()) or name == "Adagrad"
    step()
    shardc.save_checkpoint(tmp_path, model, optimizer, step=1)
    step()
    other, theirs, their_step = run(1)
    assert shardc.load_checkpoint(tmp_path, other, theirs) == 1
    their_step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_torch_reads_it_without_shardc(tmp_path: Path) -> None:
    model = saved(tmp_path, 7)
    read = {"model": nn.Linear(2, 2).state_dict()}
    dcp.load(read, checkpoint_id=tmp_path / "step-7")
    torch.testing.assert_close(read["model"]["weight"], model.weight.detach())


def test_what_is_written_does_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it a checkpoint before all of it is there."""
    go, write = threading.Event(), CheckpointWriter.write_data
    monkeypatch.setattr(CheckpointWriter, "write_data", lambda *given: (go.wait(10), write(*given))[1])
    model, place = nn.Linear(2, 2), Place([1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = model.weight.detach().clone()
    future = shardc.save_checkpoint(tmp_path, model, optimizer, step=1, data=place)
    with torch.no_grad():
        model.weight.zero_()
    place.value.append(2)
    optimizer.param_groups[0]["lr"] = 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.partial"] and not future.done()
    go.set()
    assert future.result() == tmp_path / "step-1"
    assert shardc.load_checkpoint(tmp_path, model, optimizer, data=place) == 1
    torch.testing.assert_close(model.weight.detach(), expected)
    assert place.value == [1] and optimizer.param_groups[0]["lr"] == 0.5


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __deepcopy__(self, _: Any) -> Evil:
        return self

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def truncate(folder: Path) -> str:
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(50)
    return "__0_0.distcp has 50 bytes"


def flip(folder: Path) -> str:
    content = bytearray((folder / ".metadata").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / ".metadata").write_bytes(content)
    return ".metadata is corrupt"


def lose(folder: Path) -> str:
    (folder / "__0_0.distcp").unlink()
    return "__0_0.distcp cannot be read: No such file"


def tear(folder: Path) -> str:
    text = (folder / files.MANIFEST).read_text()
    (folder / files.MANIFEST).write_text(text[: len(text) // 2])
    return "manifest.json is truncated or corrupt"


def edit(folder: Path) -> str:
    read = json.loads((folder / files.MANIFEST).read_text())
    (folder / files.MANIFEST).write_text(json.dumps(read | {"step": 9}))
    return "manifest.json is not as it was written"


def poison(folder: Path) -> str:
    """Somebody else's: the manifest is right."""
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(folder / "ran")))
    manifest = files.Manifest.read(folder)
    named = {name: files.File.of(folder / name) for name in manifest.files}
    manifest._replace(files=named).write(folder)
    return "no checkpoint holds"


@pytest.mark.parametrize("damage", [truncate, flip, lose, tear, edit, poison])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    model = saved(tmp_path, 1, 2)
    said = damage(tmp_path / "step-2")
    with pytest.warns(UserWarning) as warned:
        assert shardc.load_checkpoint(tmp_path, model) == 1
    assert torch.all(model.weight == 1)
    assert said in str(warned[0].message) and "step-2 is refused" in str(warned[0].message)
    assert "step-1, the last good one" in str(warned[0].message)
    with pytest.raises(ShardcError, match="no checkpoint is whole"):
        shardc.load_checkpoint(tmp_path / "step-2", model)
    assert not (tmp_path / "step-2/ran").exists()


def test_nothing_of_a_foreign_state_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path, 1)
    with pytest.raises(ShardcError, match=r"data.value.1 holds a .*Evil, which could be saved but not be read"):
        shardc.save_checkpoint(tmp_path, model, step=2, data=Place([3, Evil(tmp_path / "ran")]))
    monkeypatch.setattr(state, "_refuse_unreadable", lambda *_: None)
    shardc.save_checkpoint(tmp_path, model, step=2, data=Place(Evil(tmp_path / "ran"))).result()
    with pytest.warns(UserWarning, match="step-2 is refused"):
        assert shardc.load_checkpoint(tmp_path, model) == 1
    assert not (tmp_path / "ran").exists()


def test_a_state_that_differs_from_rank_to_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that were, and are no more, cannot give theirs; random states are those of rank 0."""
    model, place = nn.Linear(2, 2), Place(1)

    def two(brought: Any, _: str) -> list[Any]:
        return [brought, (brought[0], {**brought[1], "data": {"value": 2}, "rng": {}})]

    with monkeypatch.context() as patched:
        patched.setattr("shardc.runtime.checkpoint.save.from_all", two)
        shardc.save_checkpoint(tmp_path, model, step=1, data=place)
    drawn = torch.rand(2)
    with pytest.raises(ShardcError, match="data differs from rank to rank in it, and it was saved by 2 ranks, not 1"):
        shardc.load_checkpoint(tmp_path, model, data=place)
    assert shardc.load_checkpoint(tmp_path, model) == 1
    assert torch.equal(torch.rand(2), drawn)


def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "write_data", full)
        future = shardc.save_checkpoint(tmp_path, model, step=2)
        with pytest.raises(ShardcError, match=r"after step 2 was not saved: OSError.*No space left"):
            future.result()
    with pytest.raises(ShardcError, match="after step 2 was not saved"):
        shardc.save_checkpoint(tmp_path, model, step=3)
    assert shardc.load_checkpoint(tmp_path, model) == 1
    shardc.save_checkpoint(tmp_path, model, step=3).result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]


def test_the_last_are_kept_in_the_order_of_saving(tmp_path: Path) -> None:
    model = saved(tmp_path, 100, 200)
    shardc.save_checkpoint(tmp_path, model, step=50, keep=2).result()  # somebody went back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-200", "step-50"]
    assert shardc.load_checkpoint(tmp_path, model) == 50
    shardc.save_checkpoint(tmp_path, model, step=50, keep=1).result()
    assert [path.name for path in tmp_path.iterdir()] == ["step-50.1"]


def foreign_parameter(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters(), *nn.Linear(3, 4).parameters()])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (lambda model: {"data": 3}, "data= must have state_dict"),
        (lambda model: {"optimizer": foreign_parameter(model)}, "shape .4, 3. that is not of the model"),
        (lambda model: {"keep": 0}, "keep at least 1"),
        (lambda model: {"rng": Place()}, "rng= is a name that checkpoints use"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, named: Callable[[nn.Module], dict[str, Any]], message: str) -> None:
    model = saved(tmp_path, 1)
    with pytest.raises(ShardcError, match=message):
        shardc.save_checkpoint(tmp_path, model, step=2, **named(model))
    assert shardc.load_checkpoint(tmp_path, model) == 1


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    assert shardc.load_checkpoint(tmp_path / "nothing", nn.Linear(2, 2)) is None
    model = saved(tmp_path, 1)
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (nn.Linear(3, 2), {}, r"weight has shape \(2, 2\) in it and \(2, 3\) in the model"),
        (nn.Linear(2, 2, bias=False), {}, "it also has bias"),
        (nn.Sequential(nn.Linear(2, 2)), {}, "it lacks 0.bias, 0.weight"),
        (model, {"optimizer": torch.optim.SGD(model.parameters())}, "saved with no optimizer.*loaded into SGD"),
        (model, {"scheduler": Place()}, "it holds no scheduler; it holds model"),
        (nn.Linear(2, 2, device="meta"), {}, "weight is on the meta device"),
    ]
    for other, named, message in cases:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ShardcError, match=f"step-1 cannot be loaded: .*{message}"):
            shardc.load_checkpoint(tmp_path, other, **named)
        assert all(one.is_meta or torch.equal(one, other.state_dict()[name]) for name, one in before.items())
