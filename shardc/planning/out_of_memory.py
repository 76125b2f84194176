"""Out of memory: what is missing where no plan fits into memory, and what would help.

no plan was found for dp=2 that holds at most 67.1 GiB a device (the memory of the hardware, less a tenth); the
smallest peak found is 90.2 GiB, in backward: optimizer state 44.7 GiB, parameters 22.4 GiB, gradients 22.4 GiB, ...
  - parameters, gradients and optimizer state are 178.8 GiB in all: they alone take 3 devices or more
  - optimizer='sgd' holds no state, optimizer='adamw' does: that saves 44.7 GiB, and is enough
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from shardc.analysis.memory import Memory
from shardc.errors import InfeasibleError
from shardc.ir.printing import in_bytes
from shardc.ir.program import Role, tensor_of
from shardc.options import OPTIMIZER
from shardc.planning.compilation import Compilation

STORED = ("parameters", "gradients", "optimizer state")
"""The parts of a memory that do not shrink with the batch; what remains are activations."""
LITTLE = 0.05
"""What helps less than this part of what is missing is not worth a line."""


class OutOfMemoryError(InfeasibleError):
    """No plan was found that fits; the smallest peak that was found is `least` bytes, infinite where none was tried."""

    def __init__(self, message: str, least: float = math.inf) -> None:
        super().__init__(message)
        self.least = least


def refuse_too_large(c: Compilation, budget: float, devices: int) -> None:
    """Raise OutOfMemoryError where so many devices cannot even store what is trained, however it is split."""
    stored = _stored(c)
    if stored.total() > budget * devices:
        raise OutOfMemoryError(
            f"no mesh of {devices} devices has a plan that holds at most {in_bytes(budget)} a device: "
            f"{_are(stored, devices)}they alone take {math.ceil(stored.total() / budget)} devices or more"
        )


def out_of_memory(c: Compilation, budget: float, least: Memory) -> OutOfMemoryError:
    """The error where nothing holds at most `budget` bytes a device, and the least that was found is `least`."""
    parts: dict[str, float] = {}
    for label, size in least.parts.items():
        kind = label if label in STORED else "activations"
        parts[kind] = parts.get(kind, 0.0) + size
    largest = sorted(parts.items(), key=lambda part: -part[1])
    consists = ", ".join(f"{label} {in_bytes(size)}" for label, size in largest)
    of_hardware = " (the memory of the hardware, less a tenth)" if c.options.hardware_bounds else ""
    place = f" ({least.place})" if least.place else ""
    head = (
        f"no plan was found for {c.mesh} that holds at most {in_bytes(budget)} a device{of_hardware}; "
        f"the smallest peak found is {in_bytes(least.peak)}, in {least.phase}{place}: {consists}"
    )
    remedies = [*_remedies(c, budget, least, parts), "memory='unbounded' plans without a bound"]
    return OutOfMemoryError("\n".join([head, *(f"  - {one}" for one in remedies)]), least.peak)


def _remedies(c: Compilation, budget: float, least: Memory, parts: Mapping[str, float]) -> Iterator[str]:
    """What would help."""
    stored, devices = _stored(c), c.mesh.size
    total, over, work = stored.total(), least.peak - budget, least.parts.get("workspace", 0.0)
    are = _are(stored, devices)
    if total / devices > budget:
        yield f"{are}they alone take {math.ceil(total / budget)} devices or more"
    else:
        if work < budget:
            yield f"{are}more devices would do, about {_more_devices(c, budget, least)}"
        yield from _smaller_batch(
            c, budget - sum(parts.get(label, 0.0) for label in STORED), parts.get("activations", 0.0)
        )
        if c.constraints:
            yield "fewer constraints, or others: what they keep whole, every device holds"
    state = parts.get("optimizer state", 0.0)
    if state > LITTLE * over:
        enough, saved = "and is enough" if state >= over else "but is not enough alone", in_bytes(state)
        now = f"optimizer={c.options.optimizer or OPTIMIZER!r}"
        yield f"optimizer='sgd' holds no state, {now} does: that saves {saved}, {enough}"
    outputs = least.parts.get("outputs", 0.0)
    if c.options.outputs == "full" and outputs > LITTLE * over:
        yield f"outputs='sharded' gathers none of the outputs, which hold {in_bytes(outputs)}"


def _are(stored: Counter[str], devices: int) -> str:
    """`parameters and gradients are 22.0 MiB in all, 2.8 MiB a device if all is split: `."""
    names, total = " and ".join(", ".join(stored).rsplit(", ", 1)), stored.total()
    each = f"{in_bytes(total / devices)} a device if all is split"
    return f"{names} are {in_bytes(total)} in all, {each}: " if stored else ""


def _more_devices(c: Compilation, budget: float, least: Memory) -> int:
    """The number of devices that would do, if all that is held shrinks with it but for workspaces. Dims divide by
    powers of two most often."""
    work = least.parts.get("workspace", 0.0)
    return c.mesh.size * 2 ** max(math.ceil(math.log2((least.peak - work) / (budget - work))), 1)


def _smaller_batch(c: Compilation, room: float, activations: float) -> Iterator[str]:
    """How much of the batch would do, if activations shrink with it."""
    ports = zip(c.program.inputs, c.program.placeholders, strict=True)
    shapes = [tensor_of((node, 0)).shape for port, node in ports if port.role is Role.INPUT]
    batch = max((int(shape[0]) for shape in shapes if shape), default=0)
    fits = int(batch * room / activations) if 0.0 < room < activations else 0
    if fits:
        most = fits // (unit := 10 ** max(len(str(fits)) - 2, 0)) * unit  # two digits are as much as is known
        yield f"a smaller batch would do, about {most} in place of {batch} in dim 0 of the inputs"


def _stored(c: Compilation) -> Counter[str]:
    """Bytes of the parameters of all devices together, if each is stored once, with their gradients and the optimizer's
    state."""
    stored, trained, states = Counter[str](), c.program.trained, c.states
    for port, node in zip(c.program.inputs, c.program.placeholders, strict=True):
        if port.role is Role.PARAMETER:
            tensor = tensor_of((node, 0))
            stored["parameters"] += tensor.nbytes
            if port.name in trained:
                stored["gradients"] += tensor.nbytes
                stored["optimizer state"] += int(tensor.numel() * states(tensor.element_size()))
    return +stored
