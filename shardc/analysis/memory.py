"""Memory: the bytes that a rank holds while it runs the generated code, line by line.

    y = aten.mm.default(x, w)                  held: w, x, y
    z = reduce_scatter(y, dim=1, axis="tp")    held: w, x, y, z
    del y                                      held: w, x, z

Parameters, buffers, inputs and the optimizer's state are held throughout. What forward returned is held from then on,
and what it saved until backward deletes it. Backward also holds the tangents. A view holds what it views.

torch's meta kernels tell which results are views, and how results are laid out in memory; each distinct call asks once.
What an operator or a body allocates for itself and frees again is what its rule declares.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from shardc.analysis.liveness import dead_after
from shardc.analysis.meta_kernels import Placed, made_by_meta_kernel
from shardc.analysis.operands import collective_of, operand_bytes
from shardc.analysis.storages import StoredTensor, TensorForm
from shardc.analysis.timeline import Order, in_order
from shardc.cost.memory import States
from shardc.ir.facts import FACTS, Captured, dtype_of, laid, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition, partition
from shardc.ir.printing import columns, in_bytes
from shardc.ir.program import Program, Role, tensor_of, where
from shardc.rules.factors.chosen import chosen_of
from shardc.rules.factors.strategy import workspace
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import Held
from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.random import draw
from shardc.runtime.kernels.streams import BLOCK, IN_PIECES

aten = torch.ops.aten

SUMS = "sums of gradients"
"""What the gradients count as that are added up over several backwards, before an epilogue reduces them."""


@dataclass(frozen=True)
class Memory:
    """The most that a rank holds at once while the generated code runs: `peak` bytes, in `phase` (forward or backward),
    at `place` in the user's code. `parts` says what the bytes are, by label; `budget` is the bound in bytes, if there
    is one. What kernels allocate for themselves counts where their rules declare it. `optimizer` says in words what its
    state consists of, if one counts. `print(memory)` shows it all."""

    peak: float = 0.0
    phase: str = ""
    place: str = ""
    parts: dict[str, float] = field(default_factory=dict[str, float])
    budget: float | None = None
    optimizer: str = ""

    def __str__(self) -> str:
        rows = [(label, in_bytes(size), f"{size / self.peak:.0%}") for label, size in self.largest]
        place = f" ({self.place})" if self.place else ""
        lines = [f"  {line}" for line in columns(rows, "<>>")] if rows else []
        lines += [f"  state of {self.optimizer}"] if self.optimizer else []
        return "\n".join([f"a device holds {self.summary}{place}", *lines]) if self.peak else "nothing"

    @property
    def summary(self) -> str:
        """The peak and the bound, in a few words."""
        budget = f" of {in_bytes(self.budget)}" if self.budget is not None else ""
        return f"{in_bytes(self.peak)}{budget} at most, in {self.phase}"

    @property
    def largest(self) -> list[tuple[str, float]]:
        """What the bytes are, the largest part first."""
        return sorted(self.parts.items(), key=lambda part: -part[1])


def memory_in_order(graph: fx.Graph, program: Program, mesh: Mesh, states: States) -> Memory:
    """What a rank holds at most when a localized graph runs as it is written, with neither buckets nor overlap."""
    run = partition(graph, program)
    return MemoryAnalysis(graph, run, program, mesh, states).memory(*in_order(run))


class MemoryAnalysis:
    """What a rank holds when forward and backward of a localized graph run in one order or another. What the calls make
    is computed once, for all orders."""

    def __init__(self, graph: fx.Graph, run: Partition, program: Program, mesh: Mesh, states: States) -> None:
        self.run, self.mesh, self.states = run, mesh, states
        ports = dict(zip(graph.find_nodes(op="placeholder"), program.inputs, strict=True))
        self.roles = {node: port.role for node, port in ports.items()}
        self.names = {node: port.name for node, port in ports.items()}
        made = zip(program.outputs, graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
        self.added_up: list[fx.Node] = [node for port, node in made if node is not None and program.adds_up(port)]
        self.trained = {node for node, name in self.names.items() if name in program.trained}
        self.by_call: dict[object, list[TensorForm | None]] = {}
        self.by_node: dict[fx.Node, list[TensorForm | None]] = {}
        self.equal: dict[TensorForm, TensorForm] = {}
        self.contiguous: dict[tuple[tuple[int, ...], torch.dtype], TensorForm] = {}

    def memory(self, forward: Order, backward: Order) -> Memory:
        """The peak of a run in these orders, where it is, and what the bytes are."""
        return Execution(self).memory(forward, backward)

    def one(self, form: TensorForm) -> TensorForm:
        """The one object of all that are equal, so that equal forms can be compared by identity."""
        return self.equal.setdefault(form, form)


class Execution:
    """One run: what is held after every call. `noted` sees each of them at its fullest."""

    def __init__(self, known: MemoryAnalysis) -> None:
        self.known, self.mesh = known, known.mesh
        self.started: set[fx.Node] = set()
        self.under_way: dict[fx.Node, list[StoredTensor | None]] = {}  # what a collective that was started holds
        self.tensors: dict[fx.Node, list[StoredTensor | None]] = {}  # the results of every node
        self.sizes: list[int] = []  # bytes of every storage
        self.labels: list[str] = []  # what every storage counts as
        self.references: Counter[int] = Counter()  # how many tensors hold a storage
        self.bytes_by_label: Counter[str] = Counter()
        self.total = 0  # of them all
        self.peak = Memory(0.0, "", "", {})

    def memory(self, forward: Order, backward: Order) -> Memory:
        run, roles = self.known.run, self.known.roles
        self.started = {node for order in (forward, backward) for node, awaited in order if awaited}
        for node in run.given:
            self._place(node, "parameters" if roles[node] is Role.PARAMETER else "inputs and buffers")
            if node in self.known.trained:
                size = dtype_of(node).itemsize
                states = int(self.sizes[-1] / size * self.known.states(size))
                self.bytes_by_label["optimizer state"] += states
                self.total += states
        for node in self.known.added_up:
            self.bytes_by_label[SUMS] += self._contiguous(node).size
            self.total += self._contiguous(node).size
        outputs = [node for node in run.outputs if node is not None]
        labels = {**dict.fromkeys(run.saved, "kept for backward"), **dict.fromkeys(outputs, "outputs")}
        self._go("forward", forward, [*run.given, *outputs, *run.saved], labels)
        for node in run.tangents:
            self._place(node, "tangents")
        gradients = dict.fromkeys(run.gradients, "gradients")
        self._go("backward", backward, [*run.given, *outputs, *run.gradients], gradients)
        counted = str(self.known.states) if "optimizer state" in self.peak.parts else ""
        return replace(self.peak, optimizer=counted)

    def _go(self, phase: str, order: Order, kept: list[fx.Node], labels: Mapping[fx.Node, str]) -> None:
        operands = self.known.run.operands
        # what a started collective makes is a value from where it is awaited, and its operands were read before
        dead = dead_after([[node] if awaited else [*operands[node], node] for node, awaited in order], kept)
        for place, (node, awaited) in enumerate(order):
            if awaited:
                self.tensors[node] = self._await(node, labels.get(node, "in use"))
            elif node in self.started:
                self.under_way[node] = self._begin(node)
            else:
                self.tensors[node] = self._call(node, labels.get(node, "in use"))
            workspace = 0 if awaited else self._workspace(node)
            self.noted(phase, node, workspace)
            for value in dead.get(place, ()):
                self._release(self.tensors[value])
            if awaited:
                self._release(self.under_way.pop(node))

    def noted(self, phase: str, node: fx.Node, workspace: int) -> None:
        """A call runs, which allocates `workspace` bytes beside what is held."""
        if self.total + workspace > self.peak.peak:
            self.peak = Memory(float(self.total + workspace), phase, where(node), self.parts(workspace))

    def parts(self, workspace: int) -> dict[str, float]:
        """What is held now, in bytes by label."""
        held = {**self.bytes_by_label, "workspace": workspace}
        return {label: float(size) for label, size in held.items() if size}

    def _place(self, node: fx.Node, label: str) -> None:
        form = self._contiguous(node)
        self.tensors[node] = [self._store(form, label, [])]

    def _call(self, node: fx.Node, label: str) -> list[StoredTensor | None]:
        if node.target is operator.getitem:
            source, index = node.args
            element = self.tensors[source][index]  # type: ignore[index]
            if element is not None:
                self._hold(element.storage, label)
            return [element]
        operands = [self.tensors[operand][0] for operand in self.known.run.operands[node]]
        storages = list(dict.fromkeys([one.storage for one in operands if one is not None]))
        forms = self.known.by_node.get(node)
        if forms is None:
            if isinstance(node.target, Bucket):
                return self._pieces(node, label)
            key = self._call_key(node, operands, storages)
            forms = self.known.by_call.get(key)
            if forms is None:
                forms = [one and self.known.one(one) for one in self._forms(node, storages)]
                self.known.by_call[key] = forms
            self.known.by_node[node] = forms
        return [None if form is None else self._store(form, label, storages) for form in forms]

    def _pieces(self, node: fx.Node, label: str) -> list[StoredTensor | None]:
        """The results of a bucket: pieces of one storage, one after another."""
        results = sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]
        forms = [self._contiguous(user) for user in results]
        storage, start = len(self.sizes), 0
        self.sizes.append(sum(one.size for one in forms))
        self.labels.append(label)
        pieces: list[StoredTensor | None] = []
        for one in forms:
            self._hold(storage, label)
            pieces.append(StoredTensor(storage, self.known.one(replace(one, offset=start))))
            start += math.prod(one.shape)
        return pieces

    def _begin(self, node: fx.Node) -> list[StoredTensor | None]:
        """What a collective that was started holds: its result, and the operand that it reads until it ends."""
        collective = collective_of(node)
        assert collective is not None
        bucket, holds = isinstance(collective, Bucket), collective.holds(node.kwargs)
        form = self._contiguous(next(iter(node.users)) if bucket else node)
        tensors: list[StoredTensor | None] = (
            self._pieces(node, "in use") if bucket else [self._store(form, "in use", [])]
        )
        if holds is Held.COPY:
            tensors.append(self._store(replace(form, size=sum(operand_bytes(node, self.mesh))), "in use", []))
        elif holds is Held.OPERAND:
            read = self.tensors[node.all_input_nodes[0]][0]
            assert read is not None
            self._hold(read.storage, "in use")
            tensors.append(read)
        return tensors

    def _await(self, node: fx.Node, label: str) -> list[StoredTensor | None]:
        """The result of a collective that was awaited. It is in the storage where it arrived, or in a new one, if it
        was joined along another dim than the first."""
        collective = collective_of(node)
        assert collective is not None
        if collective.joins(node.kwargs):
            return [self._store(self._contiguous(node), label, [])]
        count = len(node.users) if isinstance(collective, Bucket) else 1
        arrived = self.under_way[node][:count]
        for one in arrived:
            assert one is not None
            self._hold(one.storage, label)
        return arrived

    def _store(self, form: TensorForm, label: str, storages: Sequence[int]) -> StoredTensor:
        if form.operand is None:
            storage = len(self.sizes)
            self.sizes.append(form.size)
            self.labels.append(label)
        else:
            storage = storages[form.operand]
        self._hold(storage, label)
        return StoredTensor(storage, form)

    def _hold(self, storage: int, label: str) -> None:
        if self.references[storage] and label != "in use" and self.labels[storage] == "in use":
            self.bytes_by_label["in use"] -= self.sizes[storage]
            self.labels[storage] = label
            self.bytes_by_label[label] += self.sizes[storage]
        elif not self.references[storage]:
            self.bytes_by_label[self.labels[storage]] += self.sizes[storage]
            self.total += self.sizes[storage]
        self.references[storage] += 1

    def _release(self, values: Iterable[StoredTensor | None]) -> None:
        for one in values:
            if one is not None:
                self.references[one.storage] -= 1
                if not self.references[one.storage]:
                    self.bytes_by_label[self.labels[one.storage]] -= self.sizes[one.storage]
                    self.total -= self.sizes[one.storage]

    def _call_key(self, node: fx.Node, operands: Sequence[StoredTensor | None], storages: list[int]) -> object:
        """All that the results of a call depend on. The kind of an operator says all of it, but for how its operands
        are laid out, and which of several results are read."""
        chosen = chosen_of(node)
        if chosen is not None:
            laid_out = [one and (storages.index(one.storage), id(one.form)) for one in operands]
            read = [user.args[1] for user in node.users] if lowered(node).layout is None else ()
            return chosen.op.kind, chosen.strategy, *laid_out, *read

        def show(value: object) -> object:
            if isinstance(value, fx.Node):
                one = self.tensors[value][0]
                return one and (storages.index(one.storage), id(one.form))
            if isinstance(value, (list, tuple)):
                return tuple(map(show, value))  # pyright: ignore
            return value if type(value) is int else repr(value)

        shape = () if lowered(node).layout is None else self._local(node)
        elements = ((user.args[1], self._local(user)) for user in node.users if user.target is operator.getitem)
        return node.target, show(node.args), show(tuple(node.kwargs.items())), shape, tuple(elements)

    def _local(self, node: fx.Node) -> tuple[int, ...]:
        return laid(node).local_shape(self.mesh)

    def _forms(self, node: fx.Node, storages: list[int]) -> list[TensorForm | None]:
        """What torch's meta kernel makes. Functions of the runtime have no such kernel, nor have some operators, or it
        asks for values: these make new tensors of the layouts' sizes. All views have one."""
        if isinstance(node.target, torch._ops.OpOverload):
            found = made_by_meta_kernel(
                node, lambda operand: self._placed(operand, storages), tuple(self.sizes[one] for one in storages)
            )
            if found is not None:
                return found
        form = self._contiguous if chosen_of(node) is None else self._as_captured
        if lowered(node).layout is not None:
            return [form(node)]
        elements = {user.args[1]: form(user) for user in node.users if user.target is operator.getitem}
        return [elements.get(index) for index in range(max(elements, default=-1) + 1)]  # type: ignore[type-var]

    def _as_captured(self, node: fx.Node) -> TensorForm:
        """What a body makes: its result lies in memory as that of the operator does."""
        form, base = self._contiguous(node), lowered(node).base
        known = base is not None and isinstance(base[0].meta[FACTS], Captured)  # a program read from text is not
        strides = tensor_of(base).stride() if base is not None and known else ()
        if len(strides) != len(form.shape):
            return form
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        laid_out = torch.empty_permuted(form.shape, order, dtype=form.dtype, device="meta")
        return self.known.one(replace(form, stride=laid_out.stride()))

    def _contiguous(self, node: fx.Node) -> TensorForm:
        shape, dtype = self._local(node), dtype_of(node)
        if (shape, dtype) not in self.known.contiguous:
            stride = torch.empty(shape, device="meta").stride()
            form = TensorForm(None, math.prod(shape) * dtype.itemsize, shape, stride, 0, dtype)
            self.known.contiguous[shape, dtype] = self.known.one(form)
        return self.known.contiguous[shape, dtype]

    def _placed(self, operand: fx.Node, storages: list[int]) -> Placed | None:
        one = self.tensors[operand][0]
        return None if one is None else (storages.index(one.storage), one.form)

    def _workspace(self, node: fx.Node) -> int:
        """Bytes that a call allocates and frees again.

        A collective along another dim than the first makes a rearranged copy. A bucket is filled into a buffer. A draw
        goes through the numbers of other ranks. The rule of an operator declares its workspace, and that of each
        variant.
        """
        if node.target is draw and any(isinstance(value, Part) for value in node.kwargs.values()):
            count = math.prod(node.args[0])  # type: ignore[arg-type]
            return (min(count, BLOCK) if node.args[1] in IN_PIECES else count) * node.kwargs["dtype"].itemsize  # type: ignore[union-attr]
        chosen = chosen_of(node)
        if chosen is not None:
            return workspace(chosen.shape, chosen.strategy, self.mesh)
        if isinstance(node.target, torch._ops.OpOverload):
            return 0
        collective = collective_of(node)
        if collective is None or self.mesh.sizes[str(node.kwargs["axis"])] == 1:
            return 0
        started = node in self.started
        result = (self.under_way if started else self.tensors)[node][0]
        assert result is not None
        if isinstance(collective, Bucket):
            operand = sum(operand_bytes(node, self.mesh))
        else:
            read = self.tensors[node.all_input_nodes[0]][0]
            assert read is not None
            operand = self.sizes[read.storage]
        return collective.workspace(node.kwargs, operand, self.sizes[result.storage], started)
