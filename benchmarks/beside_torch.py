"""The same program by shardc and by torch's own DDP, FSDP2 and tensor parallel: what a step takes, and what it runs.

    python benchmarks/beside_torch.py                                     # four processes of this machine
    python benchmarks/beside_torch.py --width 384 --blocks 3 --batch 8 --sequence 64
    python benchmarks/beside_torch.py --llama                             # a Llama of transformers

Each pair has the same layouts: `fully sharded` stores weights as FSDP2 does, `tensor` splits them as Megatron. Plans
are for this machine, which is calibrated first. Losses and gradients of the transformer are compared with those of one
device before anything is timed. Then all take turns, a few steps each. CPU-seconds are those of all processes, user and
system: other work on the machine changes them little, while it changes wall time much. Kernels, copies and collectives
are counted on one rank, and depend on nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import network
import peers
import torch
import torch.distributed as dist
from compile import machine
from network import RECIPES, Spec, Where, fresh
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

RANKS = 4
PAIRS = {
    "data parallel": "DDP", "free, one axis": "DDP", "fully sharded": "FSDP2", "tensor": "TP",
}  # fmt: skip
"""Of shardc's plans the peer that runs the same program; and for the plan that nothing constrains, one to compare."""


class Llama(nn.Module):
    """A Llama of transformers that gives its loss."""

    def __init__(self, layers: int, width: int) -> None:
        import transformers

        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=4096, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=2 * width, use_cache=False,
        )  # fmt: skip
        self.whole = transformers.LlamaForCausalLM(config)

    @property
    def blocks(self) -> nn.Module:
        return self.whole.get_submodule("model.layers")

    def forward(self, ids: Tensor) -> Tensor:
        return self.whole(input_ids=ids, labels=ids).loss


Step = Callable[[], Tensor]
Made = Callable[[], tuple[nn.Module, Tensor]]


@dataclass
class Measured:
    """A step: seconds of all processes, seconds by the clock, and the kernels, copies and collectives of one rank."""

    cpu: float
    wall: float
    kernels: int
    copies: int
    collectives: int


def llama(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Llama(options.blocks, options.width), torch.randint(1, 4096, (options.batch, options.sequence))


def of_llama(name: str, layers: int, model: nn.Module) -> dict[str, Spec]:
    """What a recipe asks of a Llama."""
    split: Where = "dp" if name == "fully sharded" else None
    asked: dict[str, Spec] = {path: (split, *(None,) * (one.dim() - 1)) for path, one in model.named_parameters()}
    rows = {f"whole.model.layers.{layer}": ("dp", None, None) for layer in range(layers)}
    return asked | rows | {"whole.lm_head": ("dp", None, None), "whole.model.embed_tokens": ("dp", None, None)}


def everybody(options: argparse.Namespace, devices: DeviceMesh) -> dict[str, tuple[nn.Module, Tensor]]:
    """All models, by the name of their plan or peer, each with its input on this rank."""
    from shardc import shard
    from shardc.cost import calibrate
    from shardc.runtime import DistributedMesh, local_mesh

    mesh = local_mesh(calibrate.layout_of_processes())
    assert isinstance(mesh, DistributedMesh)
    device = calibrate.calibrate(mesh, "this machine").device

    made: Made = partial(llama, options) if options.llama else fresh
    pairs = {plan: peer for plan, peer in PAIRS.items() if not (options.llama and peer == "TP")}
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for recipe in (recipe for recipe in RECIPES if recipe.name in pairs):
        model, x = made()
        asked = dict(recipe.constraints)
        if asked and options.llama:
            asked = of_llama(recipe.name, options.blocks, model)
        elif asked:
            asked |= {f"blocks.{block}": asked["blocks.0"] for block in range(options.blocks)}
        if recipe.name == "tensor":  # else it gathers weights, and splits the batch within a block
            asked |= {f"blocks.*.{name}": (None, None, "tp") for name in ("q", "k", "v", "up")}
            asked |= {f"blocks.*.{name}": (None, None, None) for name in ("norm1", "norm2", "proj", "down")}
        found[recipe.name] = shard(model, mesh=recipe.mesh, constraints=asked, hardware=device), x
    for peer in (peer for peer in peers.PEERS if peer.name in pairs.values()):
        model, x = made()
        found[peer.name] = peer.apply(model, devices), peer.share(x, devices)
    return found


def step(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(x)
    loss.backward()
    return loss


def measured(running: Mapping[str, tuple[nn.Module, Tensor]], rounds: int, steps: int) -> dict[str, Measured]:
    """What a step takes and runs, of each; they take turns of `steps`."""
    from checks.operators_run import COPY, operators_run

    cpu, wall = Counter[str](), Counter[str]()
    for _ in range(rounds):
        for name, (model, x) in running.items():
            dist.barrier()
            start, clock = time.process_time(), time.perf_counter()
            for _ in range(steps):
                step(model, x)
            cpu[name] += time.process_time() - start  # type: ignore[assignment]
            dist.barrier()
            wall[name] += time.perf_counter() - clock  # type: ignore[assignment]
    found: dict[str, Measured] = {}
    for name, (model, x) in running.items():
        seconds = torch.tensor([cpu[name]]) / (rounds * steps)
        dist.all_reduce(seconds)
        dist.barrier()
        kernels, collectives = Counter[str](), Counter[str]()
        if dist.get_rank() == 0:
            kernels, collectives = operators_run(partial(step, model, x))
        else:
            step(model, x)
        one = Measured(
            seconds.item(), wall[name] / (rounds * steps), kernels.total(), kernels[COPY], collectives.total()
        )
        found[name] = one
    return found


def table(found: Mapping[str, Measured]) -> list[str]:
    """Lines of Markdown: every plan of shardc beside its peer."""
    lines = [
        "| shardc's plan | beside | CPU-seconds | of the peer's | wall s | of the peer's | kernels, copies | peer's | "
        "collectives | peer's |",
        "| --- " * 10 + "|",
    ]
    for plan, peer in PAIRS.items():
        if plan in found and peer in found:
            a, b = found[plan], found[peer]
            lines.append(
                f"| {plan} | {peer} | {a.cpu:.3f} | {a.cpu / b.cpu:.2f} | {a.wall:.3f} | {a.wall / b.wall:.2f} | "
                f"{a.kernels}, {a.copies} | {b.kernels}, {b.copies} | {a.collectives} | {b.collectives} |"
            )
    return lines


def work(options: argparse.Namespace) -> None:
    """On every rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    devices = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=peers.AXES)
    running = everybody(options, devices)
    if options.llama:
        for model, x in running.values():
            step(model, x)
    else:
        expected, batch = fresh()
        loss = step(expected, batch)
        for name, (model, x) in running.items():
            peers.check(name, model, step(model, x), expected, loss)
    for model, x in running.values():
        step(model, x)
    found = measured(running, options.rounds, options.steps)
    if dist.get_rank() == 0:
        print(f"{machine()}; load {os.getloadavg()[0]:.0f}\n", *table(found), sep="\n", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="The same program by shardc and by torch.")
    parser.add_argument("--llama", action="store_true", help="a Llama of transformers instead of the transformer")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences, of all ranks")
    parser.add_argument("--sequence", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    options = parser.parse_args()
    if "RANK" in os.environ:
        network.WIDTH, network.BLOCKS = options.width, options.blocks
        network.BATCH, network.SEQUENCE = options.batch, options.sequence
        work(options)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([*torchrun, __file__, *sys.argv[1:]], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
