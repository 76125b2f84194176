"""What a checkpoint holds of a run: copies of its tensors, and what is no tensor.

"model"       parameters and buffers by name                        } as `get_model_state_dict` and
"optimizer"   state and groups, parameters by name                  } `get_optimizer_state_dict` give them
"scheduler"   of everything else with a `state_dict`: its larger tensors, and the rest as each rank has it
"rng"         the random states of torch, Python and NumPy
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardc.runtime.checkpoint.blocks import Blocks
from shardc.runtime.errors import ShardcError

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None
TENSOR = "a tensor of the checkpoint"
"""The key of a dict that stands in place of a tensor, and says under which name that is stored."""
KINDS = "kinds"
RNG = "rng"
TENSORS, RANKS = "tensors", "by rank"
"""What is stored of an object besides models and optimizers: tensors by name, and the rest, an entry a rank, or one
entry where all ranks have the same."""


class Stateful(Protocol):
    """What has a state: a learning rate scheduler, a sampler, a loader, a GradScaler, an averaged model."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class RandomStates:
    """The default generators of torch, Python and NumPy, and of this process's CUDA device."""

    def state_dict(self) -> dict[str, Any]:
        """States as they are now."""
        numpy: Any = np.random.get_state(legacy=False)
        numpy["state"]["key"] = numpy["state"]["key"].tolist()
        cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy, **cuda}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on from there."""
        torch.set_rng_state(state_dict["torch"])
        random.setstate(state_dict["python"])
        numpy = copy.deepcopy(state_dict["numpy"])
        numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy)
        if "cuda" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["cuda"])


def listed(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers, none, one or several."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def checked(model: nn.Module, optimizers: Iterable[Optimizer], objects: Mapping[str, object]) -> None:
    """ShardcError unless all of it can be saved and loaded."""
    meta = next((name for name, tensor in model.state_dict().items() if getattr(tensor, "is_meta", False)), None)
    if meta is not None:
        raise ShardcError(f"{meta} is on the meta device: give the model values first (to_empty)")
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            foreign = next((one for one in group["params"] if id(one) not in own), None)
            if foreign is not None:
                raise ShardcError(
                    f"the optimizer has a parameter of shape {tuple(foreign.shape)} that is not of the model: name one "
                    "module that holds all of them, like nn.ModuleList([model, head])"
                )
    for name, one in objects.items():
        if not (callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))):
            raise ShardcError(
                f"{name}= must have state_dict and load_state_dict, and {type(one).__name__} does not. The number of "
                "the step is saved by itself: load_checkpoint returns it"
            )
        if name in ("model", "optimizer", KINDS, RNG):
            raise ShardcError(f"{name}= is a name that checkpoints use themselves: take another")


def model_state(model: nn.Module) -> dict[str, Any]:
    """By name, the tensors themselves."""
    return get_model_state_dict(model)


def touch(optimizers: Iterable[Optimizer]) -> None:
    """Give the first parameter an empty state, where the optimizer has none at all.

    Else torch takes a step with gradients of zero to have one, which counts in what follows.
    """
    for optimizer in optimizers:
        if not optimizer.state and optimizer.param_groups and optimizer.param_groups[0]["params"]:
            _ = optimizer.state[optimizer.param_groups[0]["params"][0]]


def collected(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Model and optimizers, every tensor a copy on the CPU, every DTensor as `Blocks` of such a copy."""
    state: dict[str, Any] = {"model": model_state(model)}
    if optimizers:
        touch(optimizers)
        state["optimizer"] = get_optimizer_state_dict(model, optimizers)
    kinds = {"optimizer": [type(one).__name__ for one in optimizers]}
    return {**_copied(state, ""), KINDS: (kinds,)}


def taken_apart(name: str, one: Stateful) -> tuple[dict[str, Any], Any]:
    """Of an object with a state, copies of its larger tensors by name, and the rest, in which each is `{TENSOR: name}`.
    ShardcError where a part of the rest could not be read again."""
    tensors: dict[str, Any] = {}
    rest = _rest(one.state_dict(), name, tensors)
    _refuse_unreadable(rest, name)
    return {key: copied(tensor) for key, tensor in tensors.items()}, rest


def tensors_of(name: str, one: Stateful) -> dict[str, Tensor]:
    """The tensors themselves that `taken_apart` copies."""
    tensors: dict[str, Any] = {}
    _rest(one.state_dict(), name, tensors)
    return tensors


def put_together(rest: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `taken_apart`."""
    if isinstance(rest, dict) and list(cast(dict[Any, Any], rest)) == [TENSOR]:
        return tensors[rest[TENSOR]]
    if type(rest) in (dict, OrderedDict):
        return type(rest)((key, put_together(value, tensors)) for key, value in rest.items())
    if type(rest) in (list, tuple):
        return type(rest)(put_together(value, tensors) for value in rest)
    return rest


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal in all their parts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)  # pyright: ignore
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))  # pyright: ignore[reportUnknownArgumentType]
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def copied(tensor: Tensor) -> Any:
    """A copy on the CPU; of a DTensor, `Blocks` of a copy of the rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    own = local.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tensor, DTensor) and tensor.numel():
        return Blocks.of(tensor, own)
    return own if tensor.numel() else own.new_empty(tensor.shape)


def _copied(value: Any, path: str) -> Any:
    """`value` with copies of its tensors, and of what else may change. ShardcError where it could not be read again."""
    if isinstance(value, Tensor):
        return copied(value)
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        return {key: _copied(one, f"{path}.{key}" if path else str(key)) for key, one in entries.items()}
    if isinstance(value, list):
        return [_copied(one, f"{path}.{at}") for at, one in enumerate(cast(list[Any], value))]
    own = value.item() if isinstance(value, np.generic) else copy.deepcopy(value)
    _refuse_unreadable(own, path)
    return own


def _rest(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor) and (isinstance(value, DTensor) or (value.dim() and value.is_floating_point())):
        name = path.partition(".")[2] or "value"
        name = name if name not in tensors else f"{name}#{len(tensors)}"
        tensors[name] = value
        return {TENSOR: name}
    if type(value) in (dict, OrderedDict):
        entries = cast(dict[Any, Any], value)
        return type(entries)((key, _rest(one, f"{path}.{key}", tensors)) for key, one in entries.items())
    if type(value) in (list, tuple):
        return type(value)(_rest(one, f"{path}.{at}", tensors) for at, one in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    return copied(value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _refuse_unreadable(value: Any, path: str) -> None:
    """What is read again is read without running anybody's code: tensors, numbers, texts, and containers of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        at, part = _unreadable(value, path)
        raise ShardcError(
            f"{at} holds a {type(part).__module__}.{type(part).__qualname__}, which could be saved but not be read "
            "again without running code from the file: let its state_dict give numbers, texts, tensors, lists and dicts"
        ) from error


def _unreadable(value: Any, path: str) -> tuple[str, Any]:
    """The innermost part that is at fault."""
    parts: list[tuple[Any, Any]] = []
    if type(value) in (dict, OrderedDict):
        parts = list(value.items())
    elif type(value) in (list, tuple):
        parts = list(enumerate(value))
    for key, part in parts:
        try:
            _refuse_unreadable(part, f"{path}.{key}")
        except ShardcError:
            return _unreadable(part, f"{path}.{key}")
    return path, value
