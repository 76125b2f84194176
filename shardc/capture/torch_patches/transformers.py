"""transformers: what its models need so that they can be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from shardc.capture.torch_patches.attention.flex import FlexAttention
from shardc.capture.torch_patches.experts import fused, fused_llama4
from shardc.capture.torch_patches.key_value_caches import windows

TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")
"""The implementations of transformers' experts layers whose control flow does not depend on the routing."""


@contextmanager
def patched(module: nn.Module) -> Generator[None]:
    """Patch transformers, and the configurations in `module`, for the time of a trace."""
    with ExitStack() as stack:
        masks = sys.modules.get("transformers.masking_utils")
        if masks is not None:
            # Whether a padding mask is all ones decides how the mask is made, and only a run knows that.
            stack.enter_context(patch.object(masks, "fast_all", lambda _: False))
        stack.enter_context(windows())
        layers = sys.modules.get("transformers.integrations.moe")
        if layers is not None:
            known = layers.ExpertsInterface._global_mapping
            traced = {name: fused(known[name]) for name in TRACEABLE_EXPERTS}
            stack.enter_context(patch.dict(known, traced))
        llama4 = sys.modules.get("transformers.models.llama4.modeling_llama4")
        if llama4 is not None:
            stack.enter_context(patch.object(llama4.Llama4TextMoe, "forward", _llama4(llama4.Llama4TextMoe.forward)))
        configs = {id(config): config for part in module.modules() if (config := vars(part).get("config")) is not None}
        for config in configs.values():
            # The eager experts loop over the experts that were hit, which only the values know. The property
            # `_experts_implementation` would set the configurations within as well, and not set them back.
            chosen = getattr(config, "_experts_implementation_internal", TRACEABLE_EXPERTS[0])
            if chosen not in TRACEABLE_EXPERTS:
                stack.enter_context(patch.object(config, "_experts_implementation_internal", TRACEABLE_EXPERTS[0]))
        yield


def _llama4(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of Llama 4's layer of experts, which runs all of them for all tokens, as one operator."""

    def fused_forward(self: Any, hidden_states: Tensor) -> Any:
        made = fused_llama4(self, hidden_states)
        return forward(self, hidden_states) if made is None else made

    return fused_forward


@contextmanager
def packing(counted: Callable[[Any], bool]) -> Generator[None]:
    """Position ids tell transformers whether sequences are packed: those that the model has counted itself are not. Of
    others only a run knows, so their mask is made."""
    masks = sys.modules.get("transformers.masking_utils")
    if masks is None:
        yield
        return
    find = masks.find_packed_sequence_indices

    def found(position_ids: Tensor) -> Tensor | None:
        return None if counted(position_ids) else find(position_ids)

    with patch.object(masks, find.__name__, found):
        yield


@contextmanager
def flex_sinks(flex: FlexAttention) -> Generator[None]:
    """Sinks in transformers' path by flex_attention, which renormalises by a log-sum-exp that the CPU does not give."""
    interface = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    if interface is None:
        yield
        return
    chosen, forward = interface.get_interface, interface._global_mapping["flex_attention"]

    def with_sinks(*args: Any, s_aux: Tensor | None = None, **kwargs: Any) -> Any:
        with flex.sinks(s_aux):
            return forward(*args, **kwargs)

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = chosen(self, *args, **kwargs)
        return with_sinks if function is forward else function

    with patch.object(interface, "get_interface", get_interface):
        yield
