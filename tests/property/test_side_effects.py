"""Models that do more than compute: what they return and leave behind, call by call, equals one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from checks.fuzz import SEED, TIMES
from samples.side_effects import KINDS, REFUSED, WIDTH, CountsCalls, Features, Kind, Memo, Model
from shardc import ShardcError, shard

EXAMPLES, PARTS = 1000, 8


def made(kinds: list[type[Kind]]) -> Model:
    torch.default_generator.manual_seed(0)  # torch.manual_seed tells every kind of device, which takes longer
    return Model([kind() for kind in kinds])


def history(model: Any, kinds: list[Kind], calls: int) -> list[Any]:
    """What can be seen after every call: results, what was left behind, parameters, gradients, random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # at 0.1, some models diverge
    seen: list[Any] = []
    for step in range(calls):
        for kind in kinds:
            kind.between(model, step)
        torch.default_generator.manual_seed(step)
        batch = {"x": torch.randn(6, WIDTH), "mask": torch.ones(WIDTH), "calls": []}
        result = model(batch)
        optimizer.zero_grad()
        result["y"].square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step()
        left = [kind.seen(model) for kind in kinds]
        assert result["x"] is batch["x"]
        values = (result, batch, left, gradients, dict(model.state_dict()), torch.rand(1))
        seen.append(pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, values))
    return seen


def alike(one: Any, other: Any) -> None:
    (ones, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert spec == other_spec
    # the gradient of a bias before a batch norm is zero but for what the others' sums lose
    floats = [leaf for leaf in ones if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
    largest = max([float(leaf.abs().max()) for leaf in floats], default=0.0)
    for a, b in zip(ones, others, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * max(largest, 1.0))
        else:
            assert a == b


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_one_side_effect_equals_single_device(kind: type[Kind]) -> None:
    compared([kind], "dp=2,tp=2", calls=5)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_side_effects_equal_single_device(part: int) -> None:
    random = np.random.default_rng((SEED, part))
    for _ in range(EXAMPLES * TIMES // PARTS):
        kinds = [KINDS[i] for i in random.choice(len(KINDS), int(random.integers(2, 5)), replace=False)]
        compared(kinds, str(random.choice(["a=2", "a=2,b=2"])))


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_repeated_is_refused_and_nothing_is_changed(kind: type[Kind]) -> None:
    model = made([CountsCalls, Features, Memo, kind])
    before = pytree.tree_map(lambda leaf: leaf, (dict(vars(model)), dict(vars(model.first))))
    model = shard(model, mesh="a=2")
    with pytest.raises(ShardcError, match=r"side_effects\.py:[0-9]+"):
        history(model, model.kinds, calls=1)
    now = {name: value for name, value in vars(model).items() if name != "_shardc"}
    assert now == before[0] and vars(model.first) == before[1]
    assert (model.calls, model.features) == (0, {})


def compared(kinds: list[type[Kind]], mesh: str, calls: int = 3) -> None:
    """Compare a model with these kinds on a mesh with one device; tells the kinds where they differ."""
    single, many = made(kinds), shard(made(kinds), mesh=mesh)
    try:
        alike(history(single, single.kinds, calls), history(many, many.kinds, calls))
    except Exception as error:
        raise AssertionError(f"{[kind.__name__ for kind in kinds]} on {mesh}") from error
