"""transformers: what its models need so that they can be traced, and its key-value caches as inputs."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.utils import _pytree as pytree

TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")
"""The implementations of transformers' experts layers whose control flow does not depend on the routing."""


@contextmanager
def patched(module: nn.Module) -> Generator[None]:
    """Patch transformers, and the configurations in `module`, for the time of a trace."""
    with ExitStack() as stack:
        masks = sys.modules.get("transformers.masking_utils")
        if masks is not None:
            # Position ids tell transformers whether sequences are packed. In a trace it cannot see them, so it would
            # replace is_causal by a dense mask. None says that no sequences are packed.
            stack.enter_context(patch.object(masks, "find_packed_sequence_indices", lambda *_, **__: None))
        configs = {id(config): config for part in module.modules() if (config := vars(part).get("config")) is not None}
        for config in configs.values():
            # The eager experts loop over the experts that were hit, which only the values know. The property
            # `_experts_implementation` would set the configurations within as well, and not set them back.
            chosen = getattr(config, "_experts_implementation_internal", TRACEABLE_EXPERTS[0])
            if chosen not in TRACEABLE_EXPERTS:
                stack.enter_context(patch.object(config, "_experts_implementation_internal", TRACEABLE_EXPERTS[0]))
        yield


def register_caches(leaves: Sequence[Any]) -> bool:
    """Teach pytree to open transformers' key-value caches. True if it can open one of `leaves` now."""
    if not any(map(_is_growing, leaves)):
        return False
    from torch.utils._pytree import SUPPORTED_NODES  # pytree has no public way to ask for a class
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    return any(type(leaf) in SUPPORTED_NODES for leaf in leaves)


def growing_dims(arguments: Any) -> list[tuple[int, int]]:
    """The dims that grow from call to call: that of positions, in key-value caches which are concatenated to. Each is
    the index of a flat input, and the dim."""
    grown: list[tuple[int, int]] = []
    first = 0
    for part in pytree.tree_leaves(arguments, is_leaf=_is_growing):
        leaves = pytree.tree_leaves(part)
        if _is_growing(part):
            of_keys = [(i, leaf.ndim - 2) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim > 2]
            grown += [(first + index, dim) for index, dim in of_keys]
        first += len(leaves)
    return grown


def _is_growing(value: Any) -> bool:
    return type(value).__name__ == "DynamicCache"
