"""A saved module is a program that checks itself: processes against a virtual mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shardc
from samples.textbook import MLP
from shardc.runtime import RankError
from shardc.runtime.execute import saved

pytestmark = pytest.mark.distributed


class WithLogits(MLP):
    """Training begins from the loss alone; the logits come back beside it."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.logits(x)
        return {"loss": logits.square().mean(), "logits": logits}


def test_processes_compute_what_a_virtual_mesh_does(
    spawn: Callable[..., list[tuple[int, str]]], tmp_path: Path
) -> None:
    path = tmp_path / "mlp.py"
    shardc.compile(WithLogits(64, 128), "dp=2", (torch.randn(8, 64),), hardware="cpu").save(path)
    with pytest.raises(RankError, match="start it with torchrun"):
        saved.main(str(path), ["--check"])
    codes, tellings = zip(*spawn(str(path), "--check", nproc=2), strict=True)
    told = "".join(tellings)
    assert codes == (0, 0), told
    assert (
        "equal  output 0" in told
        and "equal  output 1" in told
        and told.count("equal  gradient of") >= 2
        and "WRONG" not in told
    )


def test_results_that_differ_are_far_from_each_other() -> None:
    one = torch.ones(4)
    assert saved._distance(one, one) == 0.0
    assert saved._distance(one + 1e-2, one) > saved.CLOSE[torch.float32]
    assert saved._distance(one, torch.ones(5)) == saved._distance(one, one.double()) == float("inf")
