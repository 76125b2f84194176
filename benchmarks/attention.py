"""The variants of attention: what memory they take, which of them wins where, and how well their time is predicted.

    python benchmarks/attention.py memory                        # 4 k to 64 k positions on a virtual mesh; minutes
    python benchmarks/attention.py memory --lengths 4096 8192
    python benchmarks/attention.py choice                        # a minute: heads, lengths and links, by the cost model
    python benchmarks/attention.py balance                       # a minute: causal work in blocks and folded
    sudo .venv/bin/python benchmarks/attention.py network        # two hosts of two processes, at 100 and 400 Mbit/s

Attention stands between operators that work on split sequences, and its variant is the only thing that differs: keys
gathered, a ring, heads split (Ulysses), a ring over one axis and heads over the other (USP). `memory` compares the peak
that a plan predicts with what a rank allocates. `network` calibrates the network of network.py and compares orders.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compile import machine
from network import at_rates, ranks_of, step
from torch import Tensor, nn

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import shardc  # noqa: E402
from checks import forced, meter  # noqa: E402  (found by the line above)
from shardc.cost.hardware import Hardware, hardware  # noqa: E402
from shardc.rules.families import attention_workspace  # noqa: E402
from shardc.runtime.kernels.attention.blocks import attend  # noqa: E402
from shardc.runtime.kernels.attention.pieces import Literals  # noqa: E402
from shardc.runtime.mesh.bands import pairs, runs_of_parts, visits  # noqa: E402

LENGTHS = (4096, 8192, 16384, 32768, 65536)
TWO = ("a", "b")
VARIANTS: dict[str, forced.Accepts] = {
    "gathered": forced.gathered(*TWO),
    "ring": forced.ring(*TWO),
    "ulysses": forced.ulysses(*TWO),
    "ring over a, heads over b": forced.hybrid("a", "b"),
    "heads over a, ring over b": forced.hybrid("b", "a"),
}


class Attending(nn.Module):
    """Attention of one batch between split sequences, with as many queries as `heads` and fewer heads of keys."""

    def __init__(self, heads: int, kv_heads: int, length: int, width: int, axes: tuple[str, ...], causal: bool) -> None:
        super().__init__()
        shared = (kv_heads, heads // kv_heads) if heads > kv_heads else (heads,)
        self.q = nn.Parameter(torch.randn(length, *shared, width))  # a rank's part is a view, on a virtual mesh too
        self.k, self.v = (nn.Parameter(torch.randn(length, kv_heads, width)) for _ in "kv")
        self.axes, self.literals = axes, (causal, width**-0.5, 0, 0.0, 0.0)

    def split(self, x: Tensor) -> Tensor:
        return shardc.constrain(x, (*[None] * (x.dim() - 2), self.axes, None))

    def forward(self) -> Tensor:
        q, k, v = (self.split((x * 1.5).movedim(0, -2)[None]) for x in (self.q, self.k, self.v))
        out, _ = torch.ops.shardc.attention(q, k, v, None, None, None, *self.literals)
        return self.split(out).square().mean()

    @property
    def weights(self) -> Mapping[str, Any]:
        """The constraints on the parameters: split along the sequence."""
        return {name: (self.axes, *[None] * (p.dim() - 1)) for name, p in self.named_parameters()}


def planned(model: Attending, mesh: str, accepts: forced.Accepts | None, device: str | Hardware) -> shardc.Compiled:
    """Compiled, with a variant or, for None, with that which the solver chooses."""
    with forced.attention(accepts) if accepts else nullcontext():
        return shardc.compile(model, mesh, (), constraints=model.weights, hardware=device)


# memory


def memory(lengths: list[int]) -> None:
    """Peaks of a rank, predicted and measured, of forward alone and of forward and backward."""
    print("| variant | length | forward: predicted MiB | measured | step: predicted MiB | measured |")
    print("| --- " * 6 + "|")
    for name, accepts in VARIANTS.items():
        for length in lengths:
            cells = [name, f"{length}"]
            for trains in (False, True):
                predicted, least, most = (one / 2**20 for one in peaks(length, accepts, trains))
                cells += [f"{predicted:.2f}", f"{least:.2f}" + (f" – {most:.2f}" if most > least * 1.001 else "")]
            print(f"| {' | '.join(cells)} |", flush=True)


def peaks(length: int, accepts: forced.Accepts, trains: bool) -> tuple[float, float, float]:
    """The most bytes that a rank holds in a step, without the optimizer's state: predicted, and measured on the rank
    that holds least and on that which holds most. They differ by what one looks at of others in a collective, and by
    what a causal mask leaves to do. Buffers inside the CPU's kernel are left out, since the meter does not see them.
    """
    model = Attending(4, 4, length, 16, TWO, True)
    with torch.set_grad_enabled(trains), mock.patch.object(attention_workspace, "inside_kernel", lambda *_: []):
        compiled = planned(model, "a=2,b=2", accepts, "cpu")
        meters = meter.metered(compiled.executable.module)
        loss = compiled()
        if trains:
            loss.backward()
    predicted = compiled.plan.memory
    return predicted.peak - predicted.parts.get("optimizer state", 0.0), *_span(one.peak for one in meters.values())


def _span(values: Iterable[float]) -> tuple[float, float]:
    least, *_, most = sorted(values)
    return least, most


# choice


def choice() -> None:
    """What the solver chooses, and how much slower a step is with each other variant."""
    print(f"| device | mesh | causal | heads | of keys | length | chosen | predicted | {' | '.join(VARIANTS)} |")
    print("| --- " * (8 + len(VARIANTS)) + "|")
    places = (("h100", "a=2,b=2"), ("h100", "a=4,b=8"), ("ethernet", "a=4,b=8"))
    grid = itertools.product(places, (False, True), ((32, 32), (32, 8), (32, 2)), (8192, 32768, 131072))
    for (device, mesh), causal, heads, length in grid:
        with torch.device("meta"):
            model = Attending(*heads, length, 128, TWO, causal).to(torch.bfloat16)
        there = slow() if device == "ethernet" else hardware(device)
        plan = planned(model, mesh, None, there).plan
        cells = [device, mesh, causal, *heads, length, strategy(plan), f"{plan.predicted * 1e3:.2f} ms"]
        for accepts in VARIANTS.values():
            try:
                cells.append(f"{planned(model, mesh, accepts, there).plan.predicted / plan.predicted:.2f}")
            except shardc.ShardcError:  # fewer heads than ranks
                cells.append("–")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def strategy(plan: shardc.Plan) -> str:
    """What the axes do in attention's forward."""
    return plan.why("getitem").strategy


def slow() -> Hardware:
    """An H100 whose links between nodes carry 100 Gbit/s, four devices a node."""
    h100 = hardware("h100")
    return replace(h100, devices_per_node=4, between=replace(h100.between, bandwidth=12.5e9))


# balance


def balance() -> None:
    """The causal work of the rank that has most, folded over blocks: of pairs by count, and of kernels in CPU-seconds.
    The limit is n / (2n - 1): in blocks the last rank has 2n - 1 of the n * n blocks' halves, folded every rank n."""
    torch.set_num_threads(1)  # threads that wait for each other would count
    print("| ranks | keys gathered | ring | n / (2n - 1) | measured, 4096 positions |")
    print("| --- " * 5 + "|")
    for ranks in (2, 4, 8, 16, 32, 64):
        gathered, rings = ([found(split, ranks) for split in ("a~folded", "a")] for found in (most_pairs, ring_pairs))
        clock = [slowest(split, ranks, 4096) for split in ("a~folded", "a")] if ranks <= 8 else []
        cells = [gathered[0] / gathered[1], rings[0] / rings[1], ranks / (2 * ranks - 1)]
        cells += [clock[0] / clock[1]] if clock else []
        print(f"| {ranks} | {' | '.join(f'{cell:.3f}' for cell in cells)}{'' if clock else ' | –'} |", flush=True)


def most_pairs(split: str, ranks: int, length: int = 1 << 16) -> int:
    """Pairs of queries and keys of the rank that computes most of them, where every rank has all keys."""
    return max(pairs(rows, ((0, length),), True, 0) for rows in runs_of_parts(length, (split,), (ranks,)))


def ring_pairs(split: str, ranks: int, length: int = 1 << 16) -> int:
    """The same over the steps of a ring, in each of which all wait for the rank that computes most."""
    parts = runs_of_parts(length, (split,), (ranks,))
    return sum(visit.pairs for visit in visits(parts, parts, (ranks,), True, 0))


def slowest(split: str, ranks: int, length: int) -> float:
    """CPU-seconds of the rank that takes longest for its queries and all keys, the least of three."""
    k, v = torch.randn(2, 1, 4, length, 64).unbind(0)
    literals, seconds = Literals(True, 0.125, 0, 0.0, 0.0), list[float]()
    for rows in runs_of_parts(length, (split,), (ranks,)):
        q, times = torch.randn(1, 4, 1, length // ranks, 64), list[float]()
        for _ in range(3):
            start = time.process_time()
            attend(q, k, v, None, literals, rows, ((0, length),))
            times.append(time.process_time() - start)
        seconds.append(min(times))
    return max(seconds)


# the emulated network


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    heads: int
    kv_heads: int
    length: int
    causal: bool


CASES = (Case(8, 8, 2048, True), Case(8, 1, 2048, True), Case(8, 8, 2048, False), Case(8, 1, 2048, False))
NETWORKED = {**VARIANTS, "chosen": None}


def ranks_work(options: argparse.Namespace) -> None:
    """On every rank: calibrate, then plan, check and measure every variant of every case."""
    from shardc.cost import calibrate
    from shardc.runtime import DistributedMesh, local_mesh

    mesh = local_mesh(calibrate.layout_of_processes())
    assert isinstance(mesh, DistributedMesh)
    device = calibrate.calibrate(mesh, "network").device
    lines: list[str] = []
    for case in CASES:
        torch.manual_seed(0)
        alone = Attending(case.heads, case.kv_heads, case.length, 32, TWO, case.causal)
        running: dict[str, nn.Module] = {}
        for name, accepts in NETWORKED.items():
            model = copy.deepcopy(alone)
            with forced.attention(accepts) if accepts else nullcontext():
                try:
                    running[name] = shardc.shard(model, mesh="a=2,b=2", constraints=model.weights, hardware=device)
                    running[name]()  # plans it
                except shardc.ShardcError:  # fewer heads of keys than ranks
                    running.pop(name, None)
        seconds = measured(alone, running, options.steps)
        lines += table(case, {name: (one.plan, seconds[name]) for name, one in running.items()})  # type: ignore[misc]
    if mesh.rank == 0:
        options.work.write_text("\n".join(lines))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(alone: Attending, running: Mapping[str, nn.Module], steps: int) -> dict[str, float]:
    """Median seconds of a step on the slowest rank. All take turns; the first step of each is checked."""
    expected = alone()
    expected.backward()
    for model in running.values():
        loss = step(model)[1]
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    times = torch.tensor([[step(model)[0] for model in running.values()] for _ in range(steps)])
    torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    return dict(zip(running, times.median(0).values.tolist(), strict=True))


def table(case: Case, found: Mapping[str, tuple[shardc.Plan, float]]) -> list[str]:
    """Lines of Markdown, the fastest by the clock first, and Spearman's correlation of the ranks."""
    lines = [str(case), "", "| variant | predicted s | measured s | predicted / measured | sent between hosts |"]
    lines.append("| --- " * 5 + "|")
    for name, (plan, seconds) in sorted(found.items(), key=lambda item: item[1][1]):
        label = f"chosen: {strategy(plan)}" if name == "chosen" else name
        sent = f"{plan.bytes_per_axis.get('a', 0.0) / 1e6:.2f} MB"
        lines.append(f"| {label} | {plan.predicted:.4f} | {seconds:.4f} | {plan.predicted / seconds:.2f} | {sent} |")
    forced_ones = [one for name, one in found.items() if name != "chosen"]
    orders = [ranks_of([plan.predicted for plan, _ in forced_ones]), ranks_of([seconds for _, seconds in forced_ones])]
    return [*lines, "", f"Spearman correlation {statistics.correlation(*orders):.2f}.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="The variants of attention: memory, choice, time.")
    parser.add_argument("part", choices=("memory", "choice", "balance", "network"))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="positions, for memory")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 400.0], help="Mbit/s between the hosts")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each, after two that are not")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one rate")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        ranks_work(options)
        return
    print(f"Machine: {machine()}\n")
    if options.part == "memory":
        memory(options.lengths)
    elif options.part == "choice":
        choice()
    elif options.part == "balance":
        balance()
    else:
        at_rates(__file__, options)


if __name__ == "__main__":
    main()
