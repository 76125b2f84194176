"""How long compiling takes: CPU-seconds per phase for Llama-3-8B's dims, beside AutoParallel's.

    python benchmarks/compile.py                                  # the table of README.md
    python benchmarks/compile.py --layers 8 --mesh dp=4,tp=8      # one case of your own

Every case runs in a fresh process, so nothing is warm. The models are on the meta device, in bf16, and give the loss
alone; what is traced and planned is forward and backward together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

HERE = Path(__file__).resolve().parent
SEQUENCE, BATCH, HARDWARE = 8192, 32, "h100"
MLP = 0
"""As a number of layers: one MLP block instead of a Llama."""

AUTOPARALLEL_SOURCE = "AutoParallel commit a54c252, measured on a 2-core machine with torch 2.13"
AUTOPARALLEL = {
    # layers, sizes of the mesh: CPU-seconds of trace, strategies, edge and compute costs, CBC; None: not reached
    (2, (8,)): (4.3, 1.3, 3.1, 0.6),
    (8, (8,)): (10.5, 1.3, 2.8, 1.1),
    (2, (4, 8)): (5.3, 39.0, 38.0, 24.5),
    (4, (4, 8)): (7.0, 28.0, 41.0, 166.0),
    (8, (4, 8)): (15.0, 39.0, 60.0, None),
    (MLP, (2, 2, 2)): (None, None, None, None),
}
STOPPED = "stopped at 900 s wall"


@dataclass(frozen=True)
class Case:
    """One model on one mesh."""

    layers: int
    mesh: str
    batch: int = BATCH
    sequence: int = SEQUENCE

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(axis.partition("=")[2]) for axis in self.mesh.split(","))

    @property
    def name(self) -> str:
        return "one MLP block" if self.layers == MLP else f"{self.layers} layers"


CASES = (
    Case(2, "dp=8"),
    Case(8, "dp=8"),
    Case(2, "dp=4,tp=8"),
    Case(4, "dp=4,tp=8"),
    Case(8, "dp=4,tp=8"),
    Case(MLP, "a=2,b=2,c=2"),
)


@dataclass(frozen=True)
class Measured:
    """CPU-seconds of importing shardc, of each phase and of all of compiling; and what is known of the plan."""

    imports: float
    phases: dict[str, float]
    total: float
    proof: str


class Block(nn.Module):
    """Llama-3-8B's gated MLP, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(4096, 14336, bias=False) for _ in range(2))
        self.down = nn.Linear(14336, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)).square().mean()


def build(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and its inputs, on the meta device."""
    if case.layers == MLP:
        with torch.device("meta"):
            x = torch.empty(case.batch, case.sequence, 4096, dtype=torch.bfloat16)
            return Block().bfloat16(), {"x": x}
    sys.path.insert(0, str(HERE.parent / "examples"))
    import llama

    return llama.build("8b", case.layers, llama.LlamaForCausalLMLoss), llama.example_inputs(case.batch, case.sequence)


def measure(case: Case) -> Measured:
    """Compile one case in this process."""
    start = time.process_time()
    import shardc.api

    imports = time.process_time() - start
    model, inputs = build(case)
    start = time.process_time()
    compiled = shardc.compile(model, case.mesh, inputs, hardware=HARDWARE, memory="unbounded")
    planned = time.process_time()
    assert compiled.code
    total, codegen = time.process_time() - start, time.process_time() - planned
    plan = compiled.plan
    proved = plan.lower_bound / plan.cost
    proof = "optimal" if proved > 1 - 1e-6 else f"within {1 - proved:.1%}"
    return Measured(imports, {**plan.phases, "codegen": codegen}, total, proof)


def measured_apart(case: Case) -> Measured:
    """Compile one case in a fresh process."""
    options = {"layers": case.layers, "mesh": case.mesh, "batch": case.batch, "sequence": case.sequence}
    command = [sys.executable, str(Path(__file__).resolve()), "--json", *(f"--{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case.name} on {case.mesh}:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def row(case: Case, found: Measured) -> list[str]:
    """One line of the table."""
    rest = found.total - sum(found.phases.values())
    shown = [f"{seconds:.2f}" for seconds in (*found.phases.values(), rest)]
    return [case.name, case.mesh, *shown, f"**{found.total:.2f}**", found.proof, *rival(case, found.total)]


def rival(case: Case, total: float) -> tuple[str, str]:
    """AutoParallel's CPU-seconds for the same case, and how many times ours they are, by what it finished."""
    parts = AUTOPARALLEL.get((case.layers, case.sizes))
    if parts is None or (case.batch, case.sequence) != (BATCH, SEQUENCE):
        return "–", "–"
    known = sum(part for part in parts if part is not None)
    if None in parts:
        return (f"{known:.0f} + {STOPPED}", f"> {known / total:.0f}×") if known else (STOPPED, "–")
    return f"{known:.1f}", f"{known / total:.1f}×"


def machine() -> str:
    """The processor, its cores and the versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{model}, {os.cpu_count()} cores; {versions}"


def table(phases: list[str], rows: list[list[str]]) -> str:
    """Markdown, in columns."""
    head = ["model", "mesh", *phases, "rest", "**total**", "plan", "AutoParallel", "ratio"]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def autoparallel() -> str:
    """AutoParallel's figures, by part."""
    lines = ["| model | mesh | trace | strategies | edge and compute costs | CBC |", "| --- " * 6 + "|"]
    for (layers, sizes), parts in AUTOPARALLEL.items():
        shown = [f"{part:g}" if part is not None else STOPPED for part in parts]
        if parts[0] is None:
            shown = ["–", "–", "–", STOPPED]
        lines.append(f"| {Case(layers, '').name} | {sizes} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU-seconds that compiling takes, by phase.")
    parser.add_argument("--layers", type=int, help="one case: this many layers of Llama-3-8B; 0: one MLP block")
    parser.add_argument("--mesh", help="one case: on this mesh (default dp=4,tp=8)")
    parser.add_argument("--sequence", type=int, default=SEQUENCE, help=f"tokens of a sequence (default {SEQUENCE})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"sequences of a batch (default {BATCH})")
    parser.add_argument("--json", action="store_true", help="print one case, measured in this process, as JSON")
    options = parser.parse_args()
    cases = [Case(case.layers, case.mesh, options.batch, options.sequence) for case in CASES]
    if options.json or options.layers is not None or options.mesh is not None:
        layers = 8 if options.layers is None else options.layers
        cases = [Case(layers, options.mesh or "dp=4,tp=8", options.batch, options.sequence)]
    if options.json:
        print(json.dumps(asdict(measure(cases[0]))))
        return
    from shardc.inspect.progress import tracked  # not above: a case times the import of shardc

    found = [measured_apart(case) for case in tracked(cases, "cases")]
    imports = max(one.imports for one in found)
    what = f"{options.batch} sequences of {options.sequence} tokens, bf16, costs of {HARDWARE}"
    print(f"CPU-seconds; {what}. Machine: {machine()}.\n")
    print(table(list(found[0].phases), [row(case, one) for case, one in zip(cases, found, strict=True)]))
    print(f"\nImporting shardc, not in the total: {imports:.1f} CPU-seconds beyond torch's own import.")
    print(f"\nAutoParallel's parts, in CPU-seconds ({AUTOPARALLEL_SOURCE}):\n\n{autoparallel()}")


if __name__ == "__main__":
    main()
