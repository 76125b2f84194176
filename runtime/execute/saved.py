"""What a saved module does when it is run as a program.

    torchrun --nproc-per-node 4 llama.py --check

makes parameters and inputs of the stated shapes from a seed, runs forward and backward on all processes, and compares
outputs and gradients with those of the same file on a virtual mesh, which rank 0 runs on its CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardc.runtime.errors import RankError
from shardc.runtime.execute.executable import Executable
from shardc.runtime.execute.load import load
from shardc.runtime.execute.slots import Slot
from shardc.runtime.mesh.distributed import DistributedMesh, started
from shardc.runtime.mesh.virtual import VirtualMesh

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far results may be apart by dtype, by the norm of the expected: sums are made in another order."""


def main(path: str, arguments: Sequence[str] | None = None) -> None:
    """Run a saved module as a program; ends with status 1 where results differ."""
    parser = argparse.ArgumentParser(description="a program that shardc has written")
    parser.add_argument("--check", action="store_true", help="compare the processes of torchrun with a virtual mesh")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and inputs that are made up")
    asked = parser.parse_args(arguments)
    if not asked.check:
        parser.print_help()
        return
    if not started():
        raise RankError(f"--check compares processes with a virtual mesh: start it with torchrun, {path} --check")
    if not check(path, asked.seed):
        sys.exit(1)


def check(path: str, seed: int = 0) -> bool:
    """Whether the processes compute what a virtual mesh does; rank 0 prints every result with its distance."""
    executable = Executable(load(path))
    found = _results(executable, seed)
    verdict = [True]
    mesh = executable.mesh
    assert isinstance(mesh, DistributedMesh)
    if mesh.rank == 0:
        expected = _results(Executable(load(path), VirtualMesh(mesh.axes)), seed)
        for name, one in found.items():
            distance = _distance(one, expected[name])
            close = distance <= CLOSE.get(expected[name].dtype, 0.0)
            verdict[0] &= close
            print(f"{'equal' if close else 'WRONG'}  {name}  {distance:.1e}")
    torch.distributed.broadcast_object_list(verdict, 0)
    return verdict[0]


def _results(executable: Executable, seed: int) -> dict[str, Tensor]:
    """Outputs and gradients, whole, for parameters and inputs from a seed."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    device, made = executable.mesh.device(executable.mesh.ranks[0]), dict[str, Tensor]()
    gradients = {slot.name for slot in executable.gradients}
    for slot in executable.inputs:
        tensor = made[slot.name] = _made_up(slot, generator).to(device)
        tensor.requires_grad_(slot.name in gradients)
    inputs = {slot.index: made[slot.name] for slot in executable.inputs if slot.role == "input"}
    flat = [inputs.get(index, torch.empty(0)) for index in range(max(inputs, default=-1) + 1)]
    outputs = executable.run(made, flat)
    begins = {slot.index for slot in executable.tangents}  # backward starts from these outputs alone
    ends = [
        out for slot, out in zip(executable.outputs, outputs, strict=True) if slot.index in begins and out.requires_grad
    ]
    if ends:
        torch.autograd.backward(ends, [torch.ones_like(out) for out in ends])
    found = {f"output {index}": out for index, out in enumerate(outputs)}
    found |= {f"gradient of {name}": grad for name in made if (grad := made[name].grad) is not None}
    return {name: _whole(value) for name, value in found.items()}


def _made_up(slot: Slot, generator: torch.Generator) -> Tensor:
    """A tensor of the slot's shape: small numbers around zero for parameters and inputs, positive ones for buffers;
    whole numbers are 0 or 1, for which any table has a row."""
    dtype = getattr(torch, slot.dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2, slot.shape, generator=generator).to(dtype)
    if slot.role in ("parameter", "input"):
        size = max(slot.shape[-1], 1) if slot.role == "parameter" and slot.shape else 1
        return (torch.randn(slot.shape, generator=generator) / size**0.5).to(dtype)
    return torch.rand(slot.shape, generator=generator).to(dtype)


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    one, other = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (found, expected))
    return float((one - other).norm()) / max(float(other.norm()), 1e-30)
