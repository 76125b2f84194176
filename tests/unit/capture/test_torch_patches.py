"""Every use of something private to torch or transformers: each test fails if another version means something else."""

from __future__ import annotations

import inspect
import os
import random
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._decomp import decompositions
from torch._decomp.decompositions_for_rng import PhiloxState, PhiloxStateTracker
from torch.fx.graph_module import _loader
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from checks.captured import operators
from shardc.capture.experts.written import WrittenExperts
from shardc.capture.inputs import flatten
from shardc.capture.side_effects.state_values import StateValues
from shardc.capture.torch_patches import transformers
from shardc.capture.torch_patches.ambient_modes import modes, unobserved
from shardc.capture.torch_patches.aot_autograd import input_index, joint_graph, output_kinds, tangent_index
from shardc.capture.torch_patches.attention.flex import FlexAttention
from shardc.capture.torch_patches.attention.notes import Notes
from shardc.capture.torch_patches.attention.written import Recognition
from shardc.capture.torch_patches.compiling_flag import CompilingFlag
from shardc.capture.torch_patches.eager_semantics import patched
from shardc.capture.torch_patches.fake_tensors import (
    fake_dynamic,
    fake_like,
    fake_mode,
    is_data_dependent,
    is_fake,
    require_equal,
    same_shape,
)
from shardc.capture.torch_patches.module_internals import (
    dict_version,
    has_global_hooks,
    has_gradient_hooks,
    namespace_of,
    version,
)
from shardc.capture.torch_patches.provenance_mode import Provenance, provenance_of
from shardc.capture.torch_patches.symbols import Symbols, is_symbolic
from shardc.capture.torch_patches.tracing_flags import tracing_flags
from shardc.capture.trace import capture
from shardc.errors import CaptureError

aten = torch.ops.aten


def traced(function: Callable[..., Any], *args: Tensor) -> fx.Graph:
    with ExitStack() as stack:
        return joint_graph(stack, function, args).graph


def weight_buffer_input() -> tuple[Tensor, Tensor, Tensor]:
    mode = fake_mode()
    weight, buffer, x = (fake_like(mode, torch.empty(4, 4)) for _ in range(3))
    return weight.requires_grad_(), buffer, x


def updated(weight: Tensor, buffer: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    buffer.add_(1)
    return ((x @ weight).sum(),)


# --- AOTAutograd


def test_the_ends_of_a_joint_graph_are_told_apart() -> None:
    graph = traced(updated, *weight_buffer_input())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    assert [input_index(node) for node in placeholders] == [0, 1, 2, None]
    assert [tangent_index(node) for node in placeholders] == [None, None, None, 0]
    kinds = [kind for kind in output_kinds(graph) if kind[0]]
    assert sorted(kinds) == [("gradient", 0), ("mutation", 1), ("output", 0)]
    assert aten.mm.default in [node.target for node in graph.nodes]  # one graph of ATen, forward and backward


def test_no_state_of_a_generator_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PhiloxState, "__init__", lambda _: pytest.fail("nothing reads it"))
    before = vars(PhiloxStateTracker)["reset"]
    traced(updated, *weight_buffer_input())
    assert vars(PhiloxStateTracker)["reset"] is before


def test_no_code_of_a_graph_is_written() -> None:
    before = len(_loader.eval_cache)
    graph = traced(updated, *weight_buffer_input())
    assert len(_loader.eval_cache) == before and aten.mm.default in [node.target for node in graph.nodes]
    fx.symbolic_trace(lambda x: x + 1)
    assert len(_loader.eval_cache) == before + 1  # what it would be otherwise


def test_an_argument_of_an_unknown_kind_is_refused() -> None:
    graph = traced(updated, *weight_buffer_input())
    gradient = next(end for end in graph.output_node().meta["desc"] if hasattr(end, "grad_of"))
    object.__setattr__(gradient, "grad_of", object())
    with pytest.raises(CaptureError, match="traced an input of kind object, which shardc does not know"):
        output_kinds(graph)


# --- fake tensors and symbols


def test_a_fake_tensor_has_shape_and_strides_and_is_on_the_cpu() -> None:
    original = torch.empty(3, 5, device="meta", dtype=torch.bfloat16).t()
    fake = fake_like(fake_mode(), original)
    assert is_fake(fake) and not is_fake(original)
    assert (fake.shape, fake.stride(), fake.dtype) == (original.shape, original.stride(), original.dtype)
    assert fake.device.type == "cpu" and (fake @ fake.t()).shape == (5, 5)
    assert is_fake(fake + torch.ones(5, 3))  # a constant of the program may meet it


def test_dynamic_dims_are_symbols() -> None:
    mode = fake_mode(dynamic=True)
    one, two = (fake_dynamic(mode, torch.empty(6, 4), [0], name) for name in ("one", "two"))
    assert is_symbolic(one.shape[0]) and not is_symbolic(one.shape[1])
    assert not same_shape(one.shape, two.shape)
    assert mode.shape_env is not None and not mode.shape_env.guards  # the question made none
    require_equal(one.shape[0], two.shape[0])
    assert same_shape((one + two).shape, one.shape) and is_symbolic((one + two).shape[0])


def test_guards_are_checked_against_sizes() -> None:
    x = fake_dynamic(fake_mode(dynamic=True), torch.empty(6, 4), [0], "x")
    size: Any = x.shape[0]
    assert bool(size % 2 == 0)  # a guard
    symbols = Symbols({"batch": size})
    assert symbols.fixed == {}
    assert [symbols.hold({"batch": n}) for n in (6, 7, 8, 1)] == [True, False, True, False]
    assert symbols.evaluator({"batch": 8})(size * 3) == 24


def test_a_size_that_the_code_fixes_is_told() -> None:
    x = fake_dynamic(fake_mode(dynamic=True), torch.empty(6, 4), [0], "x")
    size: Any = x.shape[0]
    assert bool(size == 6)
    assert Symbols({"batch": size}).fixed == {"batch": 6}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ask", [lambda x: bool(x.sum() > 0), lambda x: bool(x.nonzero().shape[0] > 3)])
def test_asking_for_values_is_told_from_other_failures(ask: Callable[[Tensor], object], dynamic: bool) -> None:
    x = fake_like(fake_mode(dynamic), torch.empty(4))
    with pytest.raises(Exception) as failure:
        ask(x)
    assert is_data_dependent(failure.value)
    with pytest.raises(Exception) as failure:
        _ = x @ fake_like(x.fake_mode, torch.empty(5))
    assert not is_data_dependent(failure.value)


# --- modes, hooks, versions


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_unobserved_hides_from_function_modes() -> None:
    x = torch.ones(2)
    with Listening() as mode:
        with unobserved():
            x.add(1)
        assert mode.heard == []
        x.add(1)
    assert mode.heard == ["add"]


def test_modes_are_told_apart() -> None:
    before = modes()
    with Listening():
        assert modes() != before
    with Dispatching():
        assert modes() != before
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert modes() != before
    assert modes() == before


def test_global_hooks_are_seen() -> None:
    assert not has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert has_global_hooks()
    finally:
        handle.remove()
    assert not has_global_hooks()


def test_gradient_hooks_and_versions_of_tensors() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not has_gradient_hooks(x)
    x.register_hook(lambda grad: grad)
    assert has_gradient_hooks(x)
    y = torch.ones(2)
    before = version(y)
    y.add_(1)
    assert version(y) > before


# --- provenance


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)).sum()


def test_versions_of_dicts() -> None:
    """Every change of a dict changes its version, also of a module's attributes and of a class's namespace."""

    class Part(nn.Module):
        scale = 1.0

    part = Part()
    part.extra = 1
    changes: list[tuple[dict[str, Any], Callable[[], object]]] = [
        (vars(part), lambda: setattr(part, "extra", 2)),
        (vars(part), lambda: delattr(part, "extra")),
        (vars(part), lambda: vars(part).update(extra=3)),
        (part._buffers, lambda: part.register_buffer("seen", torch.ones(2))),
        (part._buffers, lambda: setattr(part, "seen", torch.zeros(2))),
        (namespace_of(Part), lambda: setattr(Part, "scale", 2.0)),
    ]
    for held, change in changes:
        before = dict_version(held)
        assert dict_version(held) == before
        change()
        assert dict_version(held) != before


def test_forward_and_backward_nodes_know_module_and_line() -> None:
    model = Layers()
    values = StateValues(lambda: None)
    provenance = Provenance(
        model, lambda path, output: None, lambda *_: None, lambda *_: (), Recognition(), WrittenExperts(), values
    )

    def function(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        with provenance:
            return (torch.func.functional_call(model, {"up.weight": weight}, x),)

    weight, _, x = weight_buffer_input()
    with ExitStack() as stack:
        stack.enter_context(provenance.tracking())
        graph = joint_graph(stack, function, (weight, x)).graph
    known = {node.name: provenance_of(node) for node in graph.nodes if node.op == "call_function"}
    line = inspect.getsourcelines(Layers.forward)[1] + 1
    products = [place for name, place in known.items() if name.startswith("mm")]
    assert len(products) == 2 and set(products) == {("up", f"test_torch_patches.py:{line}")}
    assert known["relu"] == ("", f"test_torch_patches.py:{line}")


# --- switches and patches


def test_switches_are_set_and_set_back() -> None:
    states = torch.get_rng_state(), random.getstate()
    mkldnn = torch.backends.mkldnn.enabled
    with tracing_flags(nn.Module(), CompilingFlag()):
        assert isinstance(torch.compiler._is_compiling_flag, CompilingFlag) and not torch.compiler.is_exporting()
        assert not torch._C._get_mkldnn_enabled()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # anomaly mode warns where it is entered
            with torch.autograd.detect_anomaly():
                assert not torch.is_anomaly_enabled()
        torch.rand(3)
        random.random()
    assert not torch.compiler.is_compiling() and torch.backends.mkldnn.enabled == mkldnn
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_only_the_users_code_is_told_that_nothing_compiles() -> None:
    told: set[tuple[str, int]] = set()
    flag = CompilingFlag(told)
    with tracing_flags(nn.Module(), flag):
        assert flag.last is None
        for answer in (False, True):
            assert bool(torch.compiler.is_compiling()) is answer and flag.last is not None
            told.add(flag.last)
        installed = compile("bool(is_compiling())", os.path.join(sysconfig.get_path("purelib"), "library.py"), "eval")
        assert eval(installed, {"is_compiling": torch.compiler.is_compiling}) is True


def test_patched_functions_have_the_parameters_that_torch_passes() -> None:
    encoder = nn.modules.transformer
    originals = decompositions._rnn_helper, encoder._detect_is_causal_mask
    with patched():
        replaced = decompositions._rnn_helper, encoder._detect_is_causal_mask
        assert all(new is not old for new, old in zip(replaced, originals, strict=True))
        for new, old in zip(replaced, originals, strict=True):
            assert len(inspect.signature(new).parameters) == len(inspect.signature(old).parameters)
    assert (decompositions._rnn_helper, encoder._detect_is_causal_mask) == originals


def test_dropout_between_recurrent_layers_is_traced() -> None:
    program = capture(nn.LSTM(3, 4, num_layers=3, dropout=0.5), (torch.randn(5, 2, 3),))
    assert operators(program)["aten.bernoulli.default"] + operators(program)["aten.native_dropout.default"] > 0
    quiet = capture(nn.LSTM(3, 4, num_layers=3), (torch.randn(5, 2, 3),))
    assert operators(quiet)["aten.bernoulli.default"] + operators(quiet)["aten.native_dropout.default"] == 0


def test_the_multilabel_loss_is_not_decomposed() -> None:
    operator = aten.multilabel_margin_loss_forward.default
    kernel = operator.py_kernels[DispatchKey.Autograd]
    with patched():
        assert DispatchKey.Autograd not in operator.py_kernels
    assert operator.py_kernels[DispatchKey.Autograd] is kernel
    program = capture(nn.MultiLabelMarginLoss(), (torch.randn(2, 4), torch.tensor([[3, 0, -1, 1], [1, -1, 2, 0]])))
    assert operators(program)["aten.multilabel_margin_loss_forward.default"] == 1


# --- transformers


def test_transformers_is_patched_for_the_time_of_a_trace() -> None:
    from transformers import masking_utils

    config = hf.MixtralConfig(experts_implementation="eager")
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    original = masking_utils.fast_all
    assert config._experts_implementation_internal == "eager"
    with transformers.patched(model):
        assert config._experts_implementation_internal in transformers.TRACEABLE_EXPERTS
        assert not masking_utils.fast_all(torch.ones(4, dtype=torch.bool))
    assert config._experts_implementation_internal == "eager"
    assert masking_utils.fast_all is original


def test_transformers_asks_whether_positions_are_packed() -> None:
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    with transformers.packing(lambda ids: ids.ndim == 1):
        assert masking_utils.find_packed_sequence_indices(torch.arange(4)) is None
        packed = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]]))
    assert packed.tolist() == [[0, 0, 1, 1]]
    assert masking_utils.find_packed_sequence_indices is original


def test_transformers_path_by_flex_attention_keeps_its_sinks() -> None:
    from transformers.modeling_utils import AttentionInterface

    flex, original = FlexAttention(Notes), AttentionInterface.get_interface
    with transformers.flex_sinks(flex):
        forward = AttentionInterface._global_mapping["flex_attention"]
        assert AttentionInterface().get_interface("flex_attention", print) is not forward
        assert AttentionInterface().get_interface("eager", print) is print
    assert AttentionInterface.get_interface is original


def test_key_value_caches_are_opened() -> None:
    cache = hf.DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    leaves, _ = flatten({"cache": cache})
    assert [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)] == [(1, 2, 3, 4)] * 2
