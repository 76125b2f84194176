"""Key-value caches of transformers as inputs of a call: what in them grows, and where layers of a window branch.

DynamicCache, window of 16        keys of a layer    its int cumulative_length
call with 12 positions cached     12, grows          12, grows
call with 20                      15, stands still   20, grows
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.capture.changing_sizes import Growth

_CACHES = frozenset({"Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin"})


def is_cache(value: Any) -> bool:
    """Whether an object is a cache of transformers, or what one holds of a layer. They are opened also while they are
    empty: every `generate` brings another."""
    return bool(_CACHES.intersection(_kinds(value)))


def _kinds(value: Any) -> list[str]:
    """The names of transformers' classes that an object is of."""
    cls = type(value)
    return [base.__name__ for base in cls.__mro__] if cls.__module__.startswith("transformers.") else []


def growth(arguments: Any) -> Growth:
    """What grows from call to call in the caches among (args, kwargs), and what stands still though it has grown."""
    grown = Growth([], [], set())
    index = 0
    for value in pytree.tree_leaves(arguments, is_leaf=_is_layer):
        if not _is_layer(value):
            index += 1
            continue
        kinds = _kinds(value)
        full = "DynamicLayer" not in kinds or ("DynamicSlidingWindowLayer" in kinds and _is_full(value))
        for name, held in vars(value).items():
            place = index, held.ndim - 2 if isinstance(held, Tensor) else 0
            if name in ("keys", "values") and isinstance(held, Tensor):
                grown.still.add(place) if full else grown.lengths.append(place)
            elif name == "cumulative_length" and type(held) is int:
                grown.lengths.append(place)
            elif name == "cumulative_length_int":
                grown.counts.append(place)
            index += len(pytree.tree_leaves(held))
    return grown


def _is_layer(value: Any) -> bool:
    kinds = _kinds(value)
    return ("DynamicLayer" in kinds and "BaseQuantizedLayer" not in kinds) or "StaticSlidingWindowLayer" in kinds


def _is_full(layer: Any) -> bool:
    """Whether a layer holds all that it keeps from call to call."""
    return not layer.record_past and layer.cumulative_length >= layer.sliding_window - 1


@contextmanager
def windows() -> Generator[None]:
    """In here, layers of a window branch at one length: before it their keys grow, from it on they keep their size.

    Theirs branch at several, one apart, each of which would be a program of its own. What they compute is the same.
    """
    caches, masks = (sys.modules.get(f"transformers.{name}") for name in ("cache_utils", "masking_utils"))
    if caches is None or masks is None:
        yield
        return
    growing, dynamic, static = caches.DynamicLayer, caches.DynamicSlidingWindowLayer, caches.StaticSlidingWindowLayer
    recording, ignored = dynamic.update, masks._ignore_causal_mask_sdpa

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.record_past:
            return recording(self, keys, values, *args, **kwargs)
        whole = growing.update(self, keys, values)
        self.cumulative_length += keys.shape[-2]
        kept = self.sliding_window - 1
        if whole[0].shape[-2] > kept:  # a slice of as many would ask whether there are as many
            self.keys, self.values = (one[:, :, -kept if kept else 0 :, :] for one in whole)
        return whole

    def dynamic_sizes(self: Any, query_length: int) -> tuple[int, int]:
        beyond = self.cumulative_length - self.sliding_window + 1
        if beyond >= 0:
            return self.sliding_window - 1 + query_length, beyond
        return self.cumulative_length + query_length, 0

    def static_sizes(self: Any, query_length: int) -> tuple[int, int]:
        window, length = self.max_cache_len, self.cumulative_length_int
        if length >= window:
            return window + query_length - 1, length - window + 1
        return (length + query_length if length + query_length > window else window), 0

    def ignore(padding: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        # with padding it says no in every trace, but first asks whether the padding is longer than the window
        return padding is None and ignored(padding, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(dynamic, "update", update))
        stack.enter_context(patch.object(dynamic, "get_mask_sizes", dynamic_sizes))
        stack.enter_context(patch.object(static, "get_mask_sizes", static_sizes))
        stack.enter_context(patch.object(masks, "_ignore_causal_mask_sdpa", ignore))
        yield
