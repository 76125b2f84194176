"""How well the cost model predicts: seconds of a step, predicted and measured, for many plans of one transformer.

    sudo .venv/bin/python benchmarks/network.py                    # two hosts of two processes, at 100 and 400 Mbit/s
    sudo .venv/bin/python benchmarks/network.py --rates 50 --steps 3

The hosts are network namespaces of this machine, joined by a link whose rate is limited in both directions (tc's token
buckets); processes talk over gloo. On that network `shardc calibrate` measures a hardware file, and with it shardc
plans the same model under different constraints (data, fully sharded, tensor and sequence parallel, mixes of them on
two axes, and without any). Nothing else is fitted. Needs Linux, root and iproute2; no packet leaves the namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH, HEADS, BLOCKS, BATCH, SEQUENCE = 256, 4, 2, 8, 128
HOSTS, RANKS = 2, 2
PREFIX, NETWORK = "shardc-bench", "10.199.0"
Spec = tuple[object, ...]


@dataclass(frozen=True)
class Recipe:
    """A named set of constraints on a mesh."""

    name: str
    mesh: str
    constraints: Mapping[str, Spec]


def weights(columns: Spec, rows: Spec) -> dict[str, Spec]:
    """The weights that a block's first products use, and those of the second ones."""
    named = {f"*.{name}.weight": columns for name in ("q", "k", "v", "up")}
    return named | {f"*.{name}.weight": rows for name in ("proj", "down")}


def outputs(*spec: object) -> dict[str, Spec]:
    """What every block gives: its batch, sequence and width."""
    return {f"blocks.{block}": spec for block in range(BLOCKS)}


WHOLE, MEGATRON = weights((None, None), (None, None)), weights(("tp", None), (None, "tp"))
RECIPES = (
    Recipe("data parallel", "dp=4", WHOLE | outputs("dp", None, None)),
    Recipe("fully sharded", "dp=4", weights(("dp", None), ("dp", None)) | outputs("dp", None, None)),
    Recipe("tensor", "tp=4", MEGATRON | outputs(None, None, None)),
    Recipe("tensor + sequence", "tp=4", MEGATRON | outputs(None, "tp", None)),
    Recipe("data x tensor", "dp=2,tp=2", MEGATRON | outputs("dp", None, None)),
    Recipe("data x tensor + sequence", "dp=2,tp=2", MEGATRON | outputs("dp", "tp", None)),
    Recipe("tensor x data", "tp=2,dp=2", MEGATRON | outputs("dp", None, None)),
    Recipe("fully sharded x tensor", "dp=2,tp=2", weights(("tp", "dp"), ("dp", "tp")) | outputs("dp", None, None)),
    Recipe("sharded in hosts", "dp=2,fs=2", weights(("fs", None), ("fs", None)) | outputs(("dp", "fs"), None, None)),
    Recipe("sequence alone", "sp=4", WHOLE | outputs(None, "sp", None)),
    Recipe("free, one axis", "a=4", {}),
    Recipe("free, two axes", "a=2,b=2", {}),
)


@dataclass(frozen=True)
class Result:
    """Seconds of a step, predicted and measured, and the part of the prediction that is compute."""

    name: str
    mesh: str
    predicted: float
    compute: float
    measured: float


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Blocks and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def work(recipes: list[str], hardware: str, steps: int, out: Path) -> None:
    """On every rank: calibrate, then plan and measure each recipe."""
    from shardc import shard
    from shardc.cost import calibrate
    from shardc.runtime import DistributedMesh, local_mesh

    mesh = local_mesh(calibrate.layout_of_processes())
    assert isinstance(mesh, DistributedMesh)
    measured = calibrate.calibrate(mesh, Path(hardware).stem)
    if mesh.rank == 0:
        Path(hardware).write_text(calibrate.toml(measured))
        print(calibrate.table(measured), flush=True)
    results: list[Result] = []
    for recipe in RECIPES:
        if recipes and recipe.name not in recipes:
            continue
        torch.manual_seed(0)
        model = shard(Transformer(), mesh=recipe.mesh, constraints=recipe.constraints, hardware=measured.device)
        x = torch.randn(BATCH, SEQUENCE, WIDTH)
        times = [step(model, x) for _ in range(steps + 2)][2:]
        slowest = torch.tensor(times)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        plan = model.plan
        results.append(
            Result(recipe.name, recipe.mesh, plan.predicted, plan.compute, statistics.median(slowest.tolist()))
        )
        if mesh.rank == 0:
            print(results[-1], flush=True)
            out.write_text(json.dumps([asdict(result) for result in results]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def step(model: nn.Module, x: Tensor) -> float:
    """Seconds of forward and backward, started together."""
    model.zero_grad(set_to_none=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    start = time.perf_counter()
    model(x).backward()
    return time.perf_counter() - start


def command(*words: object, check: bool = True) -> None:
    subprocess.run([str(word) for word in words], check=check, capture_output=not check)


@contextmanager
def hosts(rate: float) -> Iterator[None]:
    """Two namespaces, and a link between them that carries `rate` Mbit/s each way."""
    names = [f"{PREFIX}-{host}" for host in range(HOSTS)]
    burst = max(16384, int(rate * 125))  # bytes: a millisecond, and one large packet at least
    try:
        for name in names:
            command("ip", "netns", "add", name)
        command("ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
        for host, name in enumerate(names):
            command("ip", "-n", name, "addr", "add", f"{NETWORK}.{host + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                command("ip", "-n", name, "link", "set", device, "up")
            limit = ("rate", f"{rate:g}mbit", "burst", burst, "limit", 2**25)
            command("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)
        yield
    finally:
        for name in names:
            command("ip", "netns", "del", name, check=False)


def measure(rate: float, options: argparse.Namespace, folder: Path) -> list[Result]:
    """Calibrate and run all recipes at one rate."""
    out, port = folder / f"{rate:g}.json", 29731
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    own = [str(Path(__file__).resolve()), "--work", str(out), "--hardware", str(folder / f"net{rate:g}.toml")]
    own += ["--steps", str(options.steps), *(f"--recipe={name}" for name in options.recipe)]
    with hosts(rate):
        running: list[subprocess.Popen[bytes]] = []
        for host in range(HOSTS):
            torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={HOSTS}", f"--node-rank={host}"]
            torchrun += [f"--nproc-per-node={RANKS}", f"--master-addr={NETWORK}.1", f"--master-port={port}"]
            inside = ["ip", "netns", "exec", f"{PREFIX}-{host}", *torchrun, *own]
            running.append(subprocess.Popen(inside, env=environment))
        try:
            codes = [process.wait(options.timeout) for process in running]
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if any(codes):
        sys.exit(f"a host failed: exit codes {codes}")
    return [Result(**one) for one in json.loads(out.read_text())]


def ranks_of(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    for place, index in enumerate(order):
        found[index] = float(place)
    return found


def report(rate: float, results: list[Result]) -> str:
    """A Markdown table, Spearman's correlation of the ranks, and the median error."""
    lines = [
        f"{rate:g} Mbit/s between hosts", "",
        "| plan | mesh | predicted s | of it compute | measured s | predicted / measured |", "| --- " * 6 + "|",
    ]  # fmt: skip
    for one in sorted(results, key=lambda one: one.measured):
        ratio = one.predicted / one.measured
        lines.append(
            f"| {one.name} | {one.mesh} | {one.predicted:.3f} | {one.compute:.3f} | {one.measured:.3f} | {ratio:.2f} |"
        )
    predicted, measured = [one.predicted for one in results], [one.measured for one in results]
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    spearman = statistics.correlation(ranks_of(predicted), ranks_of(measured))
    lines += ["", f"Spearman correlation {spearman:.2f}, median error {statistics.median(errors):.0%}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured seconds of a step, over limited links.")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 400.0], help="Mbit/s between the hosts")
    parser.add_argument("--steps", type=int, default=7, help="measured steps a plan, after two that are not")
    parser.add_argument("--recipe", action="append", default=[], help="only this plan (may be repeated)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one rate")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hardware", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.recipe, options.hardware, options.steps, options.work)
        return
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: run this with sudo")
    with tempfile.TemporaryDirectory() as folder:
        found = {rate: measure(rate, options, Path(folder)) for rate in options.rates}
    print("\n\n".join(report(rate, results) for rate, results in found.items()))


if __name__ == "__main__":
    main()
