"""Layers that only look repeated are traced in full, and the model is left as it was."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import shardc.capture.trace
from checks.stitched import Spy, check_values, in_full
from samples.no_repetition import (
    COUNT,
    IN_FULL,
    AtIndex,
    Counted,
    Lending,
    Measured,
    OfClass,
    Penalised,
    PenalisedOnce,
    SteppingAll,
    SteppingOne,
)
from samples.repeated_layers import Block, Stack, X
from shardc.capture.trace import capture


@pytest.mark.parametrize("name", IN_FULL)
def test_what_is_no_repetition_is_traced_in_full(name: str, spy: Spy) -> None:
    make, reason = IN_FULL[name]
    COUNT["calls"] = OfClass.count = 0
    module = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capture(module, (X,))
    assert not spy.filled
    assert reason in spy.refused[0] if reason else not spy.refused, spy.refused


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [Counted, SteppingAll, SteppingOne, Lending])
def test_what_the_model_does_to_tensors_of_its_layers(
    make: Callable[[], nn.Module], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    with torch.set_grad_enabled(grad):
        in_full(module, monkeypatch, X)


@pytest.mark.parametrize("make", [Penalised, PenalisedOnce, Measured])
def test_tensors_of_skipped_layers_used_elsewhere(
    make: Callable[[], nn.Module], spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    check_values(in_full(module, monkeypatch, X), module, x=X)
    assert not spy.filled


def test_constraints_on_a_layer_are_traced_in_full(spy: Spy) -> None:
    program = capture(Stack(), (X,), constraints={"layers.3.*": "-,?"})
    assert not spy.filled
    assert any(node.target is torch.ops.shardc.constrain.default for node in program.graph.nodes)
    capture(Stack(), (X,), constraints={"layers.3.up.weight": "-,?"})
    assert spy.filled


@contextmanager
def global_hook() -> Generator[None]:
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        hook.remove()


def test_hooks_on_all_modules_are_traced_in_full(spy: Spy) -> None:
    with global_hook():
        capture(Stack(), (X,))
    assert not spy.filled


def test_a_trace_that_fails_leaves_the_model_as_it_was(spy: Spy) -> None:
    class Failing(AtIndex):
        def forward(self, x: Tensor) -> Tensor:
            if self.index == 7:
                raise ValueError("the last one")
            return Block.forward(self, x)

    class Fine(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if math.isfinite(float(os.environ.get("LAYERS", "1"))) else x

    for module in (Stack(Failing), Stack(lambda _: Fine())):
        before = [dict(vars(part)) for part in module.modules()]
        try:
            capture(module, (X,))
        except shardc.errors.CaptureError as error:
            assert "the last one" in str(error)
        after = [dict(vars(part)) for part in module.modules()]
        assert [list(own) for own in after] == [list(own) for own in before]
        assert all(new[key] is old[key] for new, old in zip(after, before, strict=True) for key in old)
        assert "forward" not in vars(module.layers[3])
    assert len(spy.filled) == 1 and spy.refused
