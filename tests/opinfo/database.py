"""The entries of torch's operator database, and the sample calls of each that are tried."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from opinfo.hand_made import hand_made

RANKS = 4
"""The mesh has one axis of this size."""

_EVEN = {"L": 24, "M": 12, "S": 4, "XS": 2}
_USUAL = {"L": 20, "M": 10, "S": 5, "XS": 3}
"""The sizes from which torch builds its samples, chosen to be divisible, and as torch has them."""

_USUAL_ONLY = frozenset({"_segment_reduce.lengths", "_segment_reduce.offsets"})
"""Entries whose samples name positions that only torch's own sizes have; the kernel would read beyond its operand."""

_LOOKED_AT = 60
"""Of an operator's samples the first so many are candidates."""

RANDOM = frozenset(
    {
        "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "uniform",
        "rand_like", "randint_like", "randn_like", "rand", "randn", "randint", "empty", "empty_like", "empty_strided",
        "empty_permuted", "new_empty", "new_empty_strided", "svd_lowrank", "pca_lowrank", "resize_", "resize_as_",
        *(f"nn.functional.{name}" for name in (
            "dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu",
            "fractional_max_pool2d", "fractional_max_pool3d", "multi_head_attention_forward",
        )),
    }
)  # fmt: skip
"""Operators whose values are drawn or undefined: of them only shapes and types are compared."""


@dataclass
class Sample:
    """One call of an operator: `function(*args, **kwargs)`."""

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


@functools.cache
def entries() -> dict[str, Any]:
    """Every entry that takes float32, by its name with its variant: `norm.fro`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {name_of(entry): entry for entry in op_db if torch.float32 in entry.dtypes}


def name_of(entry: Any) -> str:
    return entry.name + (f".{entry.variant_test_name}" if entry.variant_test_name else "")


def is_random(entry: Any) -> bool:
    return name_of(entry) in RANDOM or entry.name in RANDOM


def samples(entry: Any, count: int, device: str = "cpu") -> list[Sample]:
    """`count` of an entry's samples, those with most dims to split, and its hand-made ones, on a device. Empty if none
    runs."""
    for sizes in (_USUAL,) if name_of(entry) in _USUAL_ONLY else (_EVEN, _USUAL):
        _set_sizes(sizes)
        try:
            found = [_on(device, sample) for sample in _chosen(entry, count)]
            for sample in found:
                sample.function(*detached(sample.args), **detached(sample.kwargs))
            return found
        except Exception:  # some samples are only legal at torch's own sizes
            continue
    return []


def _on(device: str, sample: Sample) -> Sample:
    """The same call with its tensors on another device. They are made on the CPU, where every machine draws alike."""
    if device == "cpu":
        return sample

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    args, kwargs = tree_map_only(Tensor, moved, (sample.args, sample.kwargs))
    return Sample(sample.function, args, kwargs)


def _set_sizes(sizes: dict[str, int]) -> None:
    for name, module in list(sys.modules.items()):
        if "opinfo" in name or name.endswith("common_methods_invocations"):
            for key, value in sizes.items():
                if isinstance(getattr(module, key, None), int):
                    setattr(module, key, value)
            if hasattr(module, "wrapper_set_seed"):  # the judge sets it: what is drawn after a seed is a constant
                module.wrapper_set_seed = _without_seed  # type: ignore[attr-defined]


def _without_seed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _chosen(entry: Any, count: int) -> list[Sample]:
    """The samples with most operands that split; first one of every kind of call."""
    torch.manual_seed(0)
    ranked: list[tuple[int, tuple[Any, ...], Sample]] = []
    for given in islice(entry.sample_inputs("cpu", torch.float32, requires_grad=entry.supports_autograd), _LOOKED_AT):
        sample = _sample(entry, [given.input, *given.args], given.kwargs, given.output_process_fn_grad)
        tensors = sample.tensors
        if any(t.layout is not torch.strided or t.numel() == 0 for t in tensors):
            continue
        splits = sum(name.startswith("S") for name in layouts(tensors))
        types = tuple(type(a).__name__ for a in sample.args)
        kind = (tuple(t.ndim for t in tensors), tuple(sorted(sample.kwargs)), types)
        ranked.append((splits * 10 + min(9, sum(t.ndim for t in tensors)), kind, sample))
    ranked.sort(key=lambda item: -item[0])
    picked: list[Sample] = []
    kinds: set[tuple[Any, ...]] = set()
    for _, kind, sample in ranked:
        if kind not in kinds and len(picked) < count:
            picked.append(sample)
            kinds.add(kind)
    picked += [s for _, _, s in ranked if not any(s is other for other in picked)][: count - len(picked)]
    return picked + [_sample(entry, call.args, call.kwargs) for call in hand_made(name_of(entry))]


def _sample(
    entry: Any, args: list[Any], kwargs: dict[str, Any], after: Callable[[Any], Any] = lambda output: output
) -> Sample:
    kwargs = dict(kwargs)
    if entry.name == "nn.functional.scaled_dot_product_attention" and kwargs.get("dropout_p"):
        kwargs["dropout_p"] = 0.0
    return Sample(lambda *a, **k: after(entry.op(*a, **k)), args, kwargs)


def layouts(tensors: list[Tensor]) -> dict[str, tuple[str, ...]]:
    """The layouts tried, by name; each has a placement per tensor: `R` (whole), `S0`, `S1` (split), `P` (partial).

    All operands lie so, or only the first; those that cannot stay whole.
    """
    names = {
        "S0": tuple(_split(t, 0) for t in tensors),
        "S1": tuple(_split(t, 1) for t in tensors),
        "P": tuple("P" if t.is_floating_point() or t.is_complex() else "R" for t in tensors),
    }
    found = {"R": ("R",) * len(tensors)}
    firsts = {f"{name}first": (every[0], *found["R"][1:]) for name, every in names.items() if tensors}
    for name, placements in (names | firsts).items():
        if placements not in found.values():
            found[name] = placements
    return found


def _split(tensor: Tensor, dim: int) -> str:
    fits = tensor.layout is torch.strided and tensor.ndim > dim and tensor.shape[dim] >= RANKS
    return f"S{dim}" if fits else "R"


def detached(tree: Any, requires_grad: bool = False) -> Any:
    """A copy of a tree of arguments whose tensors are leaves, requiring gradients as before if `requires_grad`."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad and requires_grad)

    return tree_map_only(Tensor, copy, tree)
