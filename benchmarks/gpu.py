"""What one GPU says about shardc, in about twelve minutes.

    python benchmarks/gpu.py                                       # all sections, each as far as its seconds reach
    python benchmarks/gpu.py --only step attention --seconds 120
    python benchmarks/gpu.py --device cpu --seconds 20             # tries the script itself, on small sizes

values       the tests of tests/gpu and a sample of torch's operator database, on virtual meshes of parts of the GPU
calibrate    what `shardc calibrate` measures of it, as a hardware file
step         six models on a mesh of one: a training step beside the plain module's, beside what is predicted with the
             calibrated hardware, and the planned peak beside what was allocated; then the same compiled
overhead     a call of small models, where it is nearly all of the time
attention    4 k to 64 k positions: forward and backward on a mesh of one and on parts, beside torch's own

Times are medians of single steps, taken in turn with what they are compared with. Everything is printed as it is known,
so that a run that is cut has what came before.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compile import machine
from torch import Tensor, nn

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved
warnings.filterwarnings("ignore")

import shardc  # noqa: E402  (reads the environment)

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("values", "calibrate", "step", "overhead", "attention")
Case = tuple[Callable[[], nn.Module], Callable[[torch.device], dict[str, Tensor]]]


def words(vocabulary: int, batch: int, length: int, labels: bool = True) -> Callable[[torch.device], dict[str, Tensor]]:
    """Inputs of a language model."""

    def made(device: torch.device) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
        return {"input_ids": ids, **({"labels": ids} if labels else {})}

    return made


def pictures(batch: int, side: int, classes: int) -> Callable[[torch.device], dict[str, Tensor]]:
    """Inputs of a classifier of pictures."""

    def made(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(batch, 3, side, side, generator=generator).to(device, torch.bfloat16)
        return {"pixel_values": values, "labels": torch.randint(0, classes, (batch,), generator=generator).to(device)}

    return made


def models(small: bool) -> dict[str, Case]:
    """Six models, sized to fill a large GPU for some tens of milliseconds; or small ones of the same kinds."""
    import transformers as t

    width, layers, batch, length = (64, 1, 2, 32) if small else (2048, 8, 4, 2048)
    common = dict(num_hidden_layers=layers, num_attention_heads=max(2, width // 64), vocab_size=32000)
    gqa = dict(common, num_key_value_heads=max(1, width // 256), use_cache=False)
    narrow = 64 if small else 1024
    encoder = dict(
        hidden_size=narrow, num_attention_heads=narrow // 32, intermediate_size=4 * narrow, num_hidden_layers=layers
    )
    return {
        "Llama": (
            lambda: t.LlamaForCausalLM(t.LlamaConfig(hidden_size=width, intermediate_size=7 * width // 2, **gqa)),
            words(32000, batch, length),
        ),
        "Gemma-2": (
            lambda: t.Gemma2ForCausalLM(
                t.Gemma2Config(
                    hidden_size=width, intermediate_size=4 * width, head_dim=64, sliding_window=length // 2, **gqa
                )
            ),
            words(32000, batch, length),
        ),
        "Mixtral": (
            lambda: t.MixtralForCausalLM(
                t.MixtralConfig(hidden_size=narrow, intermediate_size=3 * narrow, num_local_experts=8, **gqa)
            ),
            words(32000, batch, length),
        ),
        "GPT-2, dropout": (
            lambda: t.GPT2LMHeadModel(
                t.GPT2Config(
                    n_embd=narrow, n_layer=layers, n_head=max(2, narrow // 64), n_positions=1024, use_cache=False
                )
            ),
            words(32000, 2 * batch, min(length, 1024)),
        ),
        "ViT": (
            lambda: t.ViTForImageClassification(t.ViTConfig(**encoder, num_labels=1000, image_size=224)),
            pictures(4 if small else 64, 224, 1000),
        ),
        "ResNet-50": (
            lambda: t.ResNetForImageClassification(t.ResNetConfig(num_labels=1000)),
            pictures(2 if small else 64, 64 if small else 224, 1000),
        ),
    }


class Device:
    """Where things run; times and memory there."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def medians(self, calls: list[Callable[[], object]], rounds: int) -> list[float]:
        """The median milliseconds of each of several calls, taken in turn."""
        for call in calls * 3:
            call()
        times = [[self.time(call) for call in calls] for _ in range(rounds)]
        return [statistics.median(column) for column in zip(*times, strict=True)]

    def peak(self, call: Callable[[], object]) -> float:
        """Bytes allocated at most during a call; nan where nobody counts them."""
        if not self.cuda:
            return float("nan")
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return float(torch.cuda.max_memory_allocated())


def step(model: Callable[..., Any], batch: dict[str, Tensor], parameters: list[nn.Parameter]) -> Callable[[], None]:
    """A training step without its optimizer."""

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        out = model(**batch)
        (out.loss if hasattr(out, "loss") else out).backward()

    return run


def values(on: Device, _: str, deadline: float) -> Iterator[str]:
    """The tests, and operators of torch's database."""
    environment = {**os.environ, "SHARDC_TEST_DEVICE": on.device.type, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "tests/gpu"]
    left = max(deadline - time.monotonic(), 1.0)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired as cut:
        shown = cut.stdout.decode() if isinstance(cut.stdout, bytes) else cut.stdout or ""
        yield f"cut after {left:.0f} s: {shown.splitlines()[-1:]}"
        return
    yield from (line for line in done.stdout.splitlines() if line.startswith("FAILED") or " passed" in line)


def calibrate(_: Device, kept: str, deadline: float) -> Iterator[str]:
    """The numbers of this device, written to a file that the later sections plan with."""
    command = [sys.executable, "-m", "shardc.cli", "calibrate", kept, "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    left = max(deadline - time.monotonic(), 1.0)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
    yield Path(kept).read_text() if Path(kept).exists() else done.stderr[-2000:]


def steps(on: Device, hardware: str, deadline: float) -> Iterator[str]:
    """A row a model, eager and then compiled."""
    yield "| model | run | plain, ms | sharded / plain | predicted / sharded | planned / allocated |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for compiled in (False, True):
        for name, case in models(not on.cuda).items():
            if time.monotonic() > deadline:
                yield f"| {name} | no time left |"
                continue
            try:
                yield f"| {name} | {'compiled' if compiled else 'eager'} | {_step(on, case, hardware, compiled)} |"
            except Exception as error:  # the next model may do better
                yield f"| {name} | {type(error).__name__}: {str(error)[:200]} |"


def _step(on: Device, case: Case, hardware: str, compiled: bool) -> str:
    make, batch = case[0], case[1](on.device)
    torch.manual_seed(0)
    plain = make().to(on.device, torch.bfloat16)
    options: dict[str, Any] = {"compile": "inductor"} if compiled else {}
    sharded = shardc.shard(copy.deepcopy(plain), mesh="dp=1", hardware=hardware, memory="unbounded", **options)
    called: Callable[..., Any] = torch.compile(plain) if compiled else plain
    runs = [step(each, batch, [*whose.parameters()]) for each, whose in ((called, plain), (sharded, sharded))]
    theirs, ours = on.medians(runs, 20 if on.cuda else 3)  # type: ignore[arg-type]
    plan = sharded.plan
    for p in plain.parameters():
        p.grad = None
    rest = sum(p.nbytes for p in plain.parameters())
    allocated = on.peak(runs[1]) - rest
    predicted = plan.predicted * 1e3
    return f"{theirs:.1f} | {ours / theirs:.3f} | {predicted / ours:.3f} | {plan.memory.peak / allocated:.3f}"


class Two(nn.Module):
    """Two small layers: a call is all overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).sum()


def overhead(on: Device, hardware: str, deadline: float) -> Iterator[str]:
    """Small models, forward and backward."""
    yield "| model | plain, ms | sharded / plain | difference, ms |\n| --- | --- | --- | --- |"
    llama, words_of = models(small=True)["Llama"]
    x = torch.randn(8, 64, device=on.device)
    cases: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        "two linear layers of 64": (Two(), {"x": x}),
        "a small Llama": (llama(), words_of(on.device)),
    }
    for name, (model, batch) in cases.items():
        if time.monotonic() < deadline:
            plain = model.to(on.device)
            sharded = shardc.shard(copy.deepcopy(plain), mesh="dp=1", hardware=hardware)
            runs = [step(each, batch, [*each.parameters()]) for each in (plain, sharded)]
            theirs, ours = on.medians(runs, 100 if on.cuda else 10)  # type: ignore[arg-type]
            yield f"| {name} | {theirs:.2f} | {ours / theirs:.3f} | {ours - theirs:+.2f} |"


class Attending(nn.Module):
    """Causal attention of 16 heads, of which two share keys."""

    def __init__(self, length: int, device: torch.device) -> None:
        super().__init__()
        make: Callable[[int], nn.Parameter] = lambda heads: nn.Parameter(  # noqa: E731  (three of a kind)
            torch.randn(1, heads, length, 128, device=device, dtype=torch.bfloat16)
        )
        self.q, self.k, self.v = make(16), make(8), make(8)

    def forward(self, scale: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(self.q * scale, self.k, self.v, is_causal=True, enable_gqa=True)
        return out.float().square().mean()


def attention(on: Device, hardware: str, deadline: float) -> Iterator[str]:
    """A row a length and mesh."""
    yield "| positions | mesh | torch, ms | sharded / torch | planned / allocated |\n| --- | --- | --- | --- | --- |"
    for length in (4096, 8192, 16384, 32768, 65536) if on.cuda else (256,):
        for mesh in ("cp=1", "cp=2", "cp=4"):
            if time.monotonic() > deadline:
                return
            plain, batch = (
                Attending(length, on.device),
                {"scale": torch.ones((), device=on.device, dtype=torch.bfloat16)},
            )
            sharded = shardc.shard(
                copy.deepcopy(plain), mesh=mesh, hardware=hardware, memory="unbounded",
                constraints={"q": (None, None, "cp", None)} if mesh != "cp=1" else {},
            )  # fmt: skip
            runs = [step(each, batch, [*each.parameters()]) for each in (plain, sharded)]
            theirs, ours = on.medians(runs, 10 if on.cuda else 2)  # type: ignore[arg-type]
            rest = sum(p.nbytes for p in plain.parameters()) * 2  # with their gradients
            planned = sharded.plan.memory.peak * sharded.plan.mesh.size
            allocated = on.peak(runs[1]) - rest
            yield f"| {length} | {mesh} | {theirs:.2f} | {ours / theirs:.3f} | {planned / allocated:.3f} |"


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description="what one GPU says about shardc")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--seconds", type=float, default=140, help="for each section")
    parser.add_argument("--hardware", default="measured.toml", help="the file that calibrate writes and others read")
    asked = parser.parse_args()
    on = Device(asked.device)
    print(torch.cuda.get_device_name() if on.cuda else "CPU", "|", machine(), flush=True)
    sections: dict[str, Callable[[Device, str, float], Iterator[str]]] = {
        "values": values, "calibrate": calibrate, "step": steps, "overhead": overhead, "attention": attention
    }  # fmt: skip
    for name in asked.only:
        print(f"\n## {name}\n", flush=True)
        kept = Path(asked.hardware).resolve()
        hardware = str(kept) if kept.exists() or name == "calibrate" else ("h200" if on.cuda else "cpu")
        for line in sections[name](on, hardware, time.monotonic() + asked.seconds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
