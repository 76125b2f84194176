"""Everything private to torch or transformers that capture leans on, in one place, each with its reason."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._functorch._aot_autograd import descriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from shardc.capture.result_checks import settle
from shardc.capture.torch_patches.eager_semantics import RESPELLED, corrected
from shardc.errors import CaptureError
from shardc.runtime.kernels.attention import attention as fused_attention

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""What fake tensors raise where the program asks for a value that only a run would know."""

TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")
"""The implementations of transformers' experts layers whose control flow does not depend on the routing."""

_TORCH = str(Path(torch.__file__).parent)
_SHARDC = str(Path(__file__).parents[2])
_RUNTIME = str(Path(__file__).resolve().parents[3] / "runtime")


def joint_graph(stack: ExitStack, function: Callable[..., Any], args: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The functional ATen graph of `function` and, where something requires a gradient, of its backward.

    AOTAutograd is the only tracer that handles mutated inputs, several differentiable outputs and views at once.
    """
    wrapper = nn.Module()
    wrapper.forward = function  # type: ignore[method-assign]
    joint = aot_export_joint_with_descriptors(
        stack, wrapper, tuple(args), decompositions={}, _disable_torch_fn_metadata_mode=True
    )
    settle(joint.graph_module)
    return joint.graph_module


def input_index(placeholder: fx.Node) -> int | None:
    """The position among the traced function's arguments, or None for a tangent."""
    what = placeholder.meta["desc"]
    return what.idx if isinstance(what, descriptors.PlainAOTInput) else None


def tangent_index(placeholder: fx.Node) -> int | None:
    """The position of the output whose tangent this is, or None if it is the tangent of something else."""
    what = placeholder.meta["desc"]
    if isinstance(what, descriptors.TangentAOTInput) and isinstance(what.output, descriptors.PlainAOTOutput):
        return what.output.idx
    return None


def output_kinds(graph: fx.Graph) -> list[tuple[str, int]]:
    """Per element of the output tuple: ("output", i), ("mutation" | "gradient", position of the argument), ("", 0)."""
    kinds: list[tuple[str, int]] = []
    for what in graph.output_node().meta["desc"]:
        if isinstance(what, descriptors.PlainAOTOutput):
            kinds.append(("output", what.idx))
        elif isinstance(what, descriptors.InputMutationAOTOutput):
            kinds.append(("mutation", _argument(what.mutated_input)))
        elif isinstance(what, descriptors.GradAOTOutput):
            kinds.append(("gradient", _argument(what.grad_of)))
        else:
            kinds.append(("", 0))
    return kinds


def _argument(what: object) -> int:
    if not isinstance(what, descriptors.PlainAOTInput):
        raise CaptureError(
            f"torch {torch.__version__} traced an input of kind {type(what).__name__}, which shardc does not know; "
            f"install a version of torch that it is tested with (constraints.txt)"
        )
    return what.idx


@contextmanager
def tracing_flags(module: nn.Module) -> Generator[None]:
    """Global switches for the time of a trace; all are set back, also after an error."""
    generator, python_random = torch.get_rng_state(), random.getstate()
    with ExitStack() as stack:
        # Libraries ask this flag before they branch on values. (With the exporting flag, transformers drops is_causal.)
        stack.enter_context(patch.object(torch.compiler, "_is_compiling_flag", True))
        # AOTAutograd traces in anomaly mode, which formats a Python stack per operator; Provenance knows the lines.
        # The user's own anomaly mode would look for nan in fakes.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(patch.object(torch.autograd, "detect_anomaly", lambda *_, **__: nullcontext()))
        # With mkldnn, LSTM and friends become fused CPU operators whose backward has no schema worth sharding.
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(corrected())
        if "transformers" in sys.modules:
            stack.enter_context(_transformers(module))
        try:
            yield
        finally:
            torch.set_rng_state(generator)
            random.setstate(python_random)


@contextmanager
def _transformers(module: nn.Module) -> Generator[None]:
    """What transformers models need to be traced; nothing of it outlives the trace."""
    with ExitStack() as stack:
        masks = sys.modules.get("transformers.masking_utils")
        if masks is not None:
            # Probing position ids for packed sequences would replace is_causal by a dense mask.
            stack.enter_context(patch.object(masks, "find_packed_sequence_indices", lambda *_, **__: None))
        configs = {id(config): config for part in module.modules() if (config := vars(part).get("config")) is not None}
        for config in configs.values():
            # The eager experts loop over the experts that were hit, which only the values know.
            chosen = getattr(config, "_experts_implementation_internal", TRACEABLE_EXPERTS[0])
            if chosen not in TRACEABLE_EXPERTS:
                stack.enter_context(patch.object(config, "_experts_implementation_internal", TRACEABLE_EXPERTS[0]))
        yield


class Provenance(TorchFunctionMode):
    """Writes module path and source line of every operator into the node metadata, and swaps attention.

    fx copies `nn_module_stack` to each node, and AOTAutograd copies it on to the backward nodes of the same operator
    (as `fwd_nn_module_stack`); here it holds the pair (module path, source line).
    """

    def __init__(self, module: nn.Module, after: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._after = after
        self._attention = F.scaled_dot_product_attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # `x.shape` and the like: no operator
            return func(*args, **kwargs)
        func = RESPELLED.get(func, func)
        meta = fx_traceback.current_meta
        before = meta.get("nn_module_stack")
        meta["nn_module_stack"] = (self.stack[-1], source_line(sys._getframe(1)))
        try:
            return attention(*args, **kwargs) if func is self._attention else func(*args, **kwargs)
        finally:
            meta["nn_module_stack"] = before

    @contextmanager
    def tracking(self) -> Generator[None]:
        """Follow the modules of the model, and see every operator. Global hooks: the model itself is not touched."""

        def enter(part: nn.Module, _: Any) -> None:
            path = self._paths.get(id(part))
            if path is not None:
                self.stack.append(path)

        def leave(part: nn.Module, _: Any, output: Any) -> Any:
            path = self._paths.get(id(part))
            if path is None:
                return None
            replaced = self._after(path, output)
            while len(self.stack) > 1 and self.stack.pop() != path:  # skips what an exception left behind
                pass
            return replaced

        with ExitStack() as stack:
            stack.callback(nn.modules.module.register_module_forward_pre_hook(enter).remove)
            stack.callback(nn.modules.module.register_module_forward_hook(leave).remove)
            # nn.MultiheadAttention reaches attention from inside torch, where function modes no longer look.
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
            stack.enter_context(fx_traceback.preserve_node_meta())
            yield


def provenance_of(node: fx.Node) -> tuple[str, str] | None:
    """(module path, source line) of a traced node, if the trace knows them."""
    return node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention as one operator forward and one backward, or else as its mathematics.

    The kernels that torch would pick depend on device and dropout, and a captured CPU kernel does not run elsewhere.
    """
    heads = query.shape[-3] if query.ndim >= 3 else 1
    if enable_gqa and heads != key.shape[-3]:
        key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    plain = query.ndim == key.ndim == value.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    free_mask = attn_mask is None or not (is_causal or attn_mask.requires_grad)
    if dropout_p == 0.0 and plain and free_mask:
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return fused_attention(query, key, value, attn_mask, is_causal, scale)[0]
    with sdpa_kernel(SDPBackend.MATH):
        return _TORCH_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


_TORCH_ATTENTION = F.scaled_dot_product_attention


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """repeat_interleave of the heads, written so that ATen shows views and one copy."""
    *batch, own, length, size = x.shape
    return x.unsqueeze(-3).expand(*batch, own, heads // own, length, size).reshape(*batch, heads, length, size)


unobserved = torch._C.DisableTorchFunction
"""While this is entered no function mode is told of what is done to tensors."""


def modes() -> tuple[Any, ...]:
    """What user code may have wrapped around a call: function modes, dispatch modes, hooks on saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), hooks


def is_user_code(code: CodeType) -> bool:
    """Whether the code is neither torch's nor shardc's."""
    return _is_of_user(code.co_filename)


@cache
def _is_of_user(filename: str) -> bool:
    return not filename.startswith((_TORCH, _SHARDC, _RUNTIME, "<frozen", "<eval_with_key"))


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of user code, seen from `frame` outwards."""
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    return frame


def source_line(frame: FrameType | None) -> str:
    """`model.py:41`, the innermost line of user code."""
    frame = user_frame(frame)
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def failing_frame(traceback: TracebackType | None) -> tuple[FrameType, int] | None:
    """The innermost frame of user code that an exception passed through, and the line in it."""
    found: tuple[FrameType, int] | None = None
    while traceback is not None:
        if is_user_code(traceback.tb_frame.f_code):
            found = traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
    return found


def fake_mode(dynamic: bool = False) -> FakeTensorMode:
    """Fake tensors, whose shapes may hold symbols if `dynamic`; real tensors that the program made itself (constants)
    may mix with them."""
    if not dynamic:
        return FakeTensorMode(allow_non_fake_inputs=True)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=False)


def fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """A fake CPU tensor with shape, strides and dtype of `tensor`, which may be on meta; nothing is allocated."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, empty, torch.device("cpu"))


def fake_dynamic(mode: FakeTensorMode, tensor: torch.Tensor, dims: Iterable[int], name: str) -> FakeTensor:
    """Like `fake_like`, with symbols for the sizes of `dims`."""
    chosen = set(dims)
    kinds = [DimDynamic.DYNAMIC if dim in chosen else DimDynamic.STATIC for dim in range(tensor.ndim)]
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return mode.from_tensor(
        real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds), source=ConstantSource(name)
    )


def is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


class Symbols:
    """Named sizes of one trace, and what the trace assumed of them (torch's guards)."""

    def __init__(self, sizes: Mapping[str, torch.SymInt]) -> None:
        self._env: ShapeEnv = next(iter(sizes.values())).node.shape_env
        self._named = {name: self._env.replace(size.node.expr) for name, size in sizes.items()}
        self.fixed = {name: int(expr) for name, expr in self._named.items() if not expr.free_symbols}

    def hold(self, sizes: Mapping[str, int]) -> bool:
        """Whether every guard holds at these sizes."""
        values = self._values(sizes)
        if values is None:
            return False
        guards = [self._env.replace(guard.expr).xreplace(values) for guard in self._env.guards]
        ranges = self._env.var_to_range
        inside = all(ranges[s].lower <= n <= ranges[s].upper for s, n in values.items() if s in ranges)
        return inside and all(guard == sympy.true for guard in guards)

    def _values(self, sizes: Mapping[str, int]) -> dict[sympy.Symbol, sympy.Integer] | None:
        """The symbols' values; None where no integers give these sizes."""
        symbols = sorted({s for expr in self._named.values() for s in expr.free_symbols}, key=str)
        equations = [expr - sizes[name] for name, expr in self._named.items()]
        solved = sympy.solve(equations, symbols, dict=True)
        if len(solved) != 1 or not all(isinstance(solved[0].get(s), sympy.Integer) for s in symbols):
            return None
        return solved[0]

    def evaluator(self, sizes: Mapping[str, int]) -> Callable[[Any], Any]:
        """A function that puts the sizes' numbers into a symbolic number, and leaves all else alone."""
        values = self._values(sizes)
        assert values is not None
        known: dict[sympy.Basic, Any] = {}

        def number(value: Any) -> Any:
            if not is_symbolic(value):
                return value
            expr = value.node.expr
            if expr not in known:
                known[expr] = self._env.replace(expr).xreplace(values)
            kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
            return kind(known[expr])

        return number


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal whatever their symbols stand for; asks nothing that would become a guard."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def is_data_dependent(error: BaseException) -> bool:
    """Whether a trace failed because the program looked at the values of its tensors."""
    return isinstance(error, DATA_DEPENDENT) or "Cannot call item()" in str(error) or "data-dependent" in str(error)


def register_caches(leaves: Sequence[Any]) -> bool:
    """Teach pytree to open transformers' key-value caches; whether one of `leaves` is news to it."""
    if not any(type(leaf).__name__ == "DynamicCache" for leaf in leaves):
        return False
    from torch.utils._pytree import SUPPORTED_NODES  # the registry has no public question "is it there?"
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    return any(type(leaf) in SUPPORTED_NODES for leaf in leaves)
