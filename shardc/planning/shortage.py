"""Shortage: what is missing where no plan fits into memory, and what would help.

    no plan was found for dp=2 that holds at most 67.1 GiB a device; the smallest peak found is 90.2 GiB, in backward:
    optimizer state 44.7 GiB, parameters 22.4 GiB, gradients 22.4 GiB, activations 0.7 GiB
      - parameters, gradients and optimizer state are 178.8 GiB in all: that takes 3 devices or more
      - optimizer='sgd' holds no state: that saves 44.7 GiB, and is enough
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from shardc.analysis.memory import Memory
from shardc.ir.printing import in_bytes
from shardc.ir.program import Role, tensor_of
from shardc.options import OPTIMIZER
from shardc.planning.compilation import Compilation

STORED = ("parameters", "optimizer state", "gradients")
"""The parts of a memory that do not shrink with the batch; what remains are activations."""


def shortage(c: Compilation, budget: float, least: Memory) -> str:
    """The message where nothing holds at most `budget` bytes a device, and the least that was found is `least`."""
    parts = Counter({label if label in STORED else "activations": 0.0 for label in least.parts})
    for label, size in least.parts.items():
        parts[label if label in STORED else "activations"] += size
    consists = ", ".join(f"{label} {in_bytes(size)}" for label, size in parts.most_common())
    what = "the memory of the hardware, less a tenth" if c.options.hardware_bounds else "the bound"
    head = (
        f"no plan was found for {c.mesh} that holds at most {in_bytes(budget)} a device ({what}); the smallest peak "
        f"found is {in_bytes(least.peak)}, in {least.phase}: {consists}"
    )
    return "\n".join([head, *(f"  - {one}" for one in _remedies(c, budget, least, parts))])


def _remedies(c: Compilation, budget: float, least: Memory, parts: Counter[str]) -> Iterator[str]:
    """What would help, in order of what is most likely to."""
    stored, devices = _stored(c), c.mesh.size
    total, over = sum(stored.values()), least.peak - budget
    names = " and ".join(filter(None, [", ".join(STORED[:1]), "gradients" if stored["gradients"] else ""]))
    if stored["optimizer state"]:
        names = "parameters, gradients and optimizer state"
    each = in_bytes(total / devices)
    if total / devices > budget:
        yield (
            f"{names} are {in_bytes(total)} in all, and {each} a device if all is split: they alone take "
            f"{math.ceil(total / budget)} devices or more"
        )
    else:
        yield (
            f"take more devices, about {math.ceil(devices * least.peak / budget)}; {names} are {in_bytes(total)} in "
            f"all, and {each} a device if all is split, so a constraint that keeps them whole would stand in the way"
        )
        yield from _smaller_batch(c, budget, parts)
    if parts["optimizer state"]:
        enough = "and is enough" if parts["optimizer state"] >= over else "but is not enough alone"
        name = c.options.optimizer or OPTIMIZER
        yield f"optimizer='sgd' holds no state, {name!r} does: that saves {in_bytes(parts['optimizer state'])}, {enough}"
    outputs = least.parts.get("outputs", 0.0)
    if outputs > 0.01 * least.peak and c.options.outputs == "full":
        yield f"outputs='sharded' gathers none of the outputs, which hold {in_bytes(outputs)}"
    yield "memory='unbounded' plans without a bound"


def _smaller_batch(c: Compilation, budget: float, parts: Counter[str]) -> Iterator[str]:
    left = budget - sum(parts[label] for label in STORED)
    program = c.program
    batches = [
        int(tensor_of(c.factored.values[node].key).shape[0])
        for port, node in zip(program.inputs, program.placeholders, strict=True)
        if port.role is Role.INPUT and tensor_of(c.factored.values[node].key).ndim
    ]
    if batches and 0.0 < left < parts["activations"]:
        batch, share = max(batches), left / parts["activations"]
        if int(batch * share) >= 1:
            yield f"a smaller batch: {int(batch * share)} of the {batch} would leave activations about {in_bytes(left)}"
        else:
            yield f"shorter sequences: activations have room for about {share:.0%} of what they hold"


def _stored(c: Compilation) -> dict[str, float]:
    """Bytes that all devices together hold at least of parameters, gradients and the optimizer's state."""
    program, stored = c.program, dict.fromkeys(STORED, 0.0)
    trained = program.trained
    for port, node in zip(program.inputs, program.placeholders, strict=True):
        if port.role is Role.PARAMETER:
            tensor = tensor_of(c.factored.values[node].key)
            stored["parameters"] += tensor.nbytes
            if port.name in trained:
                stored["gradients"] += tensor.nbytes
                stored["optimizer state"] += tensor.numel() * c.states(tensor.element_size())
    return stored
