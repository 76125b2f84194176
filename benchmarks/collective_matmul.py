"""Rings of matrix products against plain products and collectives: what is predicted, and what the clock says.

    python benchmarks/collective_matmul.py choice                # seconds: widths and ranks, by the cost model
    sudo .venv/bin/python benchmarks/collective_matmul.py network    # two hosts of two processes, at 400 Mbit/s

A Megatron-like MLP stands between operators that work on split sequences. `plain` gathers the sequence before the first
product and reduce-scatters the second's sums; `rings` sends parts round while ranks multiply; `chosen` is what the
solver takes. `network` calibrates the network of network.py, checks values and gradients, and compares orders.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compile import machine
from network import at_rates, step
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import shardc  # noqa: E402
from checks import forced  # noqa: E402  (found by the line above)
from shardc.cost.hardware import Hardware, hardware  # noqa: E402

RINGS = ("ring_lhs", "ring_rhs", "ring_sum")
WAYS: dict[str, tuple[str, ...]] = {"plain": ("",), "rings": RINGS, "chosen": ()}
TOKENS, WIDTH = 2048, 512


class MLP(nn.Module):
    """Two products between values whose sequence is split over `axis`."""

    def __init__(self, width: int, axis: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        x = shardc.constrain(x.sin(), (self.axis, None))
        return shardc.constrain(self.down(torch.relu(self.up(x))), (self.axis, None)).square().mean()

    @property
    def weights(self) -> Mapping[str, Any]:
        """Megatron's layouts."""
        return {"up.weight": (self.axis, None), "down.weight": (None, self.axis)}


def way(name: str) -> AbstractContextManager[None]:
    """Plans with only such products."""
    return forced.products(*WAYS[name]) if WAYS[name] else nullcontext()


def choice() -> None:
    """Predicted milliseconds of a step, forward and backward."""
    print("| device | ranks | tokens | width | plain ms | rings ms | chosen ms | chosen rings |")
    print("| --- " * 8 + "|")
    h100 = hardware("h100")
    silent = replace(h100, inside=replace(h100.inside, overlap=0.0))
    for device, ranks, width in itertools.product((h100, silent), (2, 4, 8), (1024, 4096, 12288)):
        with torch.device("meta"):
            model, x = MLP(width, "tp").bfloat16(), torch.empty(8192, width, dtype=torch.bfloat16)
        plans = {name: planned(model, x, f"tp={ranks}", name, device) for name in WAYS}
        cells = [f"{one.plan.predicted * 1e3:.3f}" for one in plans.values()]
        shown = "h100" if device is h100 else "h100 without overlap"
        count = sum(plans["chosen"].code.count(f" {ring}(") for ring in RINGS)
        print(f"| {shown} | {ranks} | 8192 | {width} | {' | '.join(cells)} | {count} of 5 |", flush=True)


def planned(model: MLP, x: Tensor, mesh: str, name: str, device: Hardware) -> shardc.Compiled:
    """The model, compiled for one way."""
    with way(name):
        return shardc.compile(model, mesh, (x,), constraints=model.weights, hardware=device)


def ranks_work(options: argparse.Namespace) -> None:
    """On every rank: calibrate, then plan, check and measure every way."""
    from shardc.cost import calibrate
    from shardc.runtime import DistributedMesh, local_mesh

    mesh = local_mesh(calibrate.layout_of_processes())
    assert isinstance(mesh, DistributedMesh)
    device = calibrate.calibrate(mesh, "network").device
    torch.manual_seed(0)
    alone, x = MLP(WIDTH, "tp"), torch.randn(TOKENS, WIDTH)
    running: dict[str, nn.Module] = {}
    for name in WAYS:
        model = copy.deepcopy(alone)
        with way(name):
            running[name] = shardc.shard(model, mesh="tp=4", constraints=model.weights, hardware=device)
            running[name](x)  # plans it
    seconds = measured(alone, running, x, options.steps)
    if mesh.rank == 0:
        lines = ["| products | predicted s | measured s | predicted / measured | sent |", "| --- " * 5 + "|"]
        for name, took in sorted(seconds.items(), key=lambda item: item[1]):
            plan: Any = running[name].plan
            sent = f"{sum(plan.bytes_per_axis.values()) / 1e6:.2f} MB"
            row = (name, f"{plan.predicted:.4f}", f"{took:.4f}", f"{plan.predicted / took:.2f}", sent)
            lines.append(f"| {' | '.join(row)} |")
        options.work.write_text("\n".join(lines))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(alone: MLP, running: Mapping[str, nn.Module], x: Tensor, steps: int) -> dict[str, float]:
    """Median seconds of a step on the slowest rank. All take turns; the first step of each is checked."""
    expected = alone(x)
    expected.backward()
    for model in running.values():
        torch.testing.assert_close(step(model, x)[1].detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            right = alone.get_parameter(name.removeprefix("module.")).grad
            torch.testing.assert_close(parameter.grad.full_tensor(), right, rtol=1e-3, atol=1e-6)  # type: ignore[operator]
    times = torch.tensor([[step(model, x)[0] for model in running.values()] for _ in range(steps)])
    torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    return dict(zip(running, times.median(0).values.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Rings of matrix products: choice, time.")
    parser.add_argument("part", choices=("choice", "network"))
    parser.add_argument("--rates", type=float, nargs="+", default=[400.0], help="Mbit/s between the hosts")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each, after two that are not")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one rate")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        ranks_work(options)
        return
    print(f"Machine: {machine()}\n")
    choice() if options.part == "choice" else at_rates(__file__, options)


if __name__ == "__main__":
    main()
