"""Known answers, found and not coded: on these sizes the textbook's plan is the cheapest under the cost model.

Each graph is printed to a golden file; the assertions beside it say what makes it the known answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import shardc
from samples.textbook import MLP, Logits, Transformer, without_overlap
from shardc.api import Compiled

Golden = Callable[[str, str], None]


MEGATRON = {f"*.{name}.weight": ("tp", None) for name in ("q", "k", "v", "up")}
MEGATRON |= {f"*.{name}.weight": (None, "tp") for name in ("proj", "down")}


def plan(make: Callable[[], nn.Module], mesh: str, *shape: int, **options: object) -> Compiled:
    """Plan a bfloat16 model on the meta device for H100s."""
    with torch.device("meta"):
        model, x = make().bfloat16(), torch.empty(shape, dtype=torch.bfloat16)
    return shardc.compile(model, mesh, (x,), hardware=without_overlap("h100"), **options)  # type: ignore[arg-type]


def sent(compiled: Compiled, phase: str, least: float = 1024.0) -> Counter[str]:
    """How often each kind of collective runs in a phase; losses and the like, smaller than `least` bytes, left out."""
    return Counter(c.kind for c in compiled.plan.conversions if c.sent >= least and c.phase == phase)


def stored(compiled: Compiled) -> dict[str, str]:
    return {placed.name: str(placed.layout) for placed in compiled.plan.placed}


def sources(compiled: Compiled, kind: str) -> set[str]:
    """The values that a kind of collective is applied to."""
    lines = [line for line in compiled.graph("reshard").splitlines() if f"= {kind}(" in line]
    return {line.split("(%", 1)[1].split(",")[0].strip(")") for line in lines}


def proven(compiled: Compiled) -> bool:
    return compiled.plan.cost - compiled.plan.lower_bound <= 1e-6 * compiled.plan.cost


@pytest.mark.parametrize("kind", [MLP, Logits], ids=["loss", "logits"])
def test_big_weights_and_a_small_batch_split_columns_then_rows(kind: type[MLP], golden: Golden) -> None:
    """Megatron's MLP: one all-reduce in forward, none in backward, and no weight ever travels."""
    compiled = plan(lambda: kind(4096, 16384), "tp=8", 64, 4096)
    assert proven(compiled)
    assert stored(compiled)["up.weight"] == "[16384@tp, 4096]"
    assert stored(compiled)["down.weight"] == "[4096, 16384@tp]"
    assert sent(compiled, "forward") == {"all_reduce": 1}
    assert sent(compiled, "backward") == {}
    assert not any("weight" in source for k in ("all_gather", "all_to_all") for source in sources(compiled, k))
    golden(f"columns_then_rows_{'loss' if kind is MLP else 'logits'}", compiled.graph("reshard"))


def test_outputs_that_may_stay_split_are_reduced_by_a_scatter(golden: Golden) -> None:
    """Half of an all-reduce is enough where nobody asks for the whole."""
    compiled = plan(lambda: Logits(4096, 16384), "tp=8", 64, 4096, outputs="sharded")
    assert proven(compiled)
    assert sent(compiled, "forward") == {"reduce_scatter": 1}
    assert not any("weight" in source for k in ("all_gather", "all_to_all") for source in sources(compiled, k))
    golden("columns_then_rows_sharded", compiled.graph("reshard"))


def test_small_weights_and_a_big_batch_split_the_batch(golden: Golden) -> None:
    """Data parallelism: weights whole, gradients all-reduced, nothing sent in forward but the loss."""
    compiled = plan(lambda: MLP(512, 2048), "dp=8", 65536, 512)
    assert proven(compiled)
    assert stored(compiled) == {
        "up.weight": "[2048, 512]", "down.weight": "[512, 2048]", "input:0": "[65536@dp, 512]"
    }  # fmt: skip
    assert sent(compiled, "forward") == {}
    assert sent(compiled, "forward", least=1) == {"all_reduce": 1}  # the loss
    assert sent(compiled, "backward") == {"all_reduce": 1}  # both gradients in one bucket
    golden("data_parallel", compiled.graph("reshard"))


def test_a_big_batch_with_weights_stored_split_gathers_and_scatters(golden: Golden) -> None:
    """FSDP: weights gathered for forward, gradients reduce-scattered into their layout, never all-reduced."""
    compiled = plan(lambda: MLP(1024, 4096), "dp=8", 65536, 1024, constraints={"*.weight": ("dp", None)})
    assert proven(compiled)
    assert stored(compiled)["input:0"] == "[65536@dp, 1024]"
    assert sent(compiled, "forward") == {"all_gather": 2}
    assert sent(compiled, "backward") == {"reduce_scatter": 1}  # both gradients in one bucket
    assert sources(compiled, "all_gather") == {"up_weight", "down_weight"}
    golden("fully_sharded", compiled.graph("reshard"))


def residuals(compiled: Compiled) -> list[str]:
    """The layouts of the sums that are the residual, in forward."""
    lines = [line for line in compiled.graph("reshard").splitlines() if "= add(" in line and "# blocks" in line]
    return [line.split("bf16")[1].split("  ")[0] for line in lines[:4]]


def test_long_sequences_split_the_residual_along_the_sequence(golden: Golden) -> None:
    """Sequence parallelism: norms and sums of a whole residual cost more than reducing the norms' gradients."""
    compiled = plan(lambda: Transformer(8192, 64), "tp=8", 1, 8192, 8192, constraints=MEGATRON)
    assert proven(compiled)
    assert residuals(compiled) == ["[1, 8192@tp, 8192]"] * 4
    # every product that is summed over tp is reduce-scattered, and gathered again behind the norm; the first norm's
    # input is an input of the program, and whole at no cost
    assert sent(compiled, "forward") == {"reduce_scatter": 4, "all_gather": 3}
    assert sent(compiled, "backward", least=1e6) == {"reduce_scatter": 3, "all_gather": 4}
    assert sent(compiled, "backward")["all_reduce"] == 1  # the norms' four gradients, in one bucket
    golden("sequence_parallel", compiled.graph("reshard"))


def test_short_sequences_keep_the_residual_whole(golden: Golden) -> None:
    """Plain tensor parallelism: on few tokens the norms cost less than one more reduction's latency."""
    compiled = plan(lambda: Transformer(8192, 64), "tp=8", 1, 256, 8192, constraints=MEGATRON)
    assert proven(compiled)
    assert residuals(compiled) == ["[1, 256, 8192]"] * 4
    assert sent(compiled, "forward") == {"all_reduce": 4}
    assert sent(compiled, "backward", least=1e6) == {"all_reduce": 3}
    golden("tensor_parallel", compiled.graph("reshard"))


def test_two_axes_find_both_parallelisms(golden: Golden) -> None:
    """Big weights and a big batch over two machines: the batch between them, columns and rows inside."""
    compiled = plan(lambda: MLP(8192, 32768), "dp=2,tp=8", 65536, 8192)
    assert proven(compiled)
    assert stored(compiled) == {
        "up.weight": "[32768@tp, 8192]", "down.weight": "[8192, 32768@tp]", "input:0": "[65536@dp, 8192]"
    }  # fmt: skip
    over_dp = [c for c in compiled.plan.conversions if c.axis == "dp" and c.sent > 1024]
    assert [(c.kind, c.phase) for c in over_dp] == [("all_reduce", "backward")] * 2  # the weights' gradients
    golden("two_axes", compiled.graph("reshard"))
