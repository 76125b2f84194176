"""What plans count for an optimizer is what it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardc
from shardc.cost.memory import STATES, states_of

TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "muon": torch.optim.Muon,
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCHS)
def test_torchs_optimizers_hold_what_is_counted(name: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(4, 6, dtype=dtype))
    optimizer = TORCHS[name]([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state: dict[str, Any] = optimizer.state[weight]
    held = {key: x.nbytes for key, x in state.items() if isinstance(x, torch.Tensor) and x.shape == weight.shape}
    assert sorted(held) == sorted(each.name for each in STATES[name])
    assert sum(held.values()) == weight.numel() * states_of(name)(weight.element_size())


@pytest.mark.parametrize(("name", "size"), [
    ("adamw-master", 12.0), ("adamw-bf16", 4.0), ("adamw-8bit", 2 + 2 * 4 / 256), ("adamw-4bit", 1 + 2 * 4 / 128),
    ("lion", 2.0), (12, 12.0), (0, 0.0),
])  # fmt: skip
def test_other_set_ups(name: str | float, size: float) -> None:
    assert states_of(name)(2) == pytest.approx(size)


def test_the_plan_says_what_it_counted() -> None:
    def counted(optimizer: str | float) -> str:
        with torch.device("meta"):
            model, x = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), torch.empty(8, 64, dtype=torch.bfloat16)
        memory = shardc.compile(model, "dp=2", (x,), memory="1GB", optimizer=optimizer).plan.memory
        assert memory.parts.get("optimizer state", 0.0) == int(64 * 64 * states_of(optimizer)(2))
        return str(memory).splitlines()[-1].strip()

    assert counted("adamw") == "state of adamw: exp_avg and exp_avg_sq, each in the parameter's dtype"
    assert counted("adamw-master") == "state of adamw-master: master weight, exp_avg and exp_avg_sq, each of 32 bits"
    assert counted(6) == "state of 6 bytes an element"
    assert "state of" not in counted("sgd")
