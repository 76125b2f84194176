"""The steps of torch's optimizers on local tensors: every rank updates its parts, and DTensor dispatches nothing.

optimizer = torch.optim.AdamW(model.parameters())     parameters and states are DTensors, also in state dicts
optimizer.step()                                      runs on what this rank has of them

An optimizer that treats every element alone does the same to parts as to the whole. Those of torch that do are listed
here; all others, subclasses among them, run on DTensors. So does a step with a closure, which makes new gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
        torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.ASGD, torch.optim.Rprop,
    }
)  # fmt: skip
"""Optimizers that compute every element of a parameter from the same element of its gradient and state."""

_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
"""States that are one number for all of a parameter, whatever its shape."""

_installed = False


def install() -> None:
    """From now on, steps of such optimizers run on local tensors."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _installed = True


class _LocalStep:
    """One step: `optimizer` is a stand-in for the user's with local tensors. The user's is not changed until the step
    is done, so an error leaves it as it was."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.locals: dict[Tensor, Tensor] = {p: _local(p) for p in _parameters(optimizer) if isinstance(p, DTensor)}
        self.given: dict[Tensor, dict[str, Any]] = {}
        self.optimizer: Optimizer = object.__new__(type(optimizer))  # with all attributes, also those of GradScaler
        vars(self.optimizer).update(vars(optimizer))
        self.optimizer.param_groups = [
            {**group, "params": [self.locals.get(p, p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        self.optimizer.state = defaultdict(dict)
        for parameter in _parameters(optimizer):
            local, state = self.locals.get(parameter, parameter), optimizer.state.get(parameter)
            if local is not parameter:
                local.grad = _local(parameter.grad)
            if state is not None:
                self.given[local] = dict(state) if local is parameter else {k: _local(v) for k, v in state.items()}
                self.optimizer.state[local] = dict(self.given[local])

    def done(self, optimizer: Optimizer) -> None:
        """What is new goes to the user's optimizer, as DTensors where it is as large as the parameter."""
        for mine, theirs in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key != "params"})
        for parameter in _parameters(optimizer):
            local = self.locals.get(parameter, parameter)
            given = self.given.get(local, {})
            for key, value in self.optimizer.state.get(local, {}).items():
                if key not in given or given[key] is not value:
                    whole = local is not parameter and _is_like(key, value, local)
                    optimizer.state[parameter][key] = _distributed(value, parameter) if whole else value
            if local is not parameter:
                local.grad = None
        increment_version(list(self.locals))  # so that autograd notices what changed since it saved it


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the step, with the stand-in as the optimizer."""
    if type(optimizer) not in ELEMENTWISE or any(one is not None for one in (*args[1:], *kwargs.values())):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        if not any(isinstance(p, DTensor) for p in _parameters(optimizer)):
            return None
        if not all(map(_fits, _parameters(optimizer))):
            return None
        step = _LocalStep(optimizer)
    step.optimizer.__dict__[_STEP] = step
    return (step.optimizer, *args[1:]), kwargs


_STEP = "_shardc_local_step"


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step: _LocalStep | None = vars(args[0]).pop(_STEP, None) if args and args[0] is not optimizer else None
    if step is not None:
        with torch._C.DisableTorchFunctionSubclass():
            step.done(optimizer)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _fits(parameter: Tensor) -> bool:
    """Whether a parameter's gradient lies as it does, with nothing to reduce."""
    gradient = parameter.grad
    if not isinstance(parameter, DTensor):
        return not isinstance(gradient, DTensor)
    if gradient is None:
        return True
    return (
        isinstance(gradient, DTensor)
        and gradient.placements == parameter.placements
        and gradient.device_mesh == parameter.device_mesh
    )


def _local(value: Any) -> Any:
    """The part of a DTensor itself: `to_local` would be recorded, and give another object every time."""
    return value._local_tensor if isinstance(value, DTensor) else value  # pyright: ignore[reportPrivateUsage]


def _is_like(key: str, value: Any, local: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == local.shape and (local.dim() > 0 or key not in _NUMBERS)


def _distributed(value: Tensor, parameter: Any) -> DTensor:
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
