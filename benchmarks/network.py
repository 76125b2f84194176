"""How well the cost model predicts: seconds of a step, predicted and measured, for many plans of one transformer; and
the plan that shardc picks beside torch's own recipes (peers.py), measured in the same run.

    sudo .venv/bin/python benchmarks/network.py                    # two hosts of two processes, at 100 and 400 Mbit/s
    sudo .venv/bin/python benchmarks/network.py --rates 50 --steps 3

The hosts are network namespaces of this machine, joined by a link whose rate is limited in both directions (tc's token
buckets); processes talk over gloo. On that network `shardc calibrate` measures a hardware file, and with it shardc
plans the same model under different constraints (data, fully sharded, tensor and sequence parallel, mixes of them on
two axes, and without any). Nothing else is fitted. Before a plan or a peer is timed, its loss and its gradients are
compared with those of one device; then all of them take turns, a step each. Needs Linux, root and iproute2; no packet
leaves the namespaces.
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
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import AXES, PEERS, check
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

WIDTH, HEADS, BLOCKS, BATCH, SEQUENCE = 256, 4, 2, 16, 128
HOSTS, RANKS = 2, 2
PREFIX, NETWORK = f"shardc-bench-{os.getpid()}", "10.199.0"  # what a killed run left is in nobody's way
Where = str | tuple[str, ...] | None
Spec = tuple[Where, ...]


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


def outputs(*spec: Where) -> dict[str, Spec]:
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
FREE = {recipe.name for recipe in RECIPES if not recipe.constraints}


@dataclass(frozen=True)
class Result:
    """Seconds of a step, predicted and measured, and the part of the prediction that is compute."""

    name: str
    mesh: str
    predicted: float
    compute: float
    measured: float


@dataclass
class Found:
    """What one rate gave: the plans, and the measured seconds of the peers by name."""

    plans: list[Result] = field(default_factory=list)
    peers: dict[str, float] = field(default_factory=dict)


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
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


def fresh() -> tuple[Transformer, Tensor]:
    """The model and its batch, the same on every call and every rank."""
    torch.manual_seed(0)
    return Transformer(), torch.randn(BATCH, SEQUENCE, WIDTH)


def work(wanted: list[str], hardware: str, steps: int, out: Path) -> None:
    """On every rank: calibrate, then plan and measure each recipe, then the peers."""
    from shardc import shard
    from shardc.cost import calibrate
    from shardc.runtime import DistributedMesh, local_mesh

    mesh = local_mesh(calibrate.layout_of_processes())
    assert isinstance(mesh, DistributedMesh)
    calibrated = calibrate.calibrate(mesh, Path(hardware).stem)
    if mesh.rank == 0:
        Path(hardware).write_text(calibrate.toml(calibrated))
        print(calibrate.report(calibrated), flush=True)
    running: dict[str, tuple[nn.Module, Tensor]] = {}
    for recipe in (recipe for recipe in RECIPES if recipe.name in wanted):
        model, x = fresh()
        model = shard(model, mesh=recipe.mesh, constraints=recipe.constraints, hardware=calibrated.device)
        running[recipe.name] = model, x
    devices = init_device_mesh("cpu", (HOSTS, RANKS), mesh_dim_names=AXES)
    for peer in (peer for peer in PEERS if peer.name in wanted):
        model, x = fresh()
        running[peer.name] = peer.apply(model, devices), peer.share(x, devices)
    seconds = measured(running, steps)
    found = Found(peers={peer.name: seconds[peer.name] for peer in PEERS if peer.name in running})
    for recipe in (recipe for recipe in RECIPES if recipe.name in running):
        plan: Any = running[recipe.name][0].plan
        found.plans.append(Result(recipe.name, recipe.mesh, plan.predicted, plan.compute, seconds[recipe.name]))
    if mesh.rank == 0:
        out.write_text(json.dumps(asdict(found)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(running: Mapping[str, tuple[nn.Module, Tensor]], steps: int) -> dict[str, float]:
    """Median seconds of a step on the slowest rank, after a step whose results are checked and another one. All take
    turns, so that what else the machine does meets each of them alike."""
    expected, batch = fresh()
    expected_loss = step(expected, batch)[1]
    for name, (model, x) in running.items():
        check(name, model, step(model, x)[1], expected, expected_loss)
    times = torch.tensor([[step(model, x)[0] for model, x in running.values()] for _ in range(steps + 1)][1:])
    torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    return dict(zip(running, times.median(0).values.tolist(), strict=True))


def step(model: nn.Module, *inputs: Tensor) -> tuple[float, Tensor]:
    """Seconds of forward and backward, started together; the loss."""
    model.zero_grad(set_to_none=True)
    torch.distributed.barrier()
    start = time.perf_counter()
    loss = model(*inputs)
    loss.backward()
    return time.perf_counter() - start, loss


def command(*words: object, check: bool = True) -> None:
    subprocess.run([str(word) for word in words], check=check, capture_output=not check)


@contextmanager
def hosts(rate: float) -> Generator[None]:
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


def measure(rate: float, options: argparse.Namespace, folder: Path) -> Found:
    """Calibrate and run all recipes and peers at one rate."""
    out = folder / f"{rate:g}.json"
    own = [str(Path(__file__).resolve()), "--work", str(out), "--hardware", str(folder / f"net{rate:g}.toml")]
    own += ["--steps", str(options.steps), *(f"--recipe={name}" for name in options.recipe)]
    on_hosts(rate, own, options.timeout)
    read = json.loads(out.read_text())
    return Found([Result(**one) for one in read["plans"]], read["peers"])


def on_hosts(rate: float, own: list[str], timeout: float) -> None:
    """Run a script with arguments on all ranks of the hosts, for at most `timeout` seconds. Exits if one fails."""
    port = 29731
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with hosts(rate):
        running: list[subprocess.Popen[bytes]] = []
        for host in range(HOSTS):
            torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={HOSTS}", f"--node-rank={host}"]
            torchrun += [f"--nproc-per-node={RANKS}", f"--master-addr={NETWORK}.1", f"--master-port={port}"]
            inside = ["ip", "netns", "exec", f"{PREFIX}-{host}", *torchrun, *own]
            running.append(subprocess.Popen(inside, env=environment))
        try:
            codes = [process.wait(timeout) for process in running]
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if any(codes):
        sys.exit(f"a host failed: exit codes {codes}")


def at_rates(script: str, options: argparse.Namespace) -> None:
    """Run a script's part `network` on the ranks of two hosts at every rate, and print what rank 0 writes."""
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: run this with sudo")
    with tempfile.TemporaryDirectory() as folder:
        for rate in options.rates:
            out = Path(folder) / f"{rate:g}.md"
            own = [str(Path(script).resolve()), "network", "--work", str(out), "--steps", str(options.steps)]
            on_hosts(rate, own, options.timeout)
            print(f"{rate:g} Mbit/s between hosts\n\n{out.read_text()}", flush=True)


def ranks_of(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    for place, index in enumerate(order):
        found[index] = float(place)
    return found


def table_of_plans(plans: list[Result]) -> list[str]:
    """Lines of Markdown: the plans, Spearman's correlation of the ranks, and the median error."""
    lines = [
        "| plan | mesh | predicted s | of it compute | measured s | predicted / measured |", "| --- " * 6 + "|",
    ]  # fmt: skip
    for one in sorted(plans, key=lambda one: one.measured):
        ratio = one.predicted / one.measured
        lines.append(
            f"| {one.name} | {one.mesh} | {one.predicted:.3f} | {one.compute:.3f} | {one.measured:.3f} | {ratio:.2f} |"
        )
    if len(plans) > 1:
        predicted, measured = [one.predicted for one in plans], [one.measured for one in plans]
        errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
        spearman = statistics.correlation(ranks_of(predicted), ranks_of(measured))
        lines += ["", f"Spearman correlation {spearman:.2f}, median error {statistics.median(errors):.0%}."]
    return lines


def table_of_peers(peers: Mapping[str, float], picked: Result | None) -> list[str]:
    """Lines of Markdown: the peers, and each one's time over that of the plan that shardc picks."""
    lines = ["| peer | measured s | over the picked plan's |", "| --- " * 3 + "|"]
    for name, seconds in sorted(peers.items(), key=lambda item: item[1]):
        lines.append(f"| {name} | {seconds:.3f} | {f'{seconds / picked.measured:.2f}' if picked else '–'} |")
    return lines


def verdict(picked: Result, found: Found) -> str:
    """Where the picked plan stands among all that was measured."""
    fastest = min(one.measured for one in found.plans)
    place = 1 + sum(one.measured < picked.measured for one in found.plans)
    among = f"number {place} of {len(found.plans)} plans by the clock, {picked.measured / fastest - 1:.0%} slower than"
    line = f"Picked: {picked.name}, {'the fastest plan by the clock' if place == 1 else f'{among} the fastest'}"
    if found.peers:
        best = min(found.peers, key=found.peers.__getitem__)
        line += f"; it takes {picked.measured / found.peers[best]:.2f} of the time of the best peer, {best}"
    return f"{line}."


def report(rate: float, found: Found) -> str:
    """Markdown: the plans, the peers, and how the plan that shardc predicts to be fastest where it is free compares."""
    picked = min((one for one in found.plans if one.name in FREE), key=lambda one: one.predicted, default=None)
    parts = [[f"{rate:g} Mbit/s between hosts"]]
    parts += [table_of_plans(found.plans)] if found.plans else []
    parts += [table_of_peers(found.peers, picked)] if found.peers else []
    parts += [[verdict(picked, found)]] if picked else []
    return "\n\n".join("\n".join(lines) for lines in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured seconds of a step, over limited links.")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 400.0], help="Mbit/s between the hosts")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each, after two that are not")
    names = [one.name for one in (*RECIPES, *PEERS)]
    parser.add_argument("--recipe", action="append", choices=names, help="only this plan or peer (may be repeated)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one rate")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hardware", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.recipe = options.recipe or names
    if options.work is not None:
        work(options.recipe, options.hardware, options.steps, options.work)
        return
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: run this with sudo")
    with tempfile.TemporaryDirectory() as folder:
        found = {rate: measure(rate, options, Path(folder)) for rate in options.rates}
    print("\n\n".join(report(rate, one) for rate, one in found.items()))


if __name__ == "__main__":
    main()
