"""The names of weights in files, and the models' own: by what transformers knows of its models.

model.layers.0.mlp.experts.3.w1.weight, ... .w3.weight   ->   model.layers.0.mlp.experts.gate_up_proj (stacked, joined)
embeddings.LayerNorm.gamma                                ->   bert.embeddings.LayerNorm.weight
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]
"""Gives the whole tensor of a name."""


@dataclass(frozen=True)
class WeightSource:
    """Tensors that are made of others: `made` of `sources` by `run`. Where `run` is None, one has another name only."""

    sources: tuple[str, ...]
    made: tuple[str, ...]
    run: Callable[[Read], Mapping[str, Tensor]] | None = None


def of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers."""
    known = sys.modules.get("transformers.modeling_utils")
    return known is not None and isinstance(model, known.PreTrainedModel)


def to_load(model: nn.Module, tensors: Mapping[str, Tensor], held: Iterable[str]) -> list[WeightSource]:
    """How tensors of files become those of a model: the names that the files hold, the model's `tensors` by name."""
    if not of_transformers(model):
        return [WeightSource((name,), (name,)) for name in held]
    import transformers.core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    kind: Any = model
    renamings, converters = _sorted(get_model_conversion_mapping(kind))
    prefix = kind.base_model_prefix
    groups: dict[str, _SourceGroup] = {}
    for name in sorted(held, key=loading.dot_natural_key):
        new, pattern = loading.rename_source_key(name, renamings, converters, prefix, tensors)  # pyright: ignore[reportArgumentType]
        if new not in tensors and name in tensors:
            new, pattern = name, None
        elif new not in tensors and pattern is None:
            new, _ = loading.rename_source_key(name, [], [], prefix, tensors)  # pyright: ignore[reportArgumentType]
        _grouped(groups, new, name, pattern, converters)
    return [group.conversion(model, lambda made: made) for group in groups.values()]


def to_save(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[WeightSource]:
    """How a model's tensors become those of files, with the names that transformers publishes."""
    if not of_transformers(model):
        return [WeightSource((name,), (name,)) for name in tensors]
    import transformers.core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    kind: Any = model
    mapping = getattr(model, "_weight_conversions", None)
    if mapping is None:  # a prefix may or may not have been there: without a file, none is added
        mapping = get_model_conversion_mapping(kind, add_legacy=False)
        mapping = [one for one in mapping if not isinstance(one, loading.PrefixChange)]
    renamings, converters = _sorted([one.reverse_transform() for one in mapping[::-1]])
    groups: dict[str, _SourceGroup] = {}
    for name in sorted(tensors, key=loading.dot_natural_key):
        new, pattern = loading.apply_converters(name, converters)
        if pattern is None:
            new = loading.apply_renamings(name, renamings)
        _grouped(groups, new, name, pattern, converters)
    return [group.conversion(model, lambda made: loading.apply_renamings(made, renamings)) for group in groups.values()]


def ignored(model: nn.Module, kind: str) -> re.Pattern[str] | None:
    """The names that a model of transformers does without (`kind` "missing"), or that it leaves in files
    ("unexpected")."""
    patterns: set[str] = set(getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ())
    if kind == "unexpected" and of_transformers(model):  # as transformers: older versions saved these buffers
        buffers = [name for name, _ in model.named_buffers()]
        patterns |= {r"rotary_emb\.inv_freq"} if any(n.endswith("rotary_emb.inv_freq") for n in buffers) else set()
        patterns |= {r"(^|\.)position_ids$"} if any(n.endswith("position_ids") for n in buffers) else set()
    return re.compile("|".join(f"({one})" for one in sorted(patterns))) if patterns else None


class _SourceGroup:
    """The sources of one target, or of the several that one operation makes."""

    def __init__(self, target: str, converter: Any) -> None:
        self.target, self.converter = target, converter
        self.sources: list[tuple[str, str]] = []
        """The names of sources, each with the pattern that it matches."""

    def conversion(self, model: nn.Module, renamed: Callable[[str], str]) -> WeightSource:
        names = tuple(name for name, _ in self.sources)
        if self.converter is None:
            return WeightSource(names, (self.target,))

        def run(read: Read) -> Mapping[str, Tensor]:
            converter = copy.deepcopy(self.converter)
            for name, pattern in self.sources:
                converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))
            config: Any = model.config
            made = converter.convert(self.target, model=model, config=config)
            return {renamed(key): one[0] if isinstance(one, list) else one for key, one in made.items()}

        return WeightSource(names, (), run)


def _grouped(groups: dict[str, _SourceGroup], new: str, name: str, pattern: str | None, converters: list[Any]) -> None:
    converter = next((one for one in converters if pattern in one.source_patterns), None) if pattern else None
    # two names for one target: the first counts, and the other is told of as unexpected
    target = name if converter is None and new in groups else new
    groups.setdefault(target, _SourceGroup(target, converter)).sources.append((name, pattern or name))


def _sorted(mapping: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    import transformers.core_model_loading as loading

    given = list(mapping)
    renamings = [one for one in given if isinstance(one, loading.WeightRenaming)]
    return renamings, [one for one in given if isinstance(one, loading.WeightConverter)]


def made_of(conversion: WeightSource, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a conversion makes, on the meta device: names, shapes and dtypes. `like` are the sources, of any values."""
    if conversion.run is None:
        (source,), (made,) = conversion.sources, conversion.made
        return {made: torch.empty(like[source].shape, dtype=like[source].dtype, device="meta")}
    return conversion.run(lambda name: torch.empty(like[name].shape, dtype=like[name].dtype, device="meta"))
