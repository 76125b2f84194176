"""`shardc.rule`: rules that users give their own operators, believed only after a trial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.errors import RuleError
from shardc.rules import custom


@torch.library.custom_op("own::swiglu", mutates_args=())
def swiglu(x: Tensor, gate: Tensor) -> Tensor:
    return x * nn.functional.silu(gate)


@swiglu.register_fake
def _swiglu_fake(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("own::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    s = gate.sigmoid()
    return grad * gate * s, grad * x * s * (1 + gate * (1 - s))


@swiglu_backward.register_fake
def _swiglu_backward_fake(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate)


swiglu.register_autograd(
    lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("own::product", mutates_args=())
def product(x: Tensor, y: Tensor, bias: Tensor | None = None, width: int = 0) -> Tensor:
    made = x @ y
    assert not width or made.shape[-1] == width
    return made if bias is None else made + bias


@product.register_fake
def _product_fake(x: Tensor, y: Tensor, bias: Tensor | None = None, width: int = 0) -> Tensor:
    torch._check(x.shape[-1] == y.shape[-2] and width in (0, y.shape[-1]))
    return x.new_empty(*x.shape[:-1], y.shape[-1])


@torch.library.custom_op("own::pick", mutates_args=())
def pick(table: Tensor, offsets: Tensor) -> Tensor:
    """Sums of the rows between offsets, which must rise."""
    if not bool((offsets.diff() > 0).all()):
        raise ValueError("offsets must rise")
    return torch.stack([table[a:b].sum(0) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)])


@pick.register_fake
def _pick_fake(table: Tensor, offsets: Tensor) -> Tensor:
    return table.new_empty(offsets.shape[0] - 1, table.shape[1])


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules given in one test are not known to the next."""
    monkeypatch.setattr(custom, "_GIVEN", {})


def known(operator: Any) -> list[str]:
    return [str(rule) for rule in custom._GIVEN.get(operator, [])]


@pytest.mark.parametrize("operator", [swiglu, torch.ops.own.swiglu, torch.ops.own.swiglu.default])
def test_any_name_of_an_operator_will_do(operator: Any) -> None:
    shardc.rule(operator, "a b, a b -> a b", linear=[{0}])
    assert len(known(torch.ops.own.swiglu.default)) == 1


@pytest.mark.parametrize(
    "text, more, said",
    [
        ("m k, k n -> m n", {}, ""),
        ("m k, k n -> m n", {"linear": [{0}, {1}]}, ""),
        ("m k, k n -> m n", {"linear": [{0, 1}]}, r"not linear in operands \{0, 1\}"),
        ("m k:max, k n -> m n", {}, r"factor k does not hold. Cut into \[\[0.*result 0 is -?[0-9.]+.* should be"),
        ("b m k, b k n -> b m n", {}, ""),
        ("b m k, k n -> b m n", {}, ""),
        ("m k, k n, n -> m n", {}, "factor k does not hold"),
        ("m k, k n, n -> m n", {"linear": [{0, 2}, {1, 2}]}, ""),
        ("m k!, k! n, n -> m n", {}, ""),
        ("m k, k n -> n m", {}, "does not fit a call with shapes"),
        ("m k, j n -> m n", {}, "its fake kernel|cannot be checked: on shapes"),
        ("m k, k n, _ -> m n", {"sizes": {3: "n"}}, ""),
        ("m k, k n, _ -> m n", {"sizes": {3: "m"}}, "cannot be checked"),
        ("m k, #k n -> m n", {}, "need more than a text"),
        ("m k -> m", {}, "cannot be checked"),
        ("m k, k n - m n", {}, "no '->'"),
    ],
)
def test_claims(text: str, more: dict[str, Any], said: str) -> None:
    if not said:
        shardc.rule(product, text, **more)
        assert known(torch.ops.own.product.default)
        return
    with pytest.raises(RuleError, match=said):
        shardc.rule(product, text, **more)
    assert not known(torch.ops.own.product.default)


def test_an_error_shows_factor_and_values() -> None:
    with pytest.raises(RuleError) as caught:
        shardc.rule(swiglu, "a b, c b -> a b")
    assert str(caught.value).startswith("rule 'a b, c b -> a b' of own.swiglu.default")


def test_an_example_where_arguments_cannot_be_made_up() -> None:
    table, offsets = torch.randn(6, 4), torch.tensor([0, 2, 3, 6])
    with pytest.raises(RuleError, match=r"Pass example=\(...\)"):
        shardc.rule(pick, "r! d, o! -> g! d")
    shardc.rule(pick, "r! d, o! -> g! d", linear=[{0}], example=(table, offsets))
    with pytest.raises(RuleError, match="factor r does not hold"):
        shardc.rule(pick, "r d, o! -> g! d", example=(table, offsets))


def test_what_is_no_operator_or_has_a_rule() -> None:
    with pytest.raises(RuleError, match=r"wrap the function with torch.library.custom_op"):
        shardc.rule(torch.relu, "a -> a")  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="has a rule in shardc"):
        shardc.rule(torch.ops.aten.mm.default, "m k, k n -> m n")
    with pytest.raises(RuleError, match=r"overloads .*give each one a rule"):
        shardc.rule(torch.ops.aten.histogram, "a -> a")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(8, 16, bias=False, dtype=torch.float64) for _ in range(2))
        self.down = nn.Linear(16, 8, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.up(x), self.gate(x))).square().sum()


@pytest.mark.parametrize("given", [True, False])
def test_forward_and_backward_of_a_custom_operator(given: bool) -> None:
    if given:
        shardc.rule(swiglu, "a b, a b -> a b", linear=[{0}])
        shardc.rule(swiglu_backward, "a b, a b, a b -> a b, a b", linear=[{0}])
    single, x = Block(), torch.randn(8, 8, dtype=torch.float64)
    model = Block()
    model.load_state_dict(single.state_dict())
    model = shardc.shard(model, mesh="dp=2,tp=2", constraints={"up.weight": ("tp", None), "gate.weight": ("tp", None)})
    expected, loss = single(x), model(x)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    names = {one.operator: one for one in model.plan.tried}
    assert not given or not names
    if not given:
        assert names["own.swiglu_backward.default"].rule == '"a b, a b, a b -> a b, a b", linear=[{0}]'


def test_a_call_that_no_text_fits_is_tried() -> None:
    shardc.rule(product, "b m k, b k n -> b m n")

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return product(x, x)

    with torch.no_grad():
        assert shardc.compile(Model(), "dp=2", (torch.randn(8, 8),)).plan.tried[0].rule.startswith('"a b, b c -> a c"')
        assert shardc.compile(Model(), "dp=2", (torch.randn(8, 8, 8),)).plan.tried == ()
