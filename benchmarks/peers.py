"""What torch itself offers for the transformer of network.py: the recipes that a person would apply by hand.

A peer takes the model and a mesh of `hosts` x `local` processes, and leaves a model that synchronises its gradients in
backward. Each is applied as torch documents it, with two liberties, both in its favour: the inputs' gradients of q, k
and v are added before one all-reduce (torch's tutorial reduces each of them), and of both kinds of FSDP there is also
one that keeps the gathered weights for backward, since nothing here bounds memory. The last three leave the link
between hosts unused: every host does the same work. Where the link is slow nothing else is as fast, and shardc, free to
choose, does the same; a comparison without them would flatter it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist

# Data parallelism that composes with tensor parallelism: DDP itself takes no DTensor, and torchtitan uses this one too.
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

AXES = HOSTS, LOCAL = "hosts", "local"
Apply = Callable[[nn.Module, DeviceMesh], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A recipe: how it is applied, and the axes of the mesh over which it splits the batch, the outer one first."""

    name: str
    apply: Apply
    batch: tuple[str, ...]

    def share(self, batch: Tensor, mesh: DeviceMesh) -> Tensor:
        """This rank's part of the batch, which is split along its first dim."""
        for axis in self.batch:
            batch = batch.chunk(mesh[axis].size())[mesh.get_local_rank(axis)]
        return batch


def line(mesh: DeviceMesh, axis: str | None) -> DeviceMesh:
    """An axis of the mesh, or without a name one axis of all processes."""
    return mesh[axis] if axis else init_device_mesh("cpu", (mesh.size(),))


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


def alone(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every process does the whole step."""
    return model


def data(model: nn.Module, mesh: DeviceMesh, *, over: str | None = None) -> nn.Module:
    return DistributedDataParallel(model, process_group=line(mesh, over).get_group())


def sharded(model: nn.Module, mesh: DeviceMesh, *, flat: bool, keep: bool) -> nn.Module:
    """FSDP block by block: `flat` over all processes, else HSDP, which replicates on the first axis. `keep`: gather
    weights once, in forward."""
    axes = line(mesh, None) if flat else mesh
    for block in blocks(model):
        fully_shard(block, mesh=axes, reshard_after_forward=not keep)
    fully_shard(model, mesh=axes)
    return model


def tensor(model: nn.Module, mesh: DeviceMesh, *, over: str | None = None) -> nn.Module:
    """Megatron's split of attention heads and hidden units."""
    whole = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
    )  # q, k and v read one DTensor, in which their partial gradients meet
    plan: dict[str, ParallelStyle] = {"norm1": whole}
    plan |= {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {name: RowwiseParallel() for name in ("proj", "down")}
    axis = line(mesh, over)
    for block in blocks(model):
        parallelize_module(block, axis, plan)
    return model


def tensor_and_data(model: nn.Module, mesh: DeviceMesh, *, over: str, batch: str) -> nn.Module:
    """Tensor parallel over one axis of the mesh, data parallel over the other."""
    tensor(model, mesh, over=over)
    for module in (*blocks(model), model):
        replicate(module, mesh=mesh[batch])
    return model


PEERS = (
    Peer("DDP", data, AXES),
    Peer("FSDP2", partial(sharded, flat=True, keep=False), AXES),
    Peer("FSDP2, weights kept", partial(sharded, flat=True, keep=True), AXES),
    Peer("HSDP", partial(sharded, flat=False, keep=False), AXES),
    Peer("HSDP, weights kept", partial(sharded, flat=False, keep=True), AXES),
    Peer("TP", tensor, ()),
    Peer("TP inside, DP between hosts", partial(tensor_and_data, over=LOCAL, batch=HOSTS), (HOSTS,)),
    Peer("TP between, DP inside hosts", partial(tensor_and_data, over=HOSTS, batch=LOCAL), (LOCAL,)),
    Peer("DDP inside, hosts alike", partial(data, over=LOCAL), (LOCAL,)),
    Peer("TP inside, hosts alike", partial(tensor, over=LOCAL), ()),
    Peer("all processes alike", alone, ()),
)


def check(name: str, model: nn.Module, loss: Tensor, expected: nn.Module, expected_loss: Tensor) -> None:
    """All ranks: after a step of `model`, its loss (the mean over ranks) and its gradients, put together, are those of
    `expected`, the same model after the same step on one device. Raises AssertionError, naming the plan and the value.
    """
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    compare(f"{name}: loss", mean, expected_loss.detach())
    for (path, one), other in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, f"{name}: {path} has no gradient"
        found = other.grad.full_tensor() if isinstance(other.grad, DTensor) else other.grad
        compare(f"{name}: gradient of {path}", found, one.grad)


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    """Elements may differ by what float32 loses in sums of another order, measured by the largest element."""
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance, msg=lambda why: f"{what}: {why}")
