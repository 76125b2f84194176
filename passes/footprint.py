"""Footprint: the bytes that a rank holds while it runs the generated code, line by line.

    y = aten.mm.default(x, w)                  held: w, x, y
    z = reduce_scatter(y, dim=1, axis="tp")    held: w, x, y, z
    del y                                      held: w, x, z

Held throughout are parameters, buffers, inputs, and the optimizer's state; from forward on what it returned; in
backward the tangents, and what forward saved until it is deleted. Views hold what they view. Which results are views,
and how they lie in memory, is asked of torch's meta kernels, once per form of call. What a kernel of torch allocates
for itself and frees again is not counted.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from shardc.cost.memory import States
from shardc.graph import Program, Role, where
from shardc.halves import halves, spent
from shardc.mesh import Mesh
from shardc.passes.bucket import BUCKETS, COLLECTIVES, operand_bytes
from shardc.passes.timeline import is_started
from shardc.plan import Memory
from shardc.runtime import collectives
from shardc.runtime.parts import Part
from shardc.runtime.random import draw
from shardc.runtime.started import wait
from shardc.runtime.streams import BLOCK, SERIAL

aten = torch.ops.aten
MOVING: set[object] = {getattr(collectives, kind) for kind in ("all_gather", "reduce_scatter", "all_to_all")}


def footprint(graph: fx.Graph, program: Program, mesh: Mesh, states: States) -> Memory:
    """The peak of a localized graph, with its place and what is held there."""
    return _Run(graph, program, mesh, states).memory()


@dataclass(frozen=True)
class _Lying:
    """How one tensor lies in memory: the number of its storage, and where in it."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Made:
    """What a form of call makes: in the storage of an operand (by its rank among the call's storages), or in a new one
    of so many bytes."""

    operand: int | None
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class _Run:
    def __init__(self, graph: fx.Graph, program: Program, mesh: Mesh, states: States) -> None:
        self.program, self.mesh, self.states = program, mesh, states
        self.run = halves(graph, program)
        self.roles = {node: port.role for node, port in zip(_placeholders(graph), program.inputs, strict=True)}
        self.lying: dict[fx.Node, list[_Lying | None]] = {}
        self.sizes: list[int] = []  # bytes of every storage
        self.labels: list[str] = []  # what every storage counts as
        self.names: Counter[int] = Counter()  # how many names hold a storage
        self.held: Counter[str] = Counter()  # bytes by label
        self.forms: dict[object, list[_Made | None]] = {}
        self.peak = Memory(0.0, "", "", {})

    def memory(self) -> Memory:
        run = self.run
        for node in run.given:
            self._place(node, "parameters" if self.roles[node] is Role.PARAMETER else "inputs and buffers")
            if self.roles[node] is Role.PARAMETER:
                size = node.meta["dtype"].itemsize
                self.held["optimizer state"] += int(self.sizes[-1] / size * self.states(size))
        outputs = [node for node in run.outputs if node is not None]
        labels = {**dict.fromkeys(run.saved, "kept for backward"), **dict.fromkeys(outputs, "outputs")}
        self._go("forward", run.forward, [*run.given, *outputs, *run.saved], labels)
        for node in run.tangents:
            self._place(node, "tangents")
        gradients = dict.fromkeys(run.gradients, "gradients")
        self._go("backward", run.backward, [*run.given, *outputs, *run.gradients], gradients)
        return self.peak

    def _go(self, half: str, nodes: list[fx.Node], kept: list[fx.Node], labels: Mapping[fx.Node, str]) -> None:
        dead = spent(nodes, kept)
        for node in nodes:
            if node.op == "call_function":
                self._call(node, labels.get(node, "in use"))
            total = sum(self.held.values()) + self._workspace(node)
            if total > self.peak.peak:
                parts = {label: float(size) for label, size in self.held.items() if size}
                self.peak = Memory(float(total), half, where(node), parts)
            for value in dead.get(node, ()):
                for one in self.lying[value]:
                    if one is not None:
                        self._release(one.storage)

    def _place(self, node: fx.Node, label: str) -> None:
        made = self._contiguous(node)
        self.lying[node] = [self._settle(made, label, [])]

    def _call(self, node: fx.Node, label: str) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            found = self.lying[source][index]  # type: ignore[index]
            self.lying[node] = [found]
            if found is not None:
                self._hold(found.storage, label)
            return
        operands = [one for operand in node.all_input_nodes for one in self.lying[operand][:1] if one is not None]
        storages = list(dict.fromkeys(one.storage for one in operands))
        if node.target is wait:
            self.lying[node] = self._landed(node, label)
            return
        if is_started(node):
            self.lying[node] = self._flying(node)
            return
        if node.target in BUCKETS:
            self.lying[node] = self._pieces(node, label)
            return
        form = self._form(node, storages)
        if form not in self.forms:
            self.forms[form] = self._made(node, storages)
        self.lying[node] = [None if made is None else self._settle(made, label, storages) for made in self.forms[form]]

    def _pieces(self, node: fx.Node, label: str) -> list[_Lying | None]:
        """What a bucket makes: pieces of one storage, one after another."""
        results = sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]
        made = [self._contiguous(user) for user in results]
        storage, start = len(self.sizes), 0
        self.sizes.append(sum(one.size for one in made))
        self.labels.append(label)
        found: list[_Lying | None] = []
        for one in made:
            self._hold(storage, label)
            found.append(_Lying(storage, one.shape, one.stride, start, one.dtype))
            start += math.prod(one.shape)
        return found

    def _flying(self, node: fx.Node) -> list[_Lying | None]:
        """What a collective that was started holds: what it brings, and what it reads until it ends."""
        (awaited,) = node.users
        bucket, kind, told = node.target in BUCKETS, COLLECTIVES[node.target], node.kwargs
        made = self._contiguous(next(iter(awaited.users)) if bucket else node)
        found: list[_Lying | None] = self._pieces(awaited, "in use") if bucket else [self._settle(made, "in use", [])]
        if bucket or (kind != "all_gather" and told.get("split_dim", told.get("dim"))):  # a copy is made and sent
            if kind != "all_reduce":
                found.append(self._settle(replace(made, size=sum(operand_bytes(node, self.mesh))), "in use", []))
        elif kind != "all_reduce":
            read = self.lying[node.all_input_nodes[0]][0]
            assert read is not None
            self._hold(read.storage, "in use")
            found.append(read)
        return found

    def _landed(self, node: fx.Node, label: str) -> list[_Lying | None]:
        """What a collective brought: where it arrived, or side by side along another dim than the first."""
        started = node.all_input_nodes[0]
        moved = started.kwargs.get("concat_dim", started.kwargs.get("dim"))
        if COLLECTIVES[started.target] in ("all_gather", "all_to_all") and moved:
            return [self._settle(self._contiguous(node), label, [])]
        count = len(node.users) if started.target in BUCKETS else 1
        found = self.lying[started][:count]
        for one in found:
            assert one is not None
            self._hold(one.storage, label)
        return found

    def _settle(self, made: _Made, label: str, storages: Sequence[int]) -> _Lying:
        if made.operand is None:
            storage = len(self.sizes)
            self.sizes.append(made.size)
            self.labels.append(label)
        else:
            storage = storages[made.operand]
        self._hold(storage, label)
        return _Lying(storage, made.shape, made.stride, made.offset, made.dtype)

    def _hold(self, storage: int, label: str) -> None:
        if self.names[storage] and label != "in use" and self.labels[storage] == "in use":
            self.held["in use"] -= self.sizes[storage]
            self.labels[storage] = label
            self.held[label] += self.sizes[storage]
        elif not self.names[storage]:
            self.held[self.labels[storage]] += self.sizes[storage]
        self.names[storage] += 1

    def _release(self, storage: int) -> None:
        self.names[storage] -= 1
        if not self.names[storage]:
            self.held[self.labels[storage]] -= self.sizes[storage]

    def _form(self, node: fx.Node, storages: list[int]) -> object:
        """All that what a call makes depends on."""
        def show(value: object) -> object:
            if isinstance(value, fx.Node):
                one = self.lying[value][0]
                return one and (storages.index(one.storage), one.shape, one.stride, one.offset, one.dtype)
            if isinstance(value, (list, tuple)):
                return tuple(map(show, value))  # pyright: ignore
            return repr(value)

        own = () if node.meta.get("layout") is None else self._local(node)
        taken = ((user.args[1], self._local(user)) for user in node.users if user.target is operator.getitem)
        return node.target, show(node.args), show(tuple(node.kwargs.items())), own, tuple(taken)

    def _local(self, node: fx.Node) -> tuple[int, ...]:
        return node.meta["layout"].local_shape(self.mesh)

    def _made(self, node: fx.Node, storages: list[int]) -> list[_Made | None]:
        """What torch's meta kernel makes; for functions of the runtime, new tensors of the layouts' sizes."""
        if isinstance(node.target, torch._ops.OpOverload):
            try:
                return self._by_meta_kernel(node, storages)
            except (RuntimeError, NotImplementedError, TypeError):  # no meta kernel, or one that asks for values
                pass
        if node.meta.get("layout") is not None:
            return [self._contiguous(node)]
        elements = {user.args[1]: self._contiguous(user) for user in node.users if user.target is operator.getitem}
        return [elements.get(index) for index in range(max(elements, default=-1) + 1)]  # type: ignore[type-var]

    def _contiguous(self, node: fx.Node) -> _Made:
        shape, dtype = self._local(node), node.meta["dtype"]
        stride = torch.empty(shape, device="meta").stride()
        return _Made(None, math.prod(shape) * dtype.itemsize, tuple(shape), stride, 0, dtype)

    def _by_meta_kernel(self, node: fx.Node, storages: list[int]) -> list[_Made | None]:
        memory = [torch.UntypedStorage(self.sizes[storage], device="meta") for storage in storages]
        places = {storage._cdata: place for place, storage in enumerate(memory)}

        def tensor(operand: fx.Node) -> Tensor | None:
            one = self.lying[operand][0]
            if one is None:
                return None
            empty = torch.empty(0, dtype=one.dtype, device="meta")
            return empty.set_(memory[storages.index(one.storage)], one.offset, one.shape, one.stride)  # pyright: ignore

        args, kwargs = map_arg((node.args, dict(node.kwargs)), tensor)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        target = aten.reshape.default if node.target is aten.view.default else node.target
        made = target(*args, **kwargs)  # type: ignore[operator]
        results = made if isinstance(made, (list, tuple)) else [made]
        return [_described(one, places) for one in results]

    def _workspace(self, node: fx.Node) -> int:
        """The bytes of what our own functions allocate and free again: the rearranged copy of a collective whose dim is
        not the first, the buffer into which a bucket is filled, the numbers of other ranks that a draw goes through."""
        if node.target is draw and any(isinstance(value, Part) for value in node.kwargs.values()):
            count = math.prod(node.args[0])  # type: ignore[arg-type]
            return (min(count, BLOCK) if node.args[1] in SERIAL else count) * node.kwargs["dtype"].itemsize  # type: ignore[union-attr]
        if node.target in BUCKETS:
            copied = not is_started(node) or COLLECTIVES[node.target] == "all_reduce"
            return sum(operand_bytes(node, self.mesh)) if copied else 0
        if node.target not in MOVING or is_started(node) or self.mesh.sizes[str(node.kwargs["axis"])] == 1:
            return 0
        (operand,), (result,) = self.lying[node.args[0]], self.lying[node]  # type: ignore[index]
        assert operand is not None and result is not None
        if node.target is collectives.reduce_scatter:
            return self.sizes[operand.storage] if node.kwargs["dim"] else 0
        moved = node.kwargs.get("dim", node.kwargs.get("concat_dim"))
        return self.sizes[result.storage] if moved or node.target is collectives.all_to_all else 0


def _described(one: Any, places: Mapping[int, int]) -> _Made | None:
    if not isinstance(one, Tensor):
        return None
    storage = one.untyped_storage()
    stride, offset = tuple(one.stride()), int(one.storage_offset())
    return _Made(places.get(storage._cdata), storage.nbytes(), tuple(one.shape), stride, offset, one.dtype)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
