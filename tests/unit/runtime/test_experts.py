"""Experts as one operator against experts one by one: values, gradients, empty experts, formulas, grouped products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardc.errors import ShardcError
from shardc.runtime.kernels.mixture.formulas import formula
from shardc.runtime.kernels.mixture.fused import experts
from shardc.runtime.kernels.mixture.grouped import RowGroups

GATED = ("mul(silu(gate), up)", "silu_backward(mul(grad, up), gate), mul(grad, silu(gate))")
SQUARED = ("pow(relu(up), 2)", "threshold_backward(mul(grad, mul(relu(up), 2)), up, 0)")


def one_by_one(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    """The definition, a token and an expert at a time."""
    rows: list[Tensor] = []
    for token, (chosen, weights) in enumerate(zip(ids.tolist(), scores, strict=True)):
        row = torch.zeros_like(x[token])
        for expert, score in zip(chosen, weights, strict=True):
            inner = torch.einsum("gfd,d->gf", up[expert], x[token])
            inner = inner if up_bias is None else inner + up_bias[expert]
            active = torch.nn.functional.silu(inner[0]) * inner[1] if len(inner) == 2 else torch.relu(inner[0]) ** 2
            made = down[expert] @ active
            row = row + score * (made if down_bias is None else made + down_bias[expert])
        rows.append(row)
    return torch.stack(rows)


def learned(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


ROUTINGS = {
    "random": lambda tokens, count, k: torch.stack([torch.randperm(count)[:k] for _ in range(tokens)]),
    "one expert": lambda tokens, count, k: torch.full((tokens, 1), count - 1),
    "empty experts": lambda tokens, count, k: torch.tensor([[0, count - 1]] * tokens),
    "twice the same": lambda tokens, count, k: torch.tensor([[1, 1]] * tokens),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gates", ["none", "beside", "between"])
def test_values_and_gradients_are_those_of_experts_one_by_one(routing: str, bias: bool, gates: str) -> None:
    torch.manual_seed(0)
    tokens, count, f, d = 7, 5, 4, 6
    g = 1 if gates == "none" else 2
    ids = ROUTINGS[routing](tokens, count, 2)
    stored = learned(count, d, f, g) if gates == "between" else learned(count, g, f, d)
    up = stored.permute(0, 3, 2, 1) if gates == "between" else stored
    x, scores, down = learned(tokens, d), learned(*ids.shape), learned(count, d, f)
    up_bias, down_bias = (learned(count, g, f), learned(count, d)) if bias else (None, None)
    told = GATED if g == 2 else SQUARED
    made = experts(x, ids, scores, up, up_bias, down, down_bias, *told)
    right = one_by_one(x, ids, scores, up, up_bias, down, down_bias)
    torch.testing.assert_close(made, right, rtol=1e-12, atol=1e-12)
    leaves = [one for one in (x, scores, stored, up_bias, down, down_bias) if one is not None]
    weights = torch.randn_like(right)
    grads, expected = (torch.autograd.grad(one, leaves, weights) for one in (made, right))
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_weights_that_do_not_learn_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scores = learned(4, 6), learned(4, 2)
    weights = [learned(3, 2, 4, 6).detach(), None, learned(3, 6, 4).detach(), None]
    out = experts(x, torch.tensor([[0, 1]] * 4), scores, *weights, *GATED)
    monkeypatch.delattr(RowGroups, "products")
    assert all(grad is not None for grad in torch.autograd.grad(out.sum(), [x, scores]))


def test_there_is_no_second_derivative() -> None:
    x = learned(4, 6)
    out = experts(
        x, torch.tensor([[0]] * 4), learned(4, 1), learned(1, 2, 4, 6), None, learned(1, 6, 4), None, *GATED
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.sum(), [x], create_graph=True)
    with pytest.raises(ShardcError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [0, 0, 0]])
def test_products_by_group(counts: list[int], width: int, dtype: torch.dtype) -> None:
    """Also where torch has no kernel for the type or the width, and for groups without rows."""
    rows, other = torch.randn(sum(counts), 8).to(dtype), torch.randn(sum(counts), width).to(dtype)
    weights, groups = torch.randn(3, width, 8).to(dtype), RowGroups(torch.tensor(counts))
    apart = list(zip(rows.split(counts), weights, strict=True))
    close: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(groups.times(rows, weights), torch.cat([one @ w.t() for one, w in apart]), **close)
    sums = torch.stack([one.t() @ two for one, two in zip(rows.split(counts), other.split(counts), strict=True)])
    torch.testing.assert_close(groups.products(rows, other), sums, **close)
    torch.testing.assert_close(groups.sums(rows), torch.stack([one.sum(0) for one in rows.split(counts)]), **close)


def test_formulas() -> None:
    gate, up = torch.randn(3), torch.randn(3)
    assert torch.equal(formula("mul(silu(gate), up)", "gate", "up")(gate, up), torch.nn.functional.silu(gate) * up)
    steps = formula("a = clamp(up, -1.0, 1.0); add(a, 1), to(a, float64)", "up")(up)
    assert torch.equal(steps[0], up.clamp(-1, 1) + 1) and steps[1].dtype == torch.float64
    with pytest.raises(ShardcError, match="no operator of ATen"):
        formula("no_such_operator(up)", "up")
    with pytest.raises(ShardcError, match="is no formula"):
        formula("mul(up", "up")
