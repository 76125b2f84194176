"""What may run again in backward, and when: within windows of forward, from what is kept at their waists."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import shardc.rules  # noqa: F401  (registers the rules)
from samples import models
from samples.towers import Tower
from shardc.capture.trace import capture
from shardc.ir.facts import origin_of
from shardc.passes.normalize import normalized
from shardc.planning.run_order import RunOrder, _grouped
from shardc.rules.factors.factoring import factor

BLOCKS, MANY = 4, 9


class Skipping(nn.Module):
    """What comes first is read last, so a single value never crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.layers[2](self.layers[1](self.layers[0](x).exp()).exp())).mean()


class Routed(Tower):
    """Every block has a buffer of its own, as routers that balance by a bias have."""

    def __init__(self) -> None:
        super().__init__(32, BLOCKS)
        for block in self.blocks:
            block.register_buffer("bias", torch.randn(32))
            block.register_forward_hook(_biased)


class Collecting(Tower):
    """The loss reads something of every block, as one that balances routers does."""

    def __init__(self) -> None:
        super().__init__(32, MANY)
        self.router = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            logits.append(self.router(x))
        return x.mean() + torch.cat(logits).logsumexp(0).sum()


class Saving(Tower):
    """Autograd saves a copy of the divisor, which is divided in place later: only backward reads it."""

    def __init__(self) -> None:
        super().__init__(32, BLOCKS)
        for block in self.blocks:
            block.register_forward_hook(_divided)


def _biased(block: nn.Module, _: object, made: Tensor) -> Tensor:
    return made * block.get_buffer("bias")


def _divided(block: nn.Module, _: object, made: Tensor) -> Tensor:
    scores = made.sigmoid().gather(1, torch.zeros(16, 1, 32, dtype=torch.int64))
    total = scores.sum(-1, keepdim=True)
    scores /= total
    return made * scores


def schedule(model: nn.Module, *inputs: Tensor) -> RunOrder:
    return RunOrder(factor(normalized(capture(model, inputs))))


def by_block(scheduled: RunOrder, path: str) -> list[list[int]]:
    """When the operators of every block would run again."""
    found: list[list[int]] = [[] for _ in range(MANY)]
    for node, position in scheduled.rerun.items():
        module = origin_of(node).module
        if module.startswith(path):
            found[int(module.removeprefix(path).split(".")[0])].append(position)
    return [block for block in found if block]


MADE = {"tower": lambda: Tower(32, BLOCKS), "buffers": Routed, "collecting": Collecting, "saving": Saving}


@pytest.mark.parametrize("what", [*MADE, "gpt"])
def test_blocks_run_again_one_after_the_other(what: str) -> None:
    """The last block first, and none of it before backward reaches it."""
    if what in MADE:
        scheduled = schedule(MADE[what](), torch.randn(16, 32, 32))
    else:
        ids = torch.randint(0, models.VOCABULARY, (8, 16))
        scheduled = schedule(models.HandGPT(width=32, heads=4, layers=BLOCKS, length=16), ids, ids)
    blocks = by_block(scheduled, "blocks.")
    assert len(blocks) == (MANY if what == "collecting" else BLOCKS)
    assert all(len(block) >= 3 for block in blocks)
    for earlier, later in itertools.pairwise(blocks):
        assert min(earlier) > max(later) > scheduled.border


def test_what_crosses_a_waist_is_kept() -> None:
    scheduled = schedule(Tower(32, BLOCKS), torch.randn(16, 32, 32))
    names = {node.name for node in scheduled.rerun}
    assert {"gelu", "addmm", "native_layer_norm"} <= names
    assert not any(name.startswith("add_") or name == "add" for name in names)  # the residual stream
    assert "bernoulli" in names and "bernoulli_state" not in names  # a mask is drawn again from its state


def test_without_waists_all_may_run_again() -> None:
    scheduled = schedule(Skipping(), torch.randn(4, 8))
    assert {"addmm", "addmm_1", "exp", "exp_1"} <= {node.name for node in scheduled.rerun}


@pytest.mark.parametrize(
    ("kinds", "windows"),
    [
        ("eababababcdfcdfcdfcdfz", ["e", *["ab"] * 4, *["cdf"] * 4, "z"]),  # an encoder, and a decoder behind it
        ("eababz", ["e", "ab", "ab", "z"]),
        ("abc", ["a", "b", "c"]),
        ("", []),
    ],
)
def test_stretches_that_repeat_in_turns_are_one_window(kinds: str, windows: list[str]) -> None:
    numbers = _grouped(kinds, range(len(kinds)), 0, 1)
    pairs = zip(kinds, numbers, strict=True)
    assert ["".join(kind for kind, _ in each) for _, each in itertools.groupby(pairs, lambda pair: pair[1])] == windows
