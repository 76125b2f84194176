"""Attention in a captured program: one operator, whatever the model writes, and no tensor of queries times keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.attention import flex_attention as flex

from checks.captured import operators, verify
from shardc.capture.trace import capture
from shardc.ir.program import Program, value_of

LENGTH, HEADS, SHARED, SIZE = 24, 4, 2, 3


class Attention(nn.Module):
    """Queries of four heads, keys and values of `shared` heads, and what `function` makes of them."""

    def __init__(self, function: Callable[..., Tensor], shared: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.shared = function, shared
        self.up = nn.Linear(5, (HEADS + 2 * shared) * SIZE, bias=False)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        q, k, v = heads.split([HEADS, self.shared, self.shared], 1)
        return (self.function(q, k, v, *rest).square().sum() + 0 * self.sinks.sum()) / 10


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, 5, dtype=torch.float64)


def calls(program: Program) -> list[tuple[Any, ...]]:
    """Per call of attention: the shape of its mask or None, causal, window and softcap."""
    found = [n for n in program.graph.nodes if n.target is torch.ops.shardc.attention.default]
    masks = [None if n.args[3] is None else tuple(value_of(n.args[3]).shape) for n in found]
    return [(mask, n.args[6], n.args[8], n.args[9]) for mask, n in zip(masks, found, strict=True)]


def squares(program: Program) -> list[str]:
    """The values with as many elements as there are queries times keys."""
    nodes = [n for n in program.graph.nodes if n.op != "output" and isinstance(value_of(n), Tensor)]
    return [n.name for n in nodes if list(value_of(n).shape).count(LENGTH) > 1]


def check(
    function: Callable[..., Tensor], *expected: Any, shared: int = HEADS, rest: tuple[Tensor, ...] = ()
) -> Program:
    program = verify(Attention(function, shared), inputs(), *rest)
    assert calls(program) == [expected]
    assert not any("softmax" in name for name in operators(program))
    if expected[0] is None or expected[0][-2] == 1:
        assert squares(program) == []
    return program


def written(q: Tensor, k: Tensor, v: Tensor, mask: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    return F.softmax(mask(q @ k.transpose(-2, -1) / math.sqrt(SIZE)), dim=-1) @ v


def repeated(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    times = HEADS // heads
    return x[:, :, None].expand(batch, heads, times, length, size).reshape(batch, HEADS, length, size)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool, int]] = {
    "none": (lambda s: s, False, 0),
    "triu of -inf": (lambda s: s + torch.full((LENGTH, LENGTH), -math.inf, dtype=s.dtype).triu(1), True, 0),
    "tril of ones": (lambda s: s.masked_fill(s.new_ones(LENGTH, LENGTH).tril() == 0, -math.inf), True, 0),
    "finite": (lambda s: s.masked_fill(~s.new_ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -1e9), True, 0),
    "product": (lambda s: s + (1 - s.new_ones(LENGTH, LENGTH).tril()) * -1e9, True, 0),
    "where": (
        lambda s: torch.where(torch.arange(LENGTH)[:, None] >= torch.arange(LENGTH), s, torch.finfo(s.dtype).min),
        True, 0,
    ),
    "in place": (lambda s: s.masked_fill_(s.new_ones(LENGTH, LENGTH).triu(1).bool(), -math.inf), True, 0),
    "window": (
        lambda s: s.masked_fill((torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() > 4, -math.inf), False, 5,
    ),
    "causal window": (
        lambda s: s.masked_fill(s.new_ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3), -math.inf)
        .masked_fill(s.new_ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -math.inf),
        True, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_known_become_arguments(name: str) -> None:
    mask, causal, window = MASKS[name]
    check(lambda q, k, v: written(q, k, v, mask), None, causal, window, 0.0)


def test_padding_beside_a_causal_mask_stays_small() -> None:
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, -3:] = False

    def attention(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & given[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, seen)

    check(attention, (2, 1, 1, LENGTH), True, 0, 0.0, rest=(padding,))


def test_rows_that_see_nothing_keep_what_the_model_puts_there() -> None:
    """The first keys are padding: a finite number in all of a row gives every key a weight, and scores no gradient."""
    padding, late = torch.ones(2, LENGTH, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :3], late[1, 3:] = False, False

    def attention(q: Tensor, k: Tensor, v: Tensor, given: Tensor, number: float) -> Tensor:
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & given[:, None, None, :]
        return written(q, k, v, lambda s: s.masked_fill(~seen, number))

    for number in (torch.finfo(torch.float64).min, -1e4):
        program = verify(Attention(lambda *given, number=number: attention(*given, number)), inputs(), padding)
        assert calls(program) == []
    check(lambda *given: attention(*given, -math.inf), (2, 1, 1, LENGTH), True, 0, 0.0, rest=(late,))


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": repeated,
    "repeat_interleave": lambda x: x.repeat_interleave(HEADS // SHARED, 1),
    "before transposing": lambda x: x.transpose(1, 2).repeat_interleave(HEADS // SHARED, dim=2).transpose(1, 2),
    "repeat": lambda x: x.unsqueeze(2).repeat(1, 1, HEADS // SHARED, 1, 1).flatten(1, 2),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", REPEATS)
def test_repeated_keys_become_groups_of_queries(name: str, fused: bool) -> None:
    repeat, attention = REPEATS[name], F.scaled_dot_product_attention if fused else written
    program = check(lambda q, k, v: attention(q, repeat(k), repeat(v)), None, False, 0, 0.0, shared=SHARED)
    call = next(n for n in program.graph.nodes if n.target is torch.ops.shardc.attention.default)
    shapes = [tuple(value_of(n).shape) for n in call.args[:3]]  # type: ignore[union-attr]
    assert shapes == [(2, SHARED, HEADS // SHARED, LENGTH, SIZE), *[(2, SHARED, LENGTH, SIZE)] * 2]
    assert "aten.expand.default" not in [str(n.target) for n in program.graph.nodes if "input" in str(n.args)]


def test_keys_that_are_written_after_they_were_repeated_are_what_they_became() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = repeated(k)
        keys[:, 0] = 0
        return F.scaled_dot_product_attention(q, keys, repeated(v))

    program = verify(Attention(attention, SHARED), inputs())
    call = next(n for n in program.graph.nodes if n.target is torch.ops.shardc.attention.default)
    assert value_of(call.args[1]).shape[1] == HEADS  # type: ignore[arg-type]


FORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "enable_gqa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), SHARED),
    "one head of keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 1),
    "three dims": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), HEADS),
    "two dims": (lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), HEADS),
    "five dims": (lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]), HEADS),
    "broadcast batch": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), HEADS),
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3), HEADS),
    "dropout of groups": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, enable_gqa=True), SHARED,
    ),
    "written dropout": (lambda q, k, v: F.dropout(F.softmax(q @ k.mT, -1), 0.3) @ v, HEADS),
    "written in three dims": (
        lambda q, k, v: torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)), HEADS,
    ),
    "einsum": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v), HEADS,
    ),
    "baddbmm": (
        lambda q, k, v: torch.baddbmm(
            torch.zeros(1, 1, LENGTH, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5
        ).view(2, HEADS, LENGTH, LENGTH).softmax(-1).view(2 * HEADS, LENGTH, LENGTH).bmm(v.flatten(0, 1)),
        HEADS,
    ),
    "groups of queries": (
        lambda q, k, v: F.softmax(q.unflatten(1, (SHARED, -1)) @ k.unsqueeze(2).mT, -1) @ v.unsqueeze(2), SHARED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_attention(name: str) -> None:
    function, shared = FORMS[name]
    program = verify(Attention(function, shared), inputs())
    assert (
        operators(program)["shardc.attention.default"] == operators(program)["shardc.attention_backward.default"] == 1
    )
    assert not any("softmax" in name for name in operators(program))
    assert [name for name in squares(program) if "zeros" not in name and "add" not in name] == []


def test_soft_caps_and_sinks() -> None:
    def attention(self: Attention, x: Tensor) -> Tensor:
        q, k, v = self.up(x).unflatten(-1, (-1, SIZE)).transpose(1, 2).split(HEADS, 1)
        scores = torch.tanh(q @ k.mT * 0.7 / 5.0) * 5.0
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, LENGTH, -1)
        joined = torch.cat([scores, sinks], -1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return (F.softmax(joined, -1)[..., :-1] @ v).square().sum()

    class Capped(Attention):
        forward = attention

    program = verify(Capped(written), inputs())
    assert calls(program) == [(None, True, 0, 5.0)]
    assert squares(program) == []


LEFT: dict[str, Callable[..., Tensor]] = {
    "the weights are read": lambda q, k, v: (w := F.softmax(q @ k.mT, -1)) @ v + w.amax(),
    "the weights are read after dropout": lambda q, k, v: (w := F.dropout(F.softmax(q @ k.mT, -1), 0.3)) @ v + w.sum(),
    "scores are written over": lambda q, k, v: _written_over(q, k, v),
    "another dim": lambda q, k, v: F.softmax(q @ k.mT, -2) @ v,
    "another function": lambda q, k, v: F.softmax((q @ k.mT).relu(), -1) @ v,
    "second derivatives": lambda q, k, v: torch.autograd.grad(written(q, k, v).square().sum(), q, create_graph=True)[0],
}


def _written_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 3] = 0.5
    return F.softmax(scores, -1) @ v


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_just_attention_stays_as_it_is_written(name: str) -> None:
    program = verify(Attention(LEFT[name]), inputs())
    assert operators(program)["shardc.attention.default"] == operators(program)["shardc.attention_draw.default"] == 0


def test_a_mask_that_learns_stays_mathematics() -> None:
    class Learned(Attention):
        def __init__(self) -> None:
            super().__init__(written)
            self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

        def forward(self, x: Tensor, *_: Tensor) -> Tensor:
            q, k, v = self.up(x).unflatten(-1, (-1, SIZE)).transpose(1, 2).split(HEADS, 1)
            return (
                F.scaled_dot_product_attention(q, k, v, self.bias).sum()
                + written(q, k, v, lambda s: s + self.bias).sum()
            )

    assert operators(verify(Learned(), inputs()))["shardc.attention.default"] == 0


def test_multihead_attention_whose_weights_nobody_reads() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
            return self.heads(x, x, x, attn_mask=mask, is_causal=True)[0].square().sum()

    program = verify(Heads(), torch.randn(2, LENGTH, 4, dtype=torch.float64))
    assert calls(program) == [(None, True, 0, 0.0)]
    assert squares(program) == []


DOCUMENTS = torch.tensor([0] * 10 + [1] * (LENGTH - 10))

FLEX: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "plain": (None, None, (None, False, 0, 0.0)),
    "causal": (None, lambda b, h, q, k: q >= k, (None, True, 0, 0.0)),
    "window": (None, lambda b, h, q, k: (q >= k) & (q - k < 4), (None, True, 4, 0.0)),
    "soft cap": (lambda s, b, h, q, k: torch.tanh(s / 3.0) * 3.0, None, (None, False, 0, 3.0)),
    "documents": (
        None, lambda b, h, q, k: (q >= k) & (DOCUMENTS[q] == DOCUMENTS[k]), (None, True, 0, 0.0),
    ),
    "alibi": (
        lambda s, b, h, q, k: s + (k - q) * 2.0 ** -(h + 1), lambda b, h, q, k: q >= k,
        ((HEADS, LENGTH, LENGTH), True, 0, 0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention(name: str) -> None:
    """The CPU has no backward of flex_attention: so gradients are compared with those of its mathematics."""
    score_mod, mask_mod, expected = FLEX[name]
    index = [
        torch.arange(n).view([-1 if d == dim else 1 for d in range(4)])
        for dim, n in enumerate((2, HEADS, LENGTH, LENGTH))
    ]

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(SIZE)
        scores = scores if score_mod is None else score_mod(scores, *index)
        return (
            torch._safe_softmax(scores if mask_mod is None else scores.masked_fill(~mask_mod(*index), -math.inf), -1)
            @ v
        )

    def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if detect_fake_mode() is None:
            return by_hand(q, k, v)
        mask = None if mask_mod is None else flex.create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device="cpu")
        return flex.flex_attention(q, k, v, score_mod, mask)

    program = verify(Attention(by_flex), inputs())
    (call,) = calls(program)
    assert call[1:] == expected[1:]
    assert (call[0] is None) == (expected[0] is None)
    assert not any("softmax" in name for name in operators(program))


def test_flex_attention_with_a_log_sum_exp_is_its_mathematics() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if detect_fake_mode() is None:
            return written(q, k, v).sum() + (q @ k.mT / math.sqrt(SIZE)).logsumexp(-1).sum()
        out, aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True))
        return out.sum() + aux.lse.sum()

    assert operators(verify(Attention(attention), inputs()))["shardc.attention.default"] == 0


def test_dynamic_lengths_have_no_mask_either() -> None:
    program = capture(
        Attention(lambda q, k, v: written(q, k, v, lambda s: s + torch.full(s.shape[-2:], -math.inf).triu(1))).double(),
        (inputs(),), dynamic={0: {1: "length"}},
    )  # fmt: skip
    assert calls(program) == [(None, True, 0, 0.0)]
