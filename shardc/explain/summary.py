"""The summary of a plan: what the axes do, how fast it is, how full a device gets, and what binds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardc.analysis.parallelism import AxisRole, Block, Parallelism, Use
from shardc.ir.mesh import Mesh
from shardc.ir.printing import in_bytes, in_seconds
from shardc.ir.report import Columns, Report, Section

FEW = 6
"""So many weights of a block are named; of more, the first few and their number."""


@dataclass(frozen=True)
class Summary:
    """What a plan amounts to, on `mesh` of devices of kind `hardware`. A step takes `seconds`; `rows` are the tokens
    that it takes (the elements of the first input that is a batch of sequences of whole numbers), or else the samples
    (dim 0 of the first input): `unit` says which.

    `flops` are those of the model's matrix products in a step, forward and backward, on all devices together; of causal
    attention, the pairs that are computed. What runs again to save memory does not count. `mfu` is the model FLOPs
    utilisation (Chowdhery et al. 2022): the time that the products would take on all devices at the peak of the
    hardware, by `seconds`.

    `held` are the bytes that a device holds at most, of `room` that it has, within `bound`; `memory_binds` says that
    the plan had to be made smaller for it. `spent` are the seconds of a step by what takes them: `arithmetic`, `memory
    bandwidth`, `launches`, and for every axis the seconds that a rank loses on its account, with its `links`.
    """

    mesh: Mesh
    hardware: str
    parallelism: Parallelism = field(default_factory=Parallelism)
    seconds: float = 0.0
    rows: int = 0
    unit: str = "tokens"
    flops: float = 0.0
    mfu: float = 0.0
    held: float = 0.0
    room: float = 0.0
    bound: float | None = None
    memory_binds: bool = False
    spent: Mapping[str, float] = field(default_factory=dict[str, float])
    links: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def rate(self) -> float:
        """Tokens or samples a second, of all devices together."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def binds(self) -> str:
        """What takes most of a step: `arithmetic`, `memory bandwidth`, `launches`, or an axis."""
        return max(self.spent, key=lambda one: self.spent[one], default="")

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report().html()

    def report(self) -> Report:
        """What `print(summary)` shows, in sections."""
        head = [f"{self.mesh} on {self.hardware}: {in_seconds(self.seconds)} a step", *self.figures()]
        if self.held:
            share = f", {self.held / self.room:.0%} of the {in_bytes(self.room)} of a device" if self.room else ""
            head.append(f"  memory     {in_bytes(self.held)}{share}")
        sections = [Section("what the axes do", self.parallelism.lines)] if self.parallelism.axes else []
        blocks = Columns(list(_rows(self.parallelism.blocks)), "<<<<")
        return Report(head, [*sections, *([Section("in each block", blocks)] if blocks.rows else [])])

    def figures(self) -> Iterable[str]:
        """Lines of throughput, utilisation and what binds."""
        if self.rows:
            share = f", {self.rate / self.mesh.size:,.0f} a device" if self.mesh.size > 1 else ""
            yield f"  speed      {self.rate:,.0f} {self.unit} a second{share}"
        if self.flops:
            yield f"  MFU        {self.mfu:.1%} of the peak, for {self.flops:.3g} FLOPs a step"
        if self.spent:
            yield f"  binds      {self._binding()}"

    def _binding(self) -> str:
        total = sum(self.spent.values())
        ordered = sorted(((size, name) for name, size in self.spent.items() if size >= 0.005 * total), reverse=True)
        parts = [f"{self._named(name)} {size / total:.0%}" for size, name in ordered]
        memory = (
            "; and the bound on memory, for which values are regathered or computed again" if self.memory_binds else ""
        )
        return ", ".join(parts) + memory

    def _named(self, name: str) -> str:
        return f"{name} ({self.links[name]})" if name in self.links else name


def _rows(blocks: Sequence[Block]) -> Iterable[tuple[str, str, str, str]]:
    for block in blocks:
        name = block.name or ("the rest" if len(blocks) > 1 else "the model")
        count = f"x{block.count}" if block.count > 1 else ""
        for axis, uses in block.uses.items():
            if uses:
                yield name, count, axis, "; ".join(map(_told, uses))
                name = count = ""


def _told(use: Use) -> str:
    if not use.weights or use.role is AxisRole.DATA or use.how == "sequence":
        return use.how
    named = use.weights if len(use.weights) <= FEW else (*use.weights[: FEW - 1], f"{len(use.weights) - FEW + 1} more")
    return f"{use.how.removesuffix(' of weights')}: {', '.join(named)}"
