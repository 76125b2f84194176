"""Capture: the graph computes what the model computes, says where everything comes from, and leaves the model alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import shardc
from shardc.capture.trace import capture, flatten
from shardc.errors import CaptureError, LayoutError
from shardc.ir.constrain import check, parse, serialise
from shardc.ir.program import Constant, Program, Role, value_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.arange(2 * 8).reshape(2, 8) * 5 % 32


def execute(program: Program, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run the captured graph on real values, tangents one: the user's output, the mutations and gradients by name."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    leaves, _ = flatten((args, kwargs))
    values: list[Tensor] = []
    for node, port in zip(program.placeholders, program.inputs, strict=True):
        if port.role is Role.INPUT:
            values.append(leaves[port.index])
        elif port.role is Role.TANGENT:
            values.append(torch.ones(value_of(node).shape, dtype=value_of(node).dtype))
        else:
            values.append(program.constants[port.name] if port.role is Role.CONSTANT else state[port.name])
        assert values[-1].shape == value_of(node).shape and values[-1].dtype == value_of(node).dtype
    with torch.no_grad():
        results = fx.Interpreter(fx.GraphModule(nn.Module(), program.graph)).run(*[v.detach().clone() for v in values])
    found: dict[Role, Any] = {Role.OUTPUT: {}, Role.MUTATION: {}, Role.GRADIENT: {}}
    for position, (port, value) in enumerate(zip(program.outputs, results, strict=True)):
        found[port.role][position if port.role is Role.OUTPUT else port.name] = value
    flat = [leaf.value if isinstance(leaf, Constant) else results[leaf] for leaf in program.out_leaves]
    return pytree.tree_unflatten(flat, program.out_spec), found[Role.MUTATION], found[Role.GRADIENT]


def eager(module: nn.Module, args: Any, kwargs: Any, chosen: Callable[[Tensor], bool]) -> Any:
    """The same from plain PyTorch, with a cotangent of ones for the chosen outputs."""
    module = copy.deepcopy(module)
    output = module(*args, **kwargs)
    roots = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor) and leaf.requires_grad and chosen(leaf)]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return output, dict(module.named_buffers()), {name: p.grad for name, p in module.named_parameters()}


def verify(module: nn.Module, *args: Any, scalar: bool = True, **kwargs: Any) -> Program:
    """The captured graph gives the outputs, mutations and gradients of eager PyTorch, with the same random numbers."""
    module = module.double()
    program = capture(module, args, kwargs)
    program.graph.lint()
    torch.manual_seed(7)
    output, buffers, grads = eager(module, args, kwargs, lambda leaf: leaf.ndim == 0 if scalar else True)
    torch.manual_seed(7)
    got, mutations, got_grads = execute(program, module, args, kwargs)
    assert type(got) is type(output)
    for a, b in zip(flatten(got)[0], flatten(output)[0], strict=True):
        assert_same(a, b)
    for name, before in module.named_buffers():
        if name in mutations:
            assert_same(mutations[name], buffers[name])
        else:
            assert torch.equal(before, buffers[name]), name
    assert set(got_grads) == {n for n, p in module.named_parameters() if p.requires_grad}
    for name, grad in got_grads.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            assert_same(grad, grads[name])
    check_metadata(program)
    return program


def assert_same(a: Any, b: Any) -> None:
    if isinstance(b, Tensor):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)
    else:
        assert a == b


def check_metadata(program: Program) -> None:
    """Every value has its shape and place, positional arguments, a phase; forward does not depend on backward."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            assert node.op in ("placeholder", "output")
            continue
        assert {"val", "module", "source", "phase"} <= node.meta.keys()
        assert isinstance(node.meta["module"], str) and isinstance(node.meta["source"], str)
        name = str(node.target)
        assert not any(f".{word}." in name for word in ("detach", "alias", "t", "transpose", "reshape", "_unsafe_view"))
        assert "_assert" not in name and "lift_fresh" not in name
        if node.meta["phase"] == "forward":
            assert all(user.op == "placeholder" or user.meta["phase"] == "forward" for user in node.all_input_nodes)
        if isinstance(node.target, torch._ops.OpOverload):
            assert set(node.kwargs) <= {a.name for a in node.target._schema.arguments if a.kwarg_only}


def operators(program: Program) -> Counter[str]:
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return Counter(str(node.target) for node in calls)


def llama(**config: Any) -> nn.Module:
    config = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, **config}
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, **config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=16, use_cache=False)
    return hf.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **SMALL))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    return hf.ResNetForImageClassification(config)


def mixtral(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}
    return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, use_cache=False, **sizes, **config))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).split(w, dim=-1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(32, 16), nn.Embedding(8, 16)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(16, 4, dropout) for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        x = self.drop(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Small(nn.Module):
    """A linear layer, then whatever the test wants."""

    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(4))
        self.then = then

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.then(self, self.inner(x), *args, **kwargs)


X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


def test_llama() -> None:
    program = verify(llama(), input_ids=TOKENS, labels=TOKENS)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    named = [n for n in calls if n.meta["module"]]
    assert len(named) >= 0.95 * len(calls)
    assert all(n.meta["source"] for n in calls)
    ops = operators(program)
    assert ops["shardc.attention.default"] == ops["shardc.attention_backward.default"] == 2
    up = next(n for n in calls if "mlp_up_proj_weight" in str(n.args))
    assert up.meta["module"] == "model.layers.0.mlp.up_proj" and up.meta["source"].startswith("modeling_llama.py:")
    backward = next(n for n in calls if n.target is torch.ops.shardc.attention_backward.default)
    assert backward.meta["module"] == "model.layers.1.self_attn" and backward.meta["phase"] == "backward"
    assert isinstance(
        pytree.tree_unflatten([None] * program.out_spec.num_leaves, program.out_spec), hf.utils.ModelOutput
    )


def test_llama_with_padding_mask() -> None:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 6:] = 0
    program = verify(llama(), input_ids=TOKENS, labels=TOKENS, attention_mask=mask)
    assert operators(program)["shardc.attention.default"] == 2


def test_gpt2_is_tied() -> None:
    program = verify(gpt2().eval(), input_ids=TOKENS, labels=TOKENS)
    assert program.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert sum(port.name == "transformer.wte.weight" for port in program.inputs) == 1


def test_shared_modules_are_tied() -> None:
    inner = nn.Linear(4, 4)
    module = nn.Sequential(inner, nn.Tanh(), inner)
    program = verify(module, X, scalar=False)
    assert program.tied == {"2.weight": "0.weight", "2.bias": "0.bias"}


def test_key_value_caches_come_back() -> None:
    model = llama().double()
    options = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": True}
    program = capture(model, (), options)
    output, _, _ = execute(program, model, (), options)
    expected = model(**options).past_key_values
    assert type(output.past_key_values) is type(expected)
    assert_same(output.past_key_values.layers[1].keys, expected.layers[1].keys)


def test_checkpointing_is_ignored() -> None:
    """AOTAutograd switches saved-tensor hooks off: what to recompute is the plan's decision."""
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert operators(verify(model, input_ids=TOKENS, labels=TOKENS))["shardc.attention.default"] == 2


def test_placeholder_names_are_unique_identifiers() -> None:
    module = Small(lambda self, y: (y * self.lambda_ * self.inner_weight).sum())
    module.register_parameter("lambda_", nn.Parameter(torch.ones(4)))
    module.register_parameter("inner_weight", nn.Parameter(torch.ones(4)))
    names = [node.target for node in verify(module, X).placeholders]
    assert len(set(names)) == len(names)


def test_dropout_draws_the_same_random_numbers() -> None:
    verify(gpt2(), input_ids=TOKENS, labels=TOKENS)
    program = verify(GPT(), TOKENS, TOKENS)
    assert not any("attention" in op or "flash" in op for op in operators(program))
    assert program.tied == {"head.weight": "tokens.weight"}


def test_bert() -> None:
    verify(bert().eval(), input_ids=TOKENS, labels=TOKENS)


def test_vit() -> None:
    verify(vit(), pixel_values=torch.randn(2, 3, 8, 8, dtype=torch.float64), labels=torch.tensor([0, 1]))


def test_resnet_updates_its_buffers() -> None:
    program = verify(resnet(), pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64), labels=torch.tensor([0, 1]))
    assert sum(port.name.endswith("running_mean") for port in program.outputs) == 6


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_mixtral(experts: str) -> None:
    model = mixtral(experts_implementation=experts)
    before = model.config._experts_implementation
    verify(model, input_ids=TOKENS, labels=TOKENS)
    assert model.config._experts_implementation == before


def test_several_outputs_without_a_loss() -> None:
    program = verify(GPT(0.0), TOKENS, scalar=False)
    assert [port.role for port in program.inputs].count(Role.TANGENT) == 1
    assert operators(program)["shardc.attention.default"] == 2


def test_forward_only() -> None:
    module = GPT(0.0).double().eval()
    program = capture(module, (TOKENS,), grad=False)
    got, mutations, grads = execute(program, module, (TOKENS,), {})
    torch.testing.assert_close(got, module(TOKENS))
    assert not mutations and not grads
    assert {node.meta["phase"] for node in program.graph.nodes if node.op == "call_function"} == {"forward"}
    frozen = capture(copy.deepcopy(module).requires_grad_(False), (TOKENS,))
    assert len(frozen.graph.nodes) == len(program.graph.nodes)


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float
    extra: Tensor | None = None


@dataclasses.dataclass
class Answer:
    mean: Tensor
    rest: dict[str, Any]


def test_structures_come_back() -> None:
    def then(self: nn.Module, y: Tensor, batch: Batch) -> Answer:
        y = y * batch.scale
        rest = {"list": [y, (y, None, 3)], "input": batch.x, "ids": y.argmax(-1), "same": y, "view": y[0], "flag": True}
        return Answer((y * batch.x).mean(), rest)

    program = verify(Small(then), X, Batch(X + 1, 2.0))
    assert [port.index for port in program.inputs if port.role is Role.INPUT] == [0, 1]


def test_choice_of_the_differentiable_outputs() -> None:
    def then(self: nn.Module, y: Tensor) -> Any:
        return y.sum(), y * 2, y.argmax()

    def tangents(**options: Any) -> list[int]:
        program = capture(Small(then).double(), (X,), **options)
        return [port.index for port in program.inputs if port.role is Role.TANGENT]

    assert tangents() == [0]
    assert tangents(differentiable=frozenset({0, 1})) == [0, 1]
    assert tangents(differentiable=frozenset({1})) == [1]
    assert tangents(differentiable=frozenset()) == []
    with pytest.raises(CaptureError, match=r"output 2 does not require a gradient"):
        tangents(differentiable=frozenset({2}))


def test_inputs_may_require_gradients_and_be_overwritten() -> None:
    module = Small(lambda self, y: (y * y).sum()).double()
    program = capture(module, (X.clone().requires_grad_(),))
    _, _, grads = execute(program, module, (X,), {})
    torch.testing.assert_close(grads["input:0"], 2 * module.inner(X) @ module.inner.weight)

    module = Small(lambda self, y, count: (y.sum(), count.add_(1))[0]).double()
    program = capture(module, (X, torch.zeros(3)))
    _, mutations, _ = execute(program, module, (X, torch.zeros(3)), {})
    torch.testing.assert_close(mutations["input:1"], torch.ones(3))


def test_buffers_assigned_or_written_are_mutations() -> None:
    def assign(self: Any, y: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return y.sum()

    def write(self: Any, y: Tensor) -> Tensor:
        self.steps += y.detach().mean(0)
        return y.sum() + self.steps.sum()

    for then in (assign, write):
        program = verify(Small(then), X)
        assert [port.name for port in program.outputs if port.role is Role.MUTATION] == ["steps"]


def test_constants_become_placeholders() -> None:
    table = torch.arange(4, dtype=torch.float64)
    program = verify(Small(lambda self, y: ((y + table) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()), X)
    assert len(program.constants) == 2
    assert [port.name for port in program.inputs if port.role is Role.CONSTANT] == list(program.constants)


def test_recurrent_and_multihead_attention_layers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.rnn(x)
            return self.attention(x, x, x, need_weights=False)[0].square().mean()

    program = verify(Mixed(), torch.randn(2, 3, 4, dtype=torch.float64))
    assert operators(program)["shardc.attention.default"] == 1


@pytest.mark.parametrize("kind", ["gqa", "mask", "float mask", "learned mask", "3-D", "scale", "broadcast"])
def test_attention_means_what_torch_means(kind: str) -> None:
    def then(self: nn.Module, y: Tensor, q: Tensor, mask: Tensor) -> Tensor:
        k = torch.stack([y, y * 2]).unsqueeze(0).expand(2, 2, 2, 4)
        bias = y.sum(-1).expand(2, 4, 2, 2)
        options: dict[str, dict[str, Any]] = {
            "gqa": {"enable_gqa": True, "is_causal": True},
            "mask": {"attn_mask": mask, "enable_gqa": True},
            "float mask": {"attn_mask": mask.double(), "enable_gqa": True},
            "learned mask": {"attn_mask": bias, "enable_gqa": True},
            "scale": {"scale": 0.3, "enable_gqa": True},
        }
        if kind == "3-D":
            return F.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 1], is_causal=True).sum()
        if kind == "broadcast":
            return F.scaled_dot_product_attention(q[:, :1], k[:1, :1], k[:1, :1]).sum()
        return F.scaled_dot_product_attention(q, k, k + 1, **options[kind]).square().sum()

    q = torch.randn(2, 4, 2, 4, dtype=torch.float64)
    program = verify(Small(then), X, q, torch.tensor([[True, False], [True, True]]))
    fused = operators(program)["shardc.attention.default"]
    assert fused == (0 if kind in ("3-D", "learned mask", "broadcast") else 1)
    assert not any("scaled_dot" in name for name in operators(program))


def test_meta_models_give_the_same_graph() -> None:
    real = capture(llama(), (), {"input_ids": TOKENS, "labels": TOKENS})
    with torch.device("meta"):
        model = llama()
    tokens = TOKENS.to("meta")
    meta = capture(model, (), {"input_ids": tokens, "labels": tokens})
    assert [str(n.target) for n in meta.graph.nodes] == [str(n.target) for n in real.graph.nodes]
    assert all(value_of(n).device.type == "cpu" for n in meta.placeholders)


def snapshot(module: nn.Module) -> Any:
    registries = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    parts = [
        (part.training, sorted(vars(part)), *[dict(vars(part)[r]) for r in registries]) for part in module.modules()
    ]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    return parts, values, torch.get_rng_state(), torch.compiler._is_compiling_flag, F.scaled_dot_product_attention


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails: bool) -> None:
    def then(self: Any, y: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        self.last = y
        y = F.dropout(self.norm(y)) + torch.rand(4)
        return y.sum() if not fails or y.sum() > 0 else y.mean()

    module = Small(then)
    module.norm = nn.BatchNorm1d(4)
    parts, values, rng, *flags = snapshot(module)
    if fails:
        with pytest.raises(CaptureError):
            capture(module, (X.float(),))
    else:
        with pytest.warns(UserWarning, match="forward leaves something in calls, last"):
            capture(module, (X.float(),))
    now_parts, now_values, now_rng, *now_flags = snapshot(module)
    assert len(parts) == len(now_parts)
    for before, now in zip(parts, now_parts, strict=True):
        assert before[:2] == now[:2]
        for old, new in zip(before[2:], now[2:], strict=True):
            assert old.keys() == new.keys() and all(old[key] is new[key] for key in old)
    assert all(torch.equal(values[name], now_values[name]) for name in values)
    assert torch.equal(rng, now_rng) and flags == now_flags
    assert not nn.modules.module._global_forward_hooks and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "branch",
    [
        lambda y: y if y.sum() > 0 else -y,
        lambda y: y * y.max().item(),
        lambda y: y[y > 0],
        lambda y: y[: int(y.argmax())],
        lambda y: y.nonzero(),
    ],
)
def test_data_dependence_is_explained(branch: Callable[[Tensor], Tensor]) -> None:
    class Gate(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return branch(y)

    module = nn.ModuleDict({"gate": Gate()})
    module.forward = lambda x: module["gate"](x).sum()
    with pytest.raises(CaptureError) as caught:
        capture(module, (X,))
    message = str(caught.value)
    assert (
        "'gate'" in message and "test_capture.py:" in message and "lambda y: y" in message and "torch.where" in message
    )
    assert caught.value.__cause__ is not None


def test_other_failures_keep_their_cause() -> None:
    with pytest.raises(CaptureError, match=r"module 'inner'") as caught:
        capture(Small(lambda self, y: y), (torch.zeros(2, 5),))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_constrain_in_the_code_and_by_module_path() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = shardc.constrain(layer(x), ("dp", "?"))
            return x.sum()

    module = Net().double()
    assert shardc.constrain(X, ("dp", None)) is X
    program = capture(module, (X,), constraints={"layers.*": ("dp", ("sp", "tp"))})
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.shardc.constrain.default]
    found = Counter((n.args[1], n.meta["phase"]) for n in nodes)
    assert found == {(t, p): 2 for t in ("dp,?", "dp,(sp,tp)") for p in ("forward", "backward")}
    _, _, grads = execute(program, module, (X,), {})
    torch.testing.assert_close(grads["layers.1.bias"], torch.full((4,), 2.0, dtype=torch.float64))


def test_constraint_specs() -> None:
    spec = ("dp", None, "?", ("sp", "tp"))
    assert serialise(spec) == "dp,-,?,(sp,tp)" == serialise("dp, -, ?, (sp, tp)")
    assert parse(serialise(spec)) == (("dp",), (), None, ("sp", "tp"))
    assert serialise(()) == "" and parse("") == ()
    assert parse(serialise([("dp", "tp")])) == (("dp", "tp"),)
    with pytest.raises(LayoutError, match=r"2 entries but the tensor has 3 dims"):
        check("dp,-", 3, "constrain")
    with pytest.raises(LayoutError, match=r"uses axis 'dp' twice"):
        check("dp,(tp,dp)", 2, "constrain")
    with pytest.raises(LayoutError, match=r"no axis name"):
        serialise(("d p", None))
    with pytest.raises(LayoutError, match=r"constraint on inner: .* 1 entries but the tensor has 2 dims"):
        capture(Small(lambda self, y: y.sum()).double(), (X,), constraints={"inner": ("dp",)})


def test_arguments_stand_where_the_schema_has_them() -> None:
    program = verify(Small(lambda self, y: y.sum(dim=0).softmax(dim=-1, dtype=torch.float64).std(correction=0)), X)
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.sum.dim_IntList:
            assert len(node.args) >= 2
    assert math.isclose(sum(n.op == "output" for n in program.graph.nodes), 1)
