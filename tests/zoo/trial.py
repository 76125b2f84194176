"""Runs models of the zoo beside a single device, and tells what is not equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardc import Mesh, shard
from shardc.api import Compiled
from shardc.cost.hardware import Hardware, Link
from shardc.errors import InfeasibleError
from zoo.case import Entry

MESHES = ("dp=2,tp=2", "a=4")
SLOW = Hardware("slow arithmetic", {"float32": 1e3}, 1e4, 1e-9, 4, Link(0.0, 1e7), Link(0.0, 1e6))
"""So slow that splitting anything pays: plans full of splits."""


@dataclass
class Trial:
    """What one training step gave: the compiled program, and everything that was not equal to single device."""

    compiled: Compiled
    wrong: list[str]


def trial(entry: Entry, mesh: str) -> Trial:
    """One training step on the virtual mesh and on a single device, from the same weights and the same seed."""
    torch.manual_seed(0)
    single, inputs = entry.build()
    axis, ways = list(Mesh.parse(mesh).sizes.items())[-1]
    expected = step(copy.deepcopy(single), inputs)
    for constraints in asked(single, inputs, axis, ways):
        model = shard(copy.deepcopy(single), mesh=mesh, hardware=SLOW, constraints=constraints)
        try:
            actual = step(model, inputs)
        except InfeasibleError:  # the model cuts what the layer makes into fewer pieces than there are ranks
            continue
        return Trial(model.compiled, list(differences(expected, actual, entry.tolerance)))
    raise AssertionError("no layer of the model can be split")


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one training step, by name."""
    torch.manual_seed(1)
    loss: Tensor = model(**inputs)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers())
    return {**found, "next random number": torch.rand(())}


def differences(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float) -> list[str]:
    """Each tensor relative to its own norm; what is zero but for rounding, relative to the gradients'."""
    if expected.keys() != actual.keys():
        return [f"only one has {sorted(expected.keys() ^ actual.keys())}"]
    floor = 1e-3 * max(float(t.norm()) for name, t in expected.items() if name.startswith("gradient"))
    found: list[str] = []
    for name, right in expected.items():
        off = float((actual[name].double() - right.double()).norm())
        size = max(float(right.double().norm()), floor)
        if not off <= tolerance * size:
            found.append(f"{name} is off by {off / size if size else off:.1e}")
    return found


def asked(model: nn.Module, inputs: dict[str, Tensor], axis: str, ways: int) -> list[dict[str, str]]:
    """For every layer, widest first: its weight, and what the layer makes, split along its features."""
    made: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                made.setdefault(path, output)

        return hook

    twin = copy.deepcopy(model)
    for path, part in twin.named_modules():
        part.register_forward_hook(note(path))
    twin(**inputs)
    options: list[tuple[int, dict[str, str]]] = []
    for path, part in twin.named_modules():
        weight = vars(part)["_parameters"].get("weight")
        if weight is None or weight.dim() < 2 or path not in made:
            continue
        feature, dim = _feature(part)
        if weight.shape[feature] % ways == 0:
            specs = (_spec(weight, feature, axis), _spec(made[path], dim, axis))
            options.append((weight.numel(), {f"{path}.weight": specs[0], path: specs[1]}))
    if not options:  # a layer that is never called by itself: its weight alone
        for name, weight in twin.named_parameters():
            if weight.dim() > 1 and weight.shape[0] % ways == 0:
                options.append((weight.numel(), {name: _spec(weight, 0, axis)}))
    return [constraints for _, constraints in sorted(options, key=lambda option: -option[0])]


def _feature(part: nn.Module) -> tuple[int, int]:
    """The weight's dim of output features, and the output's."""
    kind = type(part).__name__
    if kind == "Conv1D":  # of GPT-2: a linear layer whose weight is transposed
        return 1, -1
    if "ConvTranspose" in kind:
        return 1, 1
    return (0, 1) if "Conv" in kind else (1, -1) if "Embedding" in kind else (0, -1)


def _spec(x: Tensor, dim: int, axis: str) -> str:
    return ",".join(axis if i == dim % x.dim() else "?" for i in range(x.dim()))
