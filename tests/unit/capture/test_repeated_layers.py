"""Repeated layers: a trace of a few of them, with the others filled in, is the trace of all, or it is not used."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn
from torch.func import functional_call

import shardc.capture.trace
from shardc.capture.skipped_layers import Watch
from shardc.capture.trace import capture
from shardc.ir.program import Program, Role, value_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4, "intermediate_size": 64}
CAUSAL = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, "use_cache": False}
TOKENS = torch.arange(2 * 8).reshape(2, 8) * 5 % 32
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks in a row; `layers` may be called anything and hold anything."""

    def __init__(self, make: Callable[[int], nn.Module] = lambda _: Block(), depth: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.layers = nn.ModuleList(make(index) for index in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x).square().mean()


class Spy:
    """What captures did: whether a hole was filled, and why not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.filled: list[range] = []
        self.refused: list[str] = []
        fill, refuse = shardc.capture.trace.fill, Watch.refuse

        def filling(program: Program, number: int, repeat: Any) -> Program:
            try:
                program = fill(program, number, repeat)
            except Exception as error:
                self.refused.append(str(error))
                raise
            self.filled.append(repeat.hole)
            return program

        def refusing(watch: Watch, reason: str) -> None:
            self.refused.append(reason)
            refuse(watch, reason)

        patch.setattr(shardc.capture.trace, "fill", filling)
        patch.setattr(Watch, "refuse", refusing)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def in_full(module: nn.Module, patch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Program:
    """Capture twice, all layers traced the second time: the programs must be the same."""
    programs: list[Program] = []
    for patched in (False, True):
        with patch.context() as context:
            if patched:
                context.setattr(shardc.capture.trace, "find", lambda *_: [])
            programs.append(capture(module, args, kwargs, grad=torch.is_grad_enabled()))
    one, two = programs
    assert (one.inputs, one.outputs, one.out_leaves) == (two.inputs, two.outputs, two.out_leaves)
    assert (one.out_spec, one.tied, one.attached) == (two.out_spec, two.tied, two.attached)
    assert one.constants.keys() == two.constants.keys()
    one.graph.lint()
    for a, b in zip(one.graph.nodes, two.graph.nodes, strict=True):
        assert told(a) == told(b)
    return one


def told(node: fx.Node) -> Any:
    val = node.meta.get("val")
    values = val if isinstance(val, (tuple, list)) else [val]
    forms = [(v.shape, v.stride(), v.dtype, v.requires_grad) if isinstance(v, Tensor) else v for v in values]
    rest = {key: value for key, value in node.meta.items() if key != "val"}
    return node.op, str(node.target), node.name, str(node.args), str(node.kwargs), rest, forms


def check_values(program: Program, module: nn.Module, **kwargs: Any) -> None:
    """The loss and every gradient, as eager mode computes them."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inputs = list(kwargs.values())
    given = [
        inputs[port.index] if port.role is Role.INPUT
        else torch.ones(()) if port.role is Role.TANGENT
        else (program.constants | state)[port.name]
        for port in program.inputs
    ]  # fmt: skip
    with torch.no_grad():
        results = fx.Interpreter(fx.GraphModule(nn.Module(), program.graph)).run(*given)
    output = module(**kwargs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    for port, result in zip(program.outputs, results, strict=True):
        if port.role is Role.GRADIENT and result is not None:
            torch.testing.assert_close(result, module.get_parameter(port.name).grad)


def transformer(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 7, "n_head": 4, "n_positions": 16, "vocab_size": 32}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, use_cache=False))
    if name == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**CAUSAL, num_local_experts=4))
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL))
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 7, "num_heads": 4, "vocab_size": 32}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, use_cache=False, decoder_start_token_id=0))
    if name == "gemma2":  # a layer that looks at a window and one that looks at everything, in turn
        sizes = {**CAUSAL, "num_hidden_layers": 9, "head_dim": 8, "sliding_window": 4}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "t5", "gemma2"])
def test_transformers_are_stitched_to_what_a_full_trace_gives(
    name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = transformer(name)
    program = in_full(module, monkeypatch, input_ids=TOKENS, labels=TOKENS)
    hole = {"t5": [range(4, 6)] * 2, "gemma2": [range(5, 7)]}.get(name, [range(3, 6)])
    assert (spy.filled, spy.refused) == (hole, [])
    if name in ("llama", "mixtral"):
        check_values(program, module, input_ids=TOKENS, labels=TOKENS)


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1)


class Frozen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)


class Pair(Block):
    """Takes and returns two values, of which one only passes through."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x) * y, y


class Pairs(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            x, y = layer(x, y)
        return (x * y).sum()


class Attributes(nn.Module):
    """Equal children that are no list, with other names than numbers."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefgh":
            self.add_module(name, Block())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.sum()


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "blocks": Stack,
    "random": lambda: Stack(lambda _: Dropping()),
    "frozen": lambda: Stack(lambda _: Frozen()),
    "two_kinds": lambda: Stack(lambda i: Block() if i % 2 else nn.Linear(8, 8), 10),
    "one_of_another_kind_first": lambda: Stack(lambda i: Block() if i else nn.Linear(8, 8), 9),
    "shared_value": lambda: Pairs(lambda _: Pair()),
    "children": Attributes,
    "sequential": lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 7),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_are_stitched(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    module = PLAIN[name]()
    program = in_full(module, monkeypatch, X[None] if name == "torch" else X)
    assert len(spy.filled) == 1 and not spy.refused
    if name in ("blocks", "shared_value", "two_kinds"):
        check_values(program, module, x=X)


def test_without_gradients(spy: Spy) -> None:
    program = capture(Stack(), (X,), grad=False)
    assert spy.filled and {port.role for port in program.outputs} == {Role.OUTPUT}
    modules = {node.meta["module"] for node in program.graph.nodes if node.op == "call_function"}
    assert {f"layers.{i}.up" for i in range(8)} <= modules


def test_shallow_models_are_traced_in_full(spy: Spy) -> None:
    capture(Stack(depth=5), (X,))
    assert not spy.filled and not spy.refused


def test_values_are_shared_with_nothing_that_changes(spy: Spy) -> None:
    program = capture(Stack(), (X,))
    names = [node.name for node in program.graph.nodes]
    assert spy.filled and len(set(names)) == len(names)
    assert all(value_of(node) is not None for node in program.graph.nodes if node.op != "output")


# What must be traced in full. Every block below is equal to its neighbours from the outside.


class AtIndex(Block):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.index < 5 else -super().forward(x)


class Indexing(AtIndex):
    TABLE = (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return Block.forward(self, x) * self.TABLE[self.index]


class Swallowing(AtIndex):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return AtIndex.forward(self, x)
        except Exception:
            return x


class Given(Stack):
    """The loop hands every layer its index."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, index)
        return x.sum()


class Taking(Block):
    def forward(self, x: Tensor, index: int) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (2 if index > 4 else 1)


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class Replacing(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return Block.forward(self, x)


class Leaving(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return super().forward(x)


COUNT = {"calls": 0}
LOSSES: list[Tensor] = []


class Global(Block):
    def forward(self, x: Tensor) -> Tensor:
        COUNT["calls"] += 1
        return super().forward(x) * (1 if COUNT["calls"] % 8 < 5 else 2)


class OfClass(Block):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        OfClass.count += 1
        return super().forward(x) * (1 if OfClass.count % 8 < 5 else 2)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1.0))


class Constant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor([1.0, 2.0] * 4)


class Collecting(Stack):
    """What the layers return is used beyond the next layer."""

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return torch.stack(seen).sum()


class Some(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:6]:
            x = layer(x)
        return x.sum()


class Between(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x) * (2.0 if index > 4 else 1.0)
        return x.sum()


class Under(Stack):
    """The first layers are frozen by the loop."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.no_grad() if index < 5 else nullcontext():
                x = layer(x)
        return self.last(x).sum()


class Cast(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=index > 4):
                x = layer(x)
        return x.float().sum()


class Backwards(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x.sum()


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(layer(x))
        return x.sum()


class Lines(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:5]:
            x = layer(x)
        for layer in self.layers[5:]:
            x = layer(x)
        return x.sum()


class Skips(Stack):
    """A layer takes what an earlier one returned, besides what the last one did."""

    def forward(self, x: Tensor) -> Tensor:
        seen = [x, x]
        for layer in self.layers:
            seen.append(layer(seen[-1], seen[-2]))
        return seen[-1].sum()


class Adding(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + y


def hooked() -> nn.Module:
    module = Stack()
    module.layers[4].up.register_forward_hook(lambda *_: None)
    return module


def hooked_late() -> nn.Module:
    class Hooking(Stack):
        def forward(self, x: Tensor) -> Tensor:
            hook = self.layers[5].register_forward_hook(lambda part, given, result: result * 2)
            x = super().forward(x)
            hook.remove()
            return x

    return Hooking()


def tied() -> nn.Module:
    module = Stack()
    for layer in list(module.layers)[1:]:
        layer.up.weight = module.layers[0].up.weight
    return module


def shared() -> nn.Module:
    block = Block()
    return Stack(lambda _: block)


def wider() -> nn.Module:
    module = Stack()
    module.layers[4].up, module.layers[4].down = nn.Linear(8, 24), nn.Linear(24, 8)
    return module


def evaluated() -> nn.Module:
    module = Stack(lambda _: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)))
    module.layers[4].eval()
    return module


def frozen() -> nn.Module:
    module = Stack()
    module.layers[4].up.weight.requires_grad_(False)
    return module


def losing() -> nn.Module:
    class Losing(Block):
        def forward(self, x: Tensor) -> Tensor:
            LOSSES.append(x.square().mean())
            return super().forward(x)

    class Summing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            LOSSES.clear()
            loss = super().forward(x) + torch.stack(LOSSES).sum()
            LOSSES.clear()
            return loss

    return Summing(lambda _: Losing())


class Penalised(Stack):
    """The loss is also one of what its layers hold."""

    def penalty(self, layer: nn.Module) -> Tensor:
        return sum((p.square().sum() for p in layer.parameters()), torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(self.penalty(layer) for layer in self.layers)


class PenalisedOnce(Penalised):
    def penalty(self, layer: nn.Module) -> Tensor:
        return super().penalty(layer) if layer is self.layers[5] else torch.zeros(())


class Measured(Penalised):
    @torch.no_grad()
    def penalty(self, layer: nn.Module) -> Tensor:
        return super().penalty(layer)


class Counted(Stack):
    """Looks at its parameters, which are as many objects as there are."""

    def forward(self, x: Tensor) -> Tensor:
        parameters = list(self.parameters())
        return super().forward(x) / sum(p.numel() for p in parameters) * len({id(p) for p in parameters})


class Stepping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))


class SteppingAll(Stack):
    def __init__(self) -> None:
        super().__init__(lambda _: Stepping())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.steps = layer.steps + 1
        return super().forward(x)


class SteppingOne(SteppingAll):
    def forward(self, x: Tensor) -> Tensor:
        y = Stack.forward(self, x)
        self.layers[5].steps = y.detach()
        return y


class Lending(Stack):
    """Calls its layers with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = nn.ParameterList(torch.randn_like(self.layers[0].up.weight) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = functional_call(layer, {"up.weight": self.lent[0 if i < 4 else 1]}, (x,))
        return x.sum()


class Hooking(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 4:
                x.register_hook(lambda grad: grad * 2)
        return x.sum()


class HookingWeight(Stack):
    def forward(self, x: Tensor) -> Tensor:
        self.layers[4].up.weight.register_hook(lambda grad: grad * 2)
        return super().forward(x)


def closed_over() -> nn.Module:
    count = 0

    class Closed(Block):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return super().forward(x) * (1 if count % 8 < 5 else 2)

    return Stack(lambda _: Closed())


IN_FULL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "branch_on_index": (lambda: Stack(AtIndex), "position"),
    "table_by_index": (lambda: Stack(Indexing), "position"),
    "swallowed": (lambda: Stack(Swallowing), "position"),
    "index_given": (lambda: Given(lambda _: Taking()), "another value"),
    "buffer_in_place": (lambda: Stack(lambda _: Counting()), "in place"),
    "buffer_replaced": (lambda: Stack(lambda _: Replacing()), "attributes"),
    "attribute": (lambda: Stack(lambda _: Leaving()), "attributes"),
    "global": (lambda: Stack(lambda _: Global()), "attributes"),
    "class_attribute": (lambda: Stack(lambda _: OfClass()), "attributes"),
    "closure": (closed_over, "attributes"),
    "global_losses": (losing, "attributes"),
    "input_in_place": (lambda: Stack(lambda _: InPlace()), "in place"),
    "constants": (lambda: Stack(lambda _: Constant()), "elsewhere"),
    "collected": (lambda: Collecting(), "elsewhere"),
    "some": (lambda: Some(), "not every layer"),
    "between": (lambda: Between(), "another tensor"),
    "no_grad": (lambda: Under(), "switches"),
    "autocast": (lambda: Cast(), "switches"),
    "backwards": (lambda: Backwards(), "in turn"),
    "twice": (lambda: Twice(), "in turn"),
    "lines": (lambda: Lines(), "switches"),
    "skips": (lambda: Skips(lambda _: Adding()), "another tensor"),
    "buffers_replaced": (lambda: SteppingAll(), "other tensors"),
    "buffer_replaced_after": (lambda: SteppingOne(), "other tensors"),
    "weights_lent": (lambda: Lending(), "other tensors"),
    "hook_on_a_result": (lambda: Hooking(), "hook"),
    "hook_on_a_weight": (lambda: HookingWeight(), "hook"),
    "penalty": (lambda: Penalised(), ""),
    "penalty_on_one": (lambda: PenalisedOnce(), ""),
    "penalty_without_gradient": (lambda: Measured(), ""),
    "hook": (hooked, ""),
    "hook_during_forward": (hooked_late, "differ"),
    "tied": (tied, ""),
    "one_layer_everywhere": (shared, ""),
    "wider": (wider, ""),
    "evaluated": (evaluated, ""),
    "frozen": (frozen, ""),
}


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
            return super().forward(x) if math.isfinite(random.random()) else x

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
