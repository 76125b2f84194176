"""Models trained by four gloo processes equal single device."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.distributed


Spawn = Callable[..., list[tuple[int, str]]]


@pytest.mark.parametrize(("mesh", "names"), [("dp=2,tp=2", ("llama", "gpt2")), ("tp=4", ("llama", "resnet"))])
def test_language_models_and_a_cnn_train_like_single_device(spawn: Spawn, mesh: str, names: tuple[str, ...]) -> None:
    for code, output in spawn("zoo.py", mesh, *names):
        assert code == 0, output
        assert all(f"{name} equals single device" in output for name in names), output


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "tp=4"])
def test_dims_that_the_mesh_does_not_divide(spawn: Spawn, mesh: str) -> None:
    for code, output in spawn("uneven.py", mesh):
        assert code == 0, output
        assert "odd sizes equal single device" in output


def test_ranks_that_plan_differently_run_one_plan(spawn: Spawn) -> None:
    for code, output in spawn("disagree.py", nproc=2):
        assert code == 0, output
        assert "rank 0's plan runs" in output


@pytest.mark.parametrize(("mesh", "part"), [("dp=2,tp=2", 0.6)])
def test_a_budget_on_memory(spawn: Spawn, mesh: str, part: float) -> None:
    """What torch's allocator gives a rank is what the plan predicts, within 5 %."""
    for code, output in spawn("memory.py", mesh, str(part)):
        assert code == 0, output
        assert "memory as predicted" in output


def test_peaks_of_attention_losses_and_experts(spawn: Spawn) -> None:
    for code, output in spawn("beside/peaks.py"):
        assert code == 0, output
        assert "peaks as predicted" in output


def test_gradients_types_and_memory_order_of_results(spawn: Spawn) -> None:
    for code, output in spawn("one_device.py", "dp=2", nproc=2):
        assert code == 0, output
        assert "as on one device" in output


def test_outputs_in_the_hands_of_a_user(spawn: Spawn) -> None:
    for code, output in spawn("outputs.py", nproc=2):
        assert code == 0, output
        assert "outputs are those of one device" in output


@pytest.mark.parametrize(("mesh", "batch"), [("cp=3", "-"), ("dp=2,cp=2", "dp")])
def test_a_folded_sequence(spawn: Spawn, mesh: str, batch: str) -> None:
    for code, output in spawn("beside/folded.py", mesh, batch, nproc=3 if batch == "-" else 4):
        assert code == 0, output
        assert "folded as on one device" in output


def test_micro_batches(spawn: Spawn) -> None:
    """Every rank brings its part of the batch."""
    for code, output in spawn("beside/microbatches.py", "dp=2,tp=2", "dp"):
        assert code == 0, output
        assert "micro-batches equal one device" in output
