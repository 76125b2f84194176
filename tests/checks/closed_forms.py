"""What papers derived by hand, as formulas, and the same asked of the planner.

AxoNN's layer (Singh et al. 2024): four axes for one matrix product. Poseidon's inequality (Zhang et al. 2017): when to
send a gradient's factors instead of the gradient. The recipes FSDP, HSDP, Megatron, and Megatron with its sequences
split: what they send in one step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import shardc
from samples.textbook import Transformer, without_overlap
from shardc.api import Compiled
from shardc.capture.trace import capture
from shardc.cost.hardware import DISTANCE, Hardware, Link
from shardc.ir.constrain import Spec, parse
from shardc.ir.mesh import Mesh
from shardc.ir.program import Role, value_of
from shardc.ir.splits import Splits
from shardc.passes.normalize import normalized
from shardc.passes.propagate import spread
from shardc.planning.constraints import ParameterDemand, collect
from shardc.planning.cost_network import CostNetwork, LayoutDemands
from shardc.rules.factors.factored import Factored
from shardc.rules.factors.factoring import factor
from shardc.solver.solve import solve

ITEM = 2
"""Bytes of a bfloat16."""

WIRE = Link(0.0, 1.0)
BYTES = Hardware("bytes", {"float32": math.inf}, math.inf, 0.0, 1 << 20, WIRE, WIRE)
"""A device on which only what is sent takes time: a second a byte, and no latency."""


def second(mesh: Mesh, axis: str) -> float:
    """Seconds of a byte over an axis: ranks further apart count as a little slower."""
    return 1 + DISTANCE * math.log2(mesh.ways(mesh.names[mesh.names.index(axis) + 1 :]))


@dataclass(frozen=True)
class Axonn:
    """O (m x n) = I (m x k) W (k x n), m over data and z, k over `row`, n over `column`, W's parts cut once more by z.
    The three sizes differ."""

    m: int
    k: int
    n: int
    data: int
    z: int
    row: int
    column: int

    @property
    def mesh(self) -> Mesh:
        return Mesh((("data", self.data), ("z", self.z), ("row", self.row), ("column", self.column)))

    def seconds(self) -> float:
        """Forward all-gather_z(W), all-reduce_row(O); backward all-reduce_column(dI), reduce-scatter_z(dW),
        all-reduce_data(dW). The paper gathers W again in backward; here the gathered one is kept."""
        m = self.m / self.data
        weight = self.k * self.n / (self.row * self.column)
        elements = {
            "z": 2 * (self.z - 1) / self.z * weight,
            "row": 2 * (self.row - 1) / self.row * m * self.n / (self.z * self.column),
            "column": 2 * (self.column - 1) / self.column * m * self.k / (self.z * self.row),
            "data": 2 * (self.data - 1) / self.data * weight / self.z,
        }
        return sum(ITEM * sent * second(self.mesh, axis) for axis, sent in elements.items())

    def planned(self, only: bool) -> float:
        """The optimum where I, W and O are stored as the paper has them; with `only`, of the plans whose products are
        split as in the paper."""
        with torch.device("meta"):
            layer = Layer(self.m, self.k, self.n).bfloat16()
        program = normalized(capture(layer, (), constraints={}))
        stored = {"given": "(data,z),row", "weight": "column,(row,z)"}
        return optimum(factor(program), self.mesh, stored, self._products if only else {})

    @property
    def _products(self) -> dict[tuple[int, int], Splits]:
        """By the shape of a product's result, how it is made: its two splits, and the axis on which it is a sum."""
        rows, row, column = self._held("data", "z"), self._held("row"), self._held("column")
        return {
            (self.m, self.n): Splits((rows, column), self._sum(row)),
            (self.m, self.k): Splits((rows, row), self._sum(column)),
            (self.n, self.k): Splits((column, row), self._sum(rows)),
        }

    def _held(self, *axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.sizes[axis] > 1)

    @staticmethod
    def _sum(axes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        return tuple((axis, "sum") for axis in axes)


class Layer(nn.Module):
    """A product of two parameters; its result is stored as AxoNN stores it."""

    def __init__(self, m: int, k: int, n: int) -> None:
        super().__init__()
        self.given, self.weight = nn.Parameter(torch.empty(m, k)), nn.Parameter(torch.empty(n, k))

    def forward(self) -> Tensor:
        return shardc.constrain(nn.functional.linear(self.given, self.weight), (("data", "z"), "column"))


def optimum(
    factored: Factored, mesh: Mesh, stored: Mapping[str, str], products: Mapping[tuple[int, int], Splits]
) -> float:
    """The least cost where parameters are stored so, and products of a shape, if it is named, are made so."""
    ports = [port for port in factored.program.inputs if port.role is Role.PARAMETER]
    demands = [ParameterDemand(port, parse(stored[port.name]), port.name) for port in ports]
    propagated = spread(factored, mesh, collect(factored, mesh, demands))
    accepts = dict(propagated.accepts())
    for op in factored.ops:
        shape = tuple(value_of(op.node).shape)
        if is_product(op.node) and shape in products:
            accepts[op.node, 0] = products[shape].__eq__
    network = CostNetwork(factored, mesh, BYTES, LayoutDemands(accepts, whole_bytes=0.0))
    network.build()
    return solve(network.problem()).cost


def is_product(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.mm.default


def axonn_cases(devices: int, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Axonn]:
    """All configurations of a number of devices, a power of two."""
    powers = [2**i for i in range(devices.bit_length())]
    for shape in shapes:
        for data in powers:
            for z in powers:
                for row in powers:
                    column = devices // (data * z * row)
                    if column and data * z * row * column == devices:
                        yield Axonn(*shape, data, z, row, column)


@dataclass(frozen=True)
class Poseidon:
    """A fully-connected layer, `outputs` x `inputs`, whose gradient must be whole on `workers`, each with `samples`."""

    outputs: int
    inputs: int
    samples: int
    workers: int

    def seconds(self) -> dict[str, float]:
        """Per way of making the gradient the seconds that it takes. Poseidon knows the first two; the others cut the
        gradient by one of its dims: they gather one factor, move the other, and gather the gradient."""
        p, gradient = self.workers, self.outputs * self.inputs
        given, made = self.samples * self.inputs, self.samples * self.outputs
        elements = {
            "reduce the gradient": 2 * (p - 1) / p * gradient,
            "gather the factors": (p - 1) * (given + made),
            "cut its outputs": (p - 1) * (given + made / p + gradient / p),
            "cut its inputs": (p - 1) * (made + given / p + gradient / p),
        }
        return {way: ITEM * sent for way, sent in elements.items()}

    @property
    def inequality(self) -> bool:
        """Whether sending factors takes less: K (P - 1) (M + N) < 2 M N (P - 1) / P."""
        whole = 2 * self.outputs * self.inputs * (self.workers - 1) / self.workers
        return self.samples * (self.workers - 1) * (self.outputs + self.inputs) < whole

    def planned(self) -> Compiled:
        with torch.device("meta"):
            layer = DataParallel(self.samples * self.workers, self.inputs, self.outputs).bfloat16()
        constraints: dict[str, Spec] = {"given": ("data", None), "weight": (None, None)}
        mesh = f"data={self.workers}"
        return shardc.compile(layer, mesh, (), constraints=constraints, hardware=BYTES, outputs="sharded")


class DataParallel(nn.Module):
    """A product whose rows, and those of its cotangent, are split over the workers."""

    def __init__(self, batch: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.given, self.weight = nn.Parameter(torch.empty(batch, inputs)), nn.Parameter(torch.empty(outputs, inputs))

    def forward(self) -> Tensor:
        return shardc.constrain(nn.functional.linear(self.given, self.weight), ("data", None))


@dataclass(frozen=True)
class Recipe:
    """A recipe for a transformer: its mesh and constraints, the batch, and bytes sent by phase, kind and axis."""

    name: str
    mesh: str
    constraints: Mapping[str, Spec]
    batch: int
    sequence: int
    width: int
    sends: Mapping[tuple[str, str, str], float]

    def planned(self, free: bool) -> Compiled:
        """The plan of the recipe, or the one that nothing constrains."""
        with torch.device("meta"):
            model = Transformer(self.width, self.width // 128).bfloat16()
            x = torch.empty(self.batch, self.sequence, self.width, dtype=torch.bfloat16)
        constraints = {} if free else dict(self.constraints)
        return shardc.compile(model, self.mesh, (x,), constraints=constraints, hardware=without_overlap("h100"))


def sent(compiled: Compiled, least: float = 1e6) -> dict[tuple[str, str, str], float]:
    """Bytes that a rank sends, by phase, kind and axis; the loss and buckets of norms alone, below `least`, left
    out."""
    found = Counter[tuple[str, str, str]]()
    for c in compiled.plan.conversions:
        if c.sent >= least:
            found[c.phase, c.kind, c.axis] += c.sent  # type: ignore[assignment]
    return dict(found)


BLOCKS = 2
MEGATRON: dict[str, Spec] = {
    **{f"*.{name}.weight": ("tp", None) for name in ("q", "k", "v", "up")},
    **{f"*.{name}.weight": (None, "tp") for name in ("proj", "down")},
}


def recipes() -> list[Recipe]:
    """Fully sharded, hybrid sharded, and Megatron's weights: on short sequences the residual is whole and reduced, on
    long ones split, scattered and gathered."""
    matrices = BLOCKS * 12 * 2048**2 * ITEM
    norms = BLOCKS * 2 * 2048 * ITEM
    residual = 8192 * 8192 * ITEM  # of the long sequences
    return [
        Recipe(
            "FSDP", "fs=8", _rows("fs") | _batch("fs"), 64, 2048, 2048,
            {("forward", "all_gather", "fs"): 7 / 8 * matrices, ("backward", "reduce_scatter", "fs"): 7 / 8 * matrices},
        ),
        Recipe(
            "HSDP", "dp=2,fs=8", _rows("fs") | _batch(("dp", "fs")), 64, 2048, 2048,
            {
                ("forward", "all_gather", "fs"): 7 / 8 * matrices,
                ("backward", "reduce_scatter", "fs"): 7 / 8 * matrices,
                ("backward", "all_reduce", "dp"): matrices / 8 + norms,  # in one bucket
            },
        ),
        # the input of the model needs no gradient, so the last all-reduce of backward falls away
        Recipe(
            "Megatron, short sequences", "tp=8", MEGATRON, 1, 256, 8192,
            {
                ("forward", "all_reduce", "tp"): 2 * BLOCKS * 2 * 7 / 8 * residual / 32,
                ("backward", "all_reduce", "tp"): (2 * BLOCKS - 1) * 2 * 7 / 8 * residual / 32,
            },
        ),
        # and the first norm reads the input, which is whole
        Recipe(
            "Megatron, long sequences (split)", "tp=8", MEGATRON, 1, 8192, 8192,
            {
                ("forward", "reduce_scatter", "tp"): 2 * BLOCKS * 7 / 8 * residual,
                ("forward", "all_gather", "tp"): (2 * BLOCKS - 1) * 7 / 8 * residual,
                ("backward", "reduce_scatter", "tp"): (2 * BLOCKS - 1) * 7 / 8 * residual,
                ("backward", "all_gather", "tp"): 2 * BLOCKS * 7 / 8 * residual,
            },
        ),
    ]  # fmt: skip


def _rows(axis: str) -> dict[str, Spec]:
    """Every matrix is stored split by its rows."""
    return {f"*.{name}.weight": (axis, None) for name in ("q", "k", "v", "proj", "up", "down")}


def _batch(axes: str | tuple[str, ...]) -> dict[str, Spec]:
    return {f"blocks.{i}": (axes, None, None) for i in range(BLOCKS)}
