"""How long it takes to say which demands conflict: CPU-seconds for Llama-3-8B's dims, after the plan is made.

    python benchmarks/conflicts.py
    python benchmarks/conflicts.py --layers 8 --mesh dp=4,tp=8

The demands are Megatron's weights, with activations between the layers split along the sequence, which conflicts with
the attention's two sequence dims and with the split of the vocabulary.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import shardc
from shardc.explain.why import Questions

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import llama

COLUMNS, ROWS = ("tp", None), (None, "tp")
DEMANDS = {
    "model.layers.*.self_attn.[qkv]_proj.weight": COLUMNS,
    "model.layers.*.self_attn.o_proj.weight": ROWS,
    "model.layers.*.mlp.gate_proj.weight": COLUMNS,
    "model.layers.*.mlp.up_proj.weight": COLUMNS,
    "model.layers.*.mlp.down_proj.weight": ROWS,
    "model.layers.*.input_layernorm": ("dp", "tp", None),
    "model.norm": ("tp", "dp", None),
    "lm_head.weight": COLUMNS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU-seconds that minimal conflicts take.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--mesh", default="dp=4,tp=8")
    options = parser.parse_args()
    model = llama.build("8b", options.layers, llama.LlamaForCausalLMLoss)
    inputs = llama.example_inputs(32, 4096)
    plan = shardc.compile(model, options.mesh, inputs, hardware="h100", memory="unbounded", constraints=DEMANDS).plan
    assert isinstance(plan.explainer, Questions)
    start = time.process_time()
    finder = plan.explainer.conflict_finder()
    built = time.process_time()
    cores = finder.minimal_conflicts()
    solved = time.process_time()
    for conflict in plan.conflicts():
        print(conflict, end="\n\n")
    print(f"{options.layers} layers on {options.mesh}: {len(finder.clauses)} clauses, {len(cores)} minimal conflicts")
    print(f"importing z3 and building the model {built - start:.2f} CPU-s, solving {solved - built:.2f} CPU-s")


if __name__ == "__main__":
    main()
