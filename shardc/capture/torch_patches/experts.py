"""Experts layers of transformers during a trace, as one operator, whichever implementation the model names.

    grouped_mm_experts_forward(self, x, ids, scores)    ->    %out = shardc.experts(%x, %ids, %scores, ...)

What a layer does between its two products is run once on two small tensors, and becomes a formula:

    gate, up = gate_up.chunk(2, dim=-1); return F.silu(gate) * up    ->    "mul(silu(gate), up)"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)

from shardc.runtime.kernels.mixture.formulas import formula
from shardc.runtime.kernels.mixture.fused import experts

aten = torch.ops.aten
_SAMPLE = 4
Forward = Callable[..., Tensor]


class _GateUp:
    """Stands for the tensor of gates and what they gate, of which formulas may only ask for the two."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.halves = gate, up
        self.between: bool | None = None

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, Tensor]:
        if chunks != 2 or dim not in (-1, 1):
            raise NotImplementedError
        self.between = False
        return self.halves

    def __getitem__(self, index: Any) -> Tensor:
        kind, cut = index
        if kind is not Ellipsis or cut.step != 2 or cut.stop is not None or cut.start not in (None, 0, 1):
            raise NotImplementedError
        self.between = True
        return self.halves[cut.start or 0]


def fused(traced: Forward) -> Forward:
    """The forward of an experts layer as one operator; as `traced`, where it does something else between the products,
    or after them."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        known = _activation(self)
        if known is None:
            return traced(self, hidden_states, top_k_index, top_k_weights)
        (activation, slope), between = known
        up, up_bias = _blocks(self, between)
        down = self.down_proj.transpose(1, 2) if self.is_transposed else self.down_proj
        bias = self.down_proj_bias if self.has_bias else None
        result = experts(
            hidden_states.to(up.dtype), top_k_index, top_k_weights, up, up_bias, down, bias, activation, slope
        )
        return result.to(hidden_states.dtype)

    return forward


def fused_llama4(layer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `Llama4TextMoe.forward` returns; None where a token has several experts. Scores multiply what goes in, and
    those of other experts are zero, of which comes zero."""
    weights = layer.experts
    up = weights.gate_up_proj.transpose(1, 2).unflatten(1, (2, -1))
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):  # pyright: ignore
        known = formulas(lambda gate, up: up * weights.act_fn(gate), 2, up.dtype) if layer.top_k == 1 else None
    if known is None:
        return None
    rows = hidden_states.reshape(-1, layer.hidden_dim)
    scores, logits = layer.router(rows)
    ids = torch.topk(logits, 1, dim=1).indices
    routed = experts(
        rows * scores.gather(1, ids), ids, torch.ones_like(ids, dtype=rows.dtype), up, None,
        weights.down_proj.transpose(1, 2), None, *known,
    )  # fmt: skip
    return layer.shared_expert(rows) + routed, logits


def _blocks(layer: Any, between: bool) -> tuple[Tensor, Tensor | None]:
    """The weight `[experts, g, f, d]` and the bias `[experts, g, f]` as views of the layer's."""
    name, count = ("gate_up_proj", 2) if layer.has_gate else ("up_proj", 1)
    weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias") if layer.has_bias else None
    if layer.is_transposed:
        weight = weight.transpose(1, 2)
    return _cut(weight, count, between), None if bias is None else _cut(bias, count, between)


def _cut(x: Tensor, count: int, between: bool) -> Tensor:
    return x.unflatten(1, (-1, count)).transpose(1, 2) if between else x.unflatten(1, (count, -1))


def _activation(layer: Any) -> tuple[tuple[str, str], bool] | None:
    """The formula between the products and that of its gradients, and whether gates lie between the rest; None if there
    is none."""
    if getattr(layer, "has_post_expert_norm", False) or layer._is_expert_parallel:
        return None
    weight = layer.gate_up_proj if layer.has_gate else layer.up_proj
    count, between = 2 if layer.has_gate else 1, False

    def act(*halves: Tensor) -> Tensor:
        nonlocal between
        if count == 1:
            return layer.act_fn(*halves)
        both = _GateUp(*halves)
        result = layer._apply_gate(both)
        between = bool(both.between)
        return result

    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):  # pyright: ignore
        try:
            found = formulas(act, count, weight.dtype)
        except Exception:  # (whatever the layer does with what is no tensor: it is traced as it is)
            return None
    return None if found is None else (found, between)


def formulas(act: Callable[..., Tensor], count: int, dtype: torch.dtype) -> tuple[str, str] | None:
    """`act` of one value, or of a gate and a value, as a formula, and the formula of its gradients. None if it is not
    elementwise."""
    generator = torch.Generator().manual_seed(0)
    *given, grad = (torch.randn(_SAMPLE, generator=generator, dtype=dtype) for _ in range(count + 1))
    names = ("gate", "up")[2 - count :]

    def slope(*values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in values[:-1]]
        with torch.enable_grad():
            return torch.autograd.grad(act(*leaves), leaves, values[-1])

    with torch.no_grad():
        forward, backward = make_fx(act)(*given), make_fx(slope)(*given, grad)
        for made in (forward, backward):
            made.graph.eliminate_dead_code()
        texts = _text(forward.graph, names), _text(backward.graph, (*names, "grad"))
        if texts[0] is None or texts[1] is None:
            return None
        made = formula(texts[0], *names)(*given), formula(texts[1], *names, "grad")(*given, grad)
        if not torch.equal(made[0], act(*given)) or not all(map(torch.equal, _tuple(made[1]), slope(*given, grad))):
            return None
    return texts[0], texts[1]


def _tuple(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _text(graph: fx.Graph, names: tuple[str, ...]) -> str | None:
    """A graph of elementwise operators as a formula. None if it has others, or tensors of its own."""
    texts: dict[fx.Node, str] = {}
    steps: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            texts[node] = names[len(texts)]
        elif node.op == "call_function":
            call = call_text(node, texts)
            if call is None:
                return None
            if len(node.users) > 1 and node.target is not aten.detach.default:
                steps.append(f"{_name(len(steps))} = {call}")
                call = _name(len(steps) - 1)
            texts[node] = call
        elif node.op == "output":
            made = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            if not all(isinstance(one, fx.Node) for one in made):
                return None
            return "; ".join([*steps, ", ".join(texts[one] for one in made)])
        else:
            return None
    return None


def _name(number: int) -> str:
    return f"v{number}"


def call_text(node: fx.Node, texts: dict[fx.Node, str]) -> str | None:
    """A call of an elementwise operator as a formula, given those of its operands; None for other calls."""
    if node.target is aten.detach.default or node.target is aten.alias.default:
        return texts[node.all_input_nodes[0]]
    if node.target is aten._to_copy.default:
        kinds = set(node.kwargs) - {"dtype"}
        return None if kinds else f"to({texts[node.all_input_nodes[0]]}, {_literal(node.kwargs['dtype'], texts)})"
    if node.target is aten.scalar_tensor.default:
        return repr(node.args[0])
    target = node.target
    if (
        not isinstance(target, torch._ops.OpOverload)
        or torch.Tag.pointwise not in target.tags
        or target.namespace != "aten"
    ):
        return None
    name = target._opname
    if target._schema.is_mutable:
        if not name.endswith("_") or len(node.all_input_nodes[0].users) > 1:
            return None
        name = name.removesuffix("_")
    arguments = [_literal(value, texts) for value in node.args]
    arguments += [f"{name}={_literal(value, texts)}" for name, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _literal(value: Any, texts: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return texts[value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)
