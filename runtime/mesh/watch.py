"""`watch`: whether a run is still sane. Values that are not finite, and copies on several ranks that drifted apart.

watch(model, every=100)     before each hundredth step of an optimizer of the model
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from shardc.runtime.errors import ShardcError
from shardc.runtime.mesh.exchange import from_all, own_rank

MOST = 5
"""Names in one message."""
_CHUNK = 1 << 22
"""Elements of which a checksum is taken at once: their sum needs eight bytes an element."""


class _Seen(NamedTuple):
    """What one rank found: what is not finite, and checksums by tensor and by the part of it that the rank holds."""

    odd: list[str]
    sums: Mapping[tuple[str, tuple[tuple[int, int], ...]], int]


class ModelWatch:
    """What watches a model; `remove()` ends it."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self.model = model
        self.every = every
        self.steps = 0
        self._optimizer: Any = None
        self._odd: list[str] = []
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hooks: list[RemovableHandle] = [
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            register_optimizer_step_pre_hook(self._before_step),
        ]

    def remove(self) -> None:
        """ModelWatch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _after_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and (self.steps + 1) % self.every == 0:
            self._call = args, kwargs
            named = ((f"output {at}", leaf) for at, leaf in enumerate(pytree.tree_leaves(output)))
            self._odd = _not_finite(named)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if self._optimizer is None:
            own = {id(parameter) for parameter in self.model.parameters()}
            if any(id(one) in own for group in optimizer.param_groups for one in group["params"]):
                self._optimizer = optimizer
        if optimizer is not self._optimizer:
            return
        self.steps += 1
        if self.steps % self.every == 0:
            self._check()
        self._call, self._odd = None, []

    def _check(self) -> None:
        """ShardcError on every rank where any rank finds something."""
        with torch.no_grad():
            named = dict(self.model.named_parameters())
            gradients = ((f"the gradient of {name}", one.grad) for name, one in named.items() if one.grad is not None)
            odd = [*self._odd, *_not_finite(named.items()), *_not_finite(gradients)]
            tensors = {**named, **dict(self.model.named_buffers())}
            sums = {(name, _part(one)): _checksum(one) for name, one in tensors.items()} if own_rank()[1] > 1 else {}
        every = from_all(_Seen(odd, sums), f"what is watched at step {self.steps}")
        drifted = _drifted(every)
        at = f"before step {self.steps} of the optimizer since {type(self.model).__name__} is watched"
        if drifted:
            raise ShardcError(
                f"{at}, ranks hold different copies: {_some(drifted)}. All copies had the same start and gradients, so "
                "a rank computes otherwise, or something writes to its parameters. Load the last checkpoint"
            )
        if any(seen.odd for seen in every):
            ranks: dict[str, list[int]] = {}
            for rank, seen in enumerate(every):
                for name in seen.odd:
                    ranks.setdefault(name, []).append(rank)
            named_ranks = [f"{name}{_on(which, len(every))}" for name, which in ranks.items()]
            first = self._first_module()
            raise ShardcError(
                f"{at}, values are not finite: {_some(named_ranks)}{first}. The step was not taken: the parameters are "
                "those with which this was computed"
            )

    def _first_module(self) -> str:
        """The first module whose result is not finite, by a call on one device's program with the same inputs."""
        if self._call is None or any(not _finite(one) for one in self.model.parameters()):
            return ""
        found: list[str] = []
        args, kwargs = self._call

        def look(name: str, module: nn.Module) -> RemovableHandle:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                if any(not _finite(leaf) for leaf in pytree.tree_leaves(output)):
                    inputs = all(_finite(leaf) for leaf in pytree.tree_leaves(args))
                    found.append(f"{name} ({type(module).__name__}){', from finite inputs' if inputs else ''}")

            return module.register_forward_hook(hook)

        hooks = [look(name, module) for name, module in self.model.named_modules() if name]
        kept = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        try:
            with torch.no_grad(), torch.random.fork_rng(), _plain(self.model):
                self.model(*args, **kwargs)
        except Exception:  # the message tells what it can
            return ""
        finally:
            for hook in hooks:
                hook.remove()
            for name, buffer in self.model.named_buffers():
                buffer.detach().copy_(kept[name])
        return f"; the first module with such a result is {found[0]}" if found else ""


def watch(model: nn.Module, every: int = 100) -> ModelWatch:
    """Look after each `every` steps whether a model's outputs, gradients and parameters are finite, and whether what
    several ranks hold copies of is equal in every bit. The handle's `remove()` ends it.

    It looks before the optimizer's step. Then it reads every tensor once, and ranks exchange a checksum a tensor; the
    other steps cost nothing. Under torchrun every rank must call it. What it finds it raises on every rank:
    ShardcError names the tensors by module, the ranks and the step, and for outputs that are not finite the first
    module from which such values come. ShardcError where `every` is not positive.
    """
    if every < 1:
        raise ShardcError(f"watch(every={every}): say after how many steps to look, at least 1")
    return ModelWatch(model, every)


@contextmanager
def _plain(model: nn.Module) -> Generator[None]:
    """A sharded model computes as the module that it was; what carries out its calls is not known here."""
    engine: Any = vars(model).get("_shardc")
    if engine is None:
        yield
        return
    before, engine.capturing = engine.capturing, True
    try:
        yield
    finally:
        engine.capturing = before


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _finite(leaf: Any) -> bool:
    """Of a tensor: this rank's part."""
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()) or leaf.is_meta:
        return True
    return bool(torch.isfinite(_local(leaf)).all())


def _not_finite(named: Iterable[tuple[str, Any]]) -> list[str]:
    return [name for name, leaf in named if not _finite(leaf)]


def _part(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Which part of a tensor this rank holds: its coordinate on every axis that splits it."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate() or []
    return tuple(
        (axis, at)
        for axis, (at, placement) in enumerate(zip(coordinate, tensor.placements, strict=False))
        if not isinstance(placement, Replicate)
    )


def _checksum(tensor: Tensor) -> int:
    """A sum of the bits, each element weighted by its place, so that no two changes that are alike cancel out."""
    local = _local(tensor).contiguous()
    local = torch.view_as_real(local) if local.is_complex() else local
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits, total = local.view(-1).view(kinds[local.element_size()]), 0
    for chunk in bits.split(_CHUNK) if bits.numel() else ():
        places = torch.arange(1, 1 + chunk.numel(), device=chunk.device)
        total = (total * 1_000_003 + int((chunk.to(torch.int64) * places).sum())) % 2**64
    return total


def _drifted(every: list[_Seen]) -> list[str]:
    """Tensors of which ranks that hold the same part have different values."""
    found: list[str] = []
    holders: dict[tuple[str, tuple[tuple[int, int], ...]], dict[int, list[int]]] = {}
    for rank, seen in enumerate(every):
        for key, checksum in seen.sums.items():
            holders.setdefault(key, {}).setdefault(checksum, []).append(rank)
    for (name, _), by in holders.items():
        if len(by) > 1:
            groups = sorted(by.values(), key=len, reverse=True)
            found.append(f"{name} on {' against '.join(_ranks(ranks) for ranks in groups)}")
    return found


def _on(ranks: list[int], world: int) -> str:
    return "" if world == 1 else f" on {_ranks(ranks)}"


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
