"""Provenance during a trace: each operator learns the module and the source line that called it.

y = self.up(x)    # model.py:41, in layers.0.mlp    ->    %mm.meta["nn_module_stack"] = ("layers.0.mlp", "model.py:41")
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import traceback as fx_traceback
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from shardc.capture.experts.written import WrittenExperts
from shardc.capture.side_effects.random_states import Seeds
from shardc.capture.side_effects.stand_ins import StandIns
from shardc.capture.side_effects.state_values import StateValues
from shardc.capture.side_effects.tensor_facts import ASKED
from shardc.capture.torch_patches.attention.flex import FlexAttention, flex_attention_patched
from shardc.capture.torch_patches.attention.notes import Counted
from shardc.capture.torch_patches.attention.written import Recognition, WrittenAttention
from shardc.capture.torch_patches.autocast import as_on_cuda
from shardc.capture.torch_patches.eager_semantics import PATCHES, set_data
from shardc.capture.torch_patches.fake_tensors import is_data_dependent
from shardc.capture.torch_patches.traced_nodes import lists_asked
from shardc.capture.torch_patches.transformers import flex_sinks, packing
from shardc.capture.user_frames import source_line
from shardc.errors import CaptureError

_GRAD = torch.Tensor.grad.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Provenance(TorchFunctionMode):
    """Writes module path and source line of every operator into the node metadata, and calls what stands in `PATCHES`
    for a function of torch.

    fx copies `nn_module_stack` to each node, and AOTAutograd copies it on to the backward nodes of the same operator
    (as `fwd_nn_module_stack`). No other key of the metadata takes that way. Here it holds the pair (module path, source
    line). `after` is called with the path and the output of every module, and may return another output. `made` is told
    what every operator returns, and the line that called it. `answer` knows some properties of tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        after: Callable[[str, Any], Any],
        made: Callable[[Any, str], None],
        answer: Callable[[Callable[..., Any], Any, str], Any],
        recognition: Recognition,
        experts: WrittenExperts,
        values: StateValues,
        stand_ins: StandIns | None = None,
    ) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        """The paths of the modules that are running, the innermost last."""
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._after, self._made, self._answer, self._stand_ins = after, made, answer, stand_ins
        self.seeds = Seeds()
        self.after_seed: set[tuple[str, str]] = set()
        """Where operators are called after the model has set a seed."""
        self.computed = False
        """Whether an operator was called."""
        self.asked: Exception | None = None
        """What was raised where code asked for a value that only a run knows: it may have been caught."""
        self._recognition, self._attention = recognition, WrittenAttention(recognition)
        self._experts, self._values = experts, values

    def __enter__(self) -> Provenance:
        self._attention = WrittenAttention(self._recognition)
        self._experts.begin()
        parametrize._cache.clear()  # of the run before: torch's tracer runs the model more than once
        return super().__enter__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _GRAD:
            raise CaptureError(
                f"forward reads .grad at {source_line(sys._getframe(1))}, which a compiled program does not have: "
                "read it outside of the model, and pass it in"
            )
        if func == _SET_DATA:
            return set_data(*args)
        if getattr(func, "__name__", "") == "__get__":  # `x.shape` and the like: no operator
            known = self._answer(func, args[0], source_line(sys._getframe(1))) if func in ASKED else ()
            if known:
                return known[0]
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            return self._experts.rows.read(name, args[0], self._attention.read(func, *args))
        found = self._values.answer(func, getattr(func, "__name__", ""), args, kwargs)
        if found:
            return found[0]
        if func is torch.Tensor.retain_grad:
            raise CaptureError(
                f"forward calls retain_grad at {source_line(sys._getframe(1))}: gradients of values within a compiled "
                "program are not kept. Return the tensor, and differentiate outside of the model"
            )
        if self._stand_ins:
            self._stand_ins.check((*args, *kwargs.values()))
        args, kwargs = as_on_cuda(func, args, kwargs)
        name, asked = getattr(func, "__name__", ""), func
        func = PATCHES.get(func, func)
        meta = fx_traceback.current_meta  # fx has no public way to write into it
        before = meta.get("nn_module_stack")
        line = source_line(sys._getframe(1))
        meta["nn_module_stack"] = (self.stack[-1], line)
        written = self._values.writes(asked, name, (args, kwargs))
        try:
            result = self.seeds.draw(func, args, kwargs)
            if self.seeds.seeded:
                self.after_seed.add((self.stack[-1], line))
            if result is None:
                result = self._experts.call(
                    lambda: self._attention.call(func, args, kwargs, line), name, self.stack[-1], args, kwargs
                )
            self._made(result, line)
            self._values.note(asked, name, (args, kwargs), result)
            written()
            self.computed = True
            return result
        except Exception as error:
            if is_data_dependent(error):
                self.asked = self.asked or error
            if asked is torch.Tensor.view and isinstance(error, ValueError):
                raise RuntimeError(str(error)) from error  # as eager mode, whose error code may catch
            raise
        finally:
            meta["nn_module_stack"] = before

    def _listed(self, tensor: torch.Tensor) -> tuple[Any] | None:
        known = self._values.answer(torch.Tensor.tolist, "tolist", (tensor,), {})
        return (known[0],) if known else self._experts.rows.listed(tensor)

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
            # nn.MultiheadAttention calls attention from inside torch, where function modes do not see it.
            attention = F.scaled_dot_product_attention
            stack.enter_context(patch.object(F, attention.__name__, lambda *a, **k: self._attention.attention(*a, **k)))
            flex = FlexAttention(lambda: self._attention.notes)
            stack.enter_context(flex_attention_patched(flex))
            stack.enter_context(flex_sinks(flex))
            stack.enter_context(packing(lambda ids: self._attention.notes.get(ids, Counted) is not None))
            stack.enter_context(lists_asked(self._listed))
            # What `parametrize.cached()` holds is real, and is not to hold what is fake.
            stack.enter_context(patch.object(parametrize, "_cache", {}))
            stack.enter_context(fx_traceback.preserve_node_meta())
            yield


def provenance_of(node: fx.Node) -> tuple[str, str] | None:
    """(module path, source line) of a traced node, if the trace knows them."""
    return node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
