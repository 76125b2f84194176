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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from shardc.analysis.liveness import dead_after
from shardc.analysis.operands import collective_of, operand_bytes
from shardc.analysis.timeline import Order, in_order
from shardc.cost.memory import States
from shardc.ir.facts import dtype_of, laid, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition, partition
from shardc.ir.program import Program, Role, where
from shardc.rules.factors.strategy import chosen_of, workspace
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import Held
from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.random import draw
from shardc.runtime.kernels.streams import BLOCK, SERIAL

aten = torch.ops.aten


@dataclass(frozen=True)
class Memory:
    """The most that a rank holds at once while the generated code runs: `peak` bytes in all, in `half` (forward or
    backward) at `place`, and what they are. What kernels allocate for themselves is not in it."""

    peak: float = 0.0
    half: str = ""
    place: str = ""
    parts: dict[str, float] = field(default_factory=dict[str, float])
    budget: float | None = None


def peak_in_order(graph: fx.Graph, program: Program, mesh: Mesh, states: States) -> float:
    """The bytes that a localized graph holds at most as it is written, with neither buckets nor overlap."""
    run = partition(graph, program)
    return MemoryAnalysis(graph, run, program, mesh, states).memory(*in_order(run)).peak


class MemoryAnalysis:
    """What a localized graph holds whose halves run in one order or another. What its calls make is found once."""

    def __init__(self, graph: fx.Graph, run: Partition, program: Program, mesh: Mesh, states: States) -> None:
        self.run, self.mesh, self.states = run, mesh, states
        self.roles = {node: port.role for node, port in zip(_placeholders(graph), program.inputs, strict=True)}
        self.by_form: dict[object, list[_Made | None]] = {}
        self.by_node: dict[fx.Node, list[_Made | None]] = {}
        self.equal: dict[_Made, _Made] = {}
        self.contiguous: dict[tuple[tuple[int, ...], torch.dtype], _Made] = {}

    def memory(self, forward: Order, backward: Order) -> Memory:
        """The peak, with its place and what is held there."""
        return _Execution(self).memory(forward, backward)

    def one(self, made: _Made) -> _Made:
        """The one object of all that are equal, so that what lies alike can be told by identity."""
        return self.equal.setdefault(made, made)


class _Lying(NamedTuple):
    """How one tensor lies in memory: the number of its storage, and where in it."""

    storage: int
    made: _Made


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


class _Execution:
    def __init__(self, known: MemoryAnalysis) -> None:
        self.known, self.mesh = known, known.mesh
        self.started: set[fx.Node] = set()
        self.flying: dict[fx.Node, list[_Lying | None]] = {}  # what holds a collective that is under way
        self.lying: dict[fx.Node, list[_Lying | None]] = {}
        self.sizes: list[int] = []  # bytes of every storage
        self.labels: list[str] = []  # what every storage counts as
        self.names: Counter[int] = Counter()  # how many names hold a storage
        self.held: Counter[str] = Counter()  # bytes by label
        self.total = 0  # of them all
        self.peak = Memory(0.0, "", "", {})

    def memory(self, forward: Order, backward: Order) -> Memory:
        run, roles = self.known.run, self.known.roles
        self.started = {node for half in (forward, backward) for node, awaited in half if awaited}
        for node in run.given:
            self._place(node, "parameters" if roles[node] is Role.PARAMETER else "inputs and buffers")
            if roles[node] is Role.PARAMETER:
                size = dtype_of(node).itemsize
                states = int(self.sizes[-1] / size * self.known.states(size))
                self.held["optimizer state"] += states
                self.total += states
        outputs = [node for node in run.outputs if node is not None]
        labels = {**dict.fromkeys(run.saved, "kept for backward"), **dict.fromkeys(outputs, "outputs")}
        self._go("forward", forward, [*run.given, *outputs, *run.saved], labels)
        for node in run.tangents:
            self._place(node, "tangents")
        gradients = dict.fromkeys(run.gradients, "gradients")
        self._go("backward", backward, [*run.given, *outputs, *run.gradients], gradients)
        return self.peak

    def _go(self, half: str, order: Order, kept: list[fx.Node], labels: Mapping[fx.Node, str]) -> None:
        operands = self.known.run.operands
        # what a started collective makes is a value from where it is awaited, and its operands were read before
        dead = dead_after([[node] if awaited else [*operands[node], node] for node, awaited in order], kept)
        for place, (node, awaited) in enumerate(order):
            total = 0
            if awaited:
                self.lying[node] = self._landed(node, labels.get(node, "in use"))
            elif node in self.started:
                self.flying[node] = self._taking_off(node)
                total = self._workspace(node)
            else:
                self.lying[node] = self._call(node, labels.get(node, "in use"))
                total = self._workspace(node)
            total += self.total
            if total > self.peak.peak:
                parts = {label: float(size) for label, size in self.held.items() if size}
                self.peak = Memory(float(total), half, where(node), parts)
            for value in dead.get(place, ()):
                self._release(self.lying[value])
            if awaited:
                self._release(self.flying.pop(node))

    def _place(self, node: fx.Node, label: str) -> None:
        made = self._contiguous(node)
        self.lying[node] = [self._settle(made, label, [])]

    def _call(self, node: fx.Node, label: str) -> list[_Lying | None]:
        if node.target is operator.getitem:
            source, index = node.args
            found = self.lying[source][index]  # type: ignore[index]
            if found is not None:
                self._hold(found.storage, label)
            return [found]
        operands = [self.lying[operand][0] for operand in self.known.run.operands[node]]
        storages = list(dict.fromkeys([one.storage for one in operands if one is not None]))
        found = self.known.by_node.get(node)
        if found is None:
            if isinstance(node.target, Bucket):
                return self._pieces(node, label)
            form = self._form(node, operands, storages)
            found = self.known.by_form.get(form)
            if found is None:
                found = [one and self.known.one(one) for one in self._made(node, storages)]
                self.known.by_form[form] = found
            self.known.by_node[node] = found
        return [None if made is None else self._settle(made, label, storages) for made in found]

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
            found.append(_Lying(storage, self.known.one(replace(one, offset=start))))
            start += math.prod(one.shape)
        return found

    def _taking_off(self, node: fx.Node) -> list[_Lying | None]:
        """What a collective that was started holds: what it brings, and what it reads until it ends."""
        collective = collective_of(node)
        assert collective is not None
        bucket, holds = isinstance(collective, Bucket), collective.holds(node.kwargs)
        made = self._contiguous(next(iter(node.users)) if bucket else node)
        found: list[_Lying | None] = self._pieces(node, "in use") if bucket else [self._settle(made, "in use", [])]
        if holds is Held.COPY:
            found.append(self._settle(replace(made, size=sum(operand_bytes(node, self.mesh))), "in use", []))
        elif holds is Held.OPERAND:
            read = self.lying[node.all_input_nodes[0]][0]
            assert read is not None
            self._hold(read.storage, "in use")
            found.append(read)
        return found

    def _landed(self, node: fx.Node, label: str) -> list[_Lying | None]:
        """What a collective brought: where it arrived, or side by side along another dim than the first."""
        collective = collective_of(node)
        assert collective is not None
        if collective.joins(node.kwargs):
            return [self._settle(self._contiguous(node), label, [])]
        count = len(node.users) if isinstance(collective, Bucket) else 1
        found = self.flying[node][:count]
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
        return _Lying(storage, made)

    def _hold(self, storage: int, label: str) -> None:
        if self.names[storage] and label != "in use" and self.labels[storage] == "in use":
            self.held["in use"] -= self.sizes[storage]
            self.labels[storage] = label
            self.held[label] += self.sizes[storage]
        elif not self.names[storage]:
            self.held[self.labels[storage]] += self.sizes[storage]
            self.total += self.sizes[storage]
        self.names[storage] += 1

    def _release(self, values: Iterable[_Lying | None]) -> None:
        for one in values:
            if one is not None:
                self.names[one.storage] -= 1
                if not self.names[one.storage]:
                    self.held[self.labels[one.storage]] -= self.sizes[one.storage]
                    self.total -= self.sizes[one.storage]

    def _form(self, node: fx.Node, operands: Sequence[_Lying | None], storages: list[int]) -> object:
        """All that what a call makes depends on; of an operator, its kind tells all but how its operands lie and which
        of several results are read."""
        chosen = chosen_of(node)
        if chosen is not None:
            lying = [one and (storages.index(one.storage), id(one.made)) for one in operands]
            read = [user.args[1] for user in node.users] if lowered(node).layout is None else ()
            return chosen.op.kind, chosen.strategy, *lying, *read

        def show(value: object) -> object:
            if isinstance(value, fx.Node):
                one = self.lying[value][0]
                return one and (storages.index(one.storage), id(one.made))
            if isinstance(value, (list, tuple)):
                return tuple(map(show, value))  # pyright: ignore
            return value if type(value) is int else repr(value)

        own = () if lowered(node).layout is None else self._local(node)
        taken = ((user.args[1], self._local(user)) for user in node.users if user.target is operator.getitem)
        return node.target, show(node.args), show(tuple(node.kwargs.items())), own, tuple(taken)

    def _local(self, node: fx.Node) -> tuple[int, ...]:
        return laid(node).local_shape(self.mesh)

    def _made(self, node: fx.Node, storages: list[int]) -> list[_Made | None]:
        """What torch's meta kernel makes. For functions of the runtime, and operators that have no such kernel or one
        that asks for values, new tensors of the layouts' sizes: all views have one."""
        if isinstance(node.target, torch._ops.OpOverload):
            with suppress(RuntimeError, TypeError):  # as kernels say so (NotImplementedError is a RuntimeError)
                return self._by_meta_kernel(node, storages)
        if lowered(node).layout is not None:
            return [self._contiguous(node)]
        elements = {user.args[1]: self._contiguous(user) for user in node.users if user.target is operator.getitem}
        return [elements.get(index) for index in range(max(elements, default=-1) + 1)]  # type: ignore[type-var]

    def _contiguous(self, node: fx.Node) -> _Made:
        shape, dtype = self._local(node), dtype_of(node)
        if (shape, dtype) not in self.known.contiguous:
            stride = torch.empty(shape, device="meta").stride()
            made = _Made(None, math.prod(shape) * dtype.itemsize, shape, stride, 0, dtype)
            self.known.contiguous[shape, dtype] = self.known.one(made)
        return self.known.contiguous[shape, dtype]

    def _by_meta_kernel(self, node: fx.Node, storages: list[int]) -> list[_Made | None]:
        memory = [torch.UntypedStorage(self.sizes[storage], device="meta") for storage in storages]
        places = {storage._cdata: place for place, storage in enumerate(memory)}

        def tensor(operand: fx.Node) -> Tensor | None:
            one = self.lying[operand][0]
            if one is None:
                return None
            made, storage = one.made, memory[storages.index(one.storage)]
            empty = torch.empty(0, dtype=made.dtype, device="meta")
            return empty.set_(storage, made.offset, made.shape, made.stride)  # pyright: ignore

        args, kwargs = map_arg((node.args, dict(node.kwargs)), tensor)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        target = aten.reshape.default if node.target is aten.view.default else node.target
        made = target(*args, **kwargs)  # type: ignore[operator]
        results = made if isinstance(made, (list, tuple)) else [made]
        return [_described(one, places) for one in results]

    def _workspace(self, node: fx.Node) -> int:
        """The bytes of what our own functions allocate and free again: the rearranged copy of a collective whose dim is
        not the first, the buffer into which a bucket is filled, the numbers of other ranks that a draw goes through,
        what the variant of an operator declares."""
        if isinstance(node.target, torch._ops.OpOverload):
            return 0
        if node.target is draw and any(isinstance(value, Part) for value in node.kwargs.values()):
            count = math.prod(node.args[0])  # type: ignore[arg-type]
            return (min(count, BLOCK) if node.args[1] in SERIAL else count) * node.kwargs["dtype"].itemsize  # type: ignore[union-attr]
        chosen = chosen_of(node)
        if chosen is not None:
            return workspace(chosen.shape, chosen.strategy, self.mesh)
        collective = collective_of(node)
        if collective is None or self.mesh.sizes[str(node.kwargs["axis"])] == 1:
            return 0
        started = node in self.started
        result = (self.flying if started else self.lying)[node][0]
        assert result is not None
        if isinstance(collective, Bucket):
            operand = sum(operand_bytes(node, self.mesh))
        else:
            read = self.lying[node.all_input_nodes[0]][0]
            assert read is not None
            operand = self.sizes[read.storage]
        return collective.workspace(node.kwargs, operand, self.sizes[result.storage], started)


def _described(one: Any, places: Mapping[int, int]) -> _Made | None:
    if not isinstance(one, Tensor):
        return None
    storage = one.untyped_storage()
    stride, offset = tuple(one.stride()), int(one.storage_offset())
    return _Made(places.get(storage._cdata), storage.nbytes(), tuple(one.shape), stride, offset, one.dtype)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
