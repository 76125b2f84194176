"""Every model, trained three steps on every mesh: all values equal to single device, bytes as predicted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, loss_of
from shardc import shard
from shardc.runtime import Executable

MESHES = ("dp=4", "tp=4", "dp=2,tp=2", "a=2,b=2,c=2")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS = 3


def distance(one: Tensor, other: Tensor, scale: float) -> float:
    """Norm of the difference, relative to the tensor's own norm, or to `scale` where that is larger."""
    off = float((one - other).detach().double().norm())
    return off / max(float(other.detach().double().norm()), scale) if off else 0.0


def train(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Losses and gradients of a few AdamW steps."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = loss_of(model(**inputs))
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_trains_like_single_device(name: str, mesh: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    single, inputs = MODELS[name](dtype)
    model = shard(copy.deepcopy(single), mesh=mesh, hardware="cpu")
    expected, actual = train(single, inputs), train(model, inputs)
    for (loss, grads), (own_loss, own_grads) in zip(expected, actual, strict=True):
        assert distance(own_loss, loss, 0.0) <= TOLERANCE[dtype]
        # a gradient that is zero by symmetry (a key's bias) is compared with the size of the others
        scale = 1e-3 * max(float(g.norm()) for g in grads.values())
        for key, grad in grads.items():
            assert distance(own_grads[key], grad, scale) <= TOLERANCE[dtype], key
    for (key, one), other in zip(single.named_buffers(), model.buffers(), strict=True):
        assert distance(other.double(), one.double(), 0.0) <= TOLERANCE[dtype], key
    _check_bytes(model, inputs)


def _check_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """What the plan predicts per axis is what one step sends, counted at the collective; and something is split."""
    executable: Executable = model.compiled.executable
    executable.mesh.reset()
    loss_of(model(**inputs)).backward()
    sent = dict(executable.mesh.traffic)
    predicted = {axis: n for axis, n in model.plan.bytes_per_axis.items()}
    assert predicted == pytest.approx({axis: sent.get(axis, 0.0) for axis in predicted})
    assert sum(predicted.values()) > 0
