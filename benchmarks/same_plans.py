"""Thirty programs, planned and run: written down before a change that may alter no plan, and compared after it.

    python benchmarks/same_plans.py record before.json      # on the code before the change
    python benchmarks/same_plans.py compare before.json     # on the code after it; 1 where anything differs

Objectives, bounds, bytes and memory are compared to the last digit; outputs, gradients and code by their hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from planner import DEEPER, SOLVED, TIMED, Case, build
from torch import Tensor, nn
from torch.utils import _pytree as pytree

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
ZOO = ("llama", "mixtral", "gemma2", "gpt2", "bert", "t5", "mamba", "vit", "resnet", "u_net", "dlrm", "lstm")
Built = tuple[nn.Module, Any]


def example(name: str) -> Callable[[], Built]:
    def made() -> Built:
        module = __import__(name)
        return module.model(), module.inputs()

    return made


def small_gpt(dropout: float) -> Callable[[], Built]:
    def made() -> Built:
        import gpt

        return gpt.GPT(gpt.Config(dropout=dropout)), gpt.inputs()

    return made


def zoo(name: str) -> Callable[[], Built]:
    def made() -> Built:
        from zoo.test_zoo import ZOO as entries

        return entries[name].build()

    return made


def programs() -> dict[str, tuple[Callable[[], Built], str, dict[str, Any]]]:
    """By title: what makes model and inputs, the mesh, and the options of `shardc.compile`."""
    found: dict[str, tuple[Callable[[], Built], str, dict[str, Any]]] = {
        "mlp tp=4": (example("mlp"), "tp=4", {}),
        "mlp dp=2,tp=2 constrained": (example("mlp"), "dp=2,tp=2", {"constraints": {"up.weight": ("tp", None)}}),
        "constrain dp=2,tp=2": (example("constrain"), "dp=2,tp=2", {"mode": "propagate"}),
        "gpt dp=2,tp=2": (small_gpt(0.0), "dp=2,tp=2", {}),
        "gpt with dropout a=3,b=2": (small_gpt(0.1), "a=3,b=2", {}),
        "gpt dp=2,tp=2 within 2MB": (small_gpt(0.0), "dp=2,tp=2", {"memory": "2MB", "optimizer": "adamw"}),
        "llama example": (example("llama"), "dp=4,tp=8", {"hardware": "h100", "memory": "unbounded"}),
    }
    for case in (*TIMED, *DEEPER, *SOLVED[:3]):
        within = {"memory": case.memory, "optimizer": 8} if case.memory else {"memory": "unbounded"}
        found[f"{case.name} {case.mesh}"] = (_deferred(case), case.mesh, {"hardware": "h100", **within})
    for index, name in enumerate(ZOO):
        found[f"zoo {name}"] = (zoo(name), ("dp=2,tp=2", "a=4")[index % 2], {})
    return found


def _deferred(case: Case) -> Callable[[], Built]:
    return lambda: build(case)


def facts(make: Callable[[], Built], mesh: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of one program."""
    import shardc

    torch.manual_seed(0)
    model, inputs = make()
    compiled = shardc.compile(model, mesh, inputs, **options)
    plan = compiled.plan
    sent = [(c.kind, c.axis, c.sent, c.seconds, c.phase) for c in plan.conversions]
    told = {
        "objective": plan.cost, "bound": plan.lower_bound, "predicted": plan.predicted, "compute": plan.compute,
        "bytes": plan.bytes_per_axis, "memory": [plan.memory.peak, dict(sorted(plan.memory.parts.items()))],
        "conversions": _hash(repr(sent)), "layouts": _hash("\n".join(map(str, plan.placed))),
    }  # fmt: skip
    told["code"] = _hash(compiled.code)
    if not any(parameter.is_meta for parameter in model.parameters()):
        torch.manual_seed(1)
        made = compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs)
        tensors = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
        if tensors and tensors[0].requires_grad:
            tensors[0].sum().backward()
        tensors += [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        told["outputs"] = _hash(*[tensor.detach().double().numpy().tobytes() for tensor in tensors])
    return json.loads(json.dumps(told))


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="programs whose title has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {title: one for title, one in programs().items() if options.only in title}
    from shardc.inspect.progress import tracked

    told = {title: facts(*one) for title, one in tracked(chosen.items(), "programs")}
    if options.what == "record":
        options.file.write_text(json.dumps(told, indent=1))
        return 0
    before, wrong = json.loads(options.file.read_text()), 0
    for title, now in told.items():
        for key, value in now.items():
            if value != before[title].get(key):
                wrong += 1
                print(f"{title}: {key} was {before[title].get(key)}, is {value}")
    print(f"{len(told)} programs compared, {wrong} differences")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
