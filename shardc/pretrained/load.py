"""`load_pretrained`: the values of files, each rank only its parts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.pretrained.files import WeightFiles
from shardc.pretrained.hf_names import WeightSource, ignored, made_of, to_load
from shardc.pretrained.materialize import draw, forget, same_draws
from shardc.pretrained.meshes import mesh_of
from shardc.pretrained.places import Destination, put, tensors_of
from shardc.runtime.mesh.agreement import Note, agree

SHOWN = 8
"""Names of a kind that an error lists."""


class Unmatched(NamedTuple):
    """The tensors of a model that no file had, and those of files that the model does not have. With the fields of
    what `load_state_dict` returns."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_pretrained(
    model: nn.Module, path: str | Path, *, strict: bool = True, mesh: str | Mesh | None = None
) -> Unmatched:
    """Give a model the values of safetensors: a file, a folder that holds `model.safetensors` or an index, or an index.

    The model may be on the meta device or have values, sharded or not, before its first call or after it. Tensors keep
    their dtype. Of tied weights the files need to hold one. For models of transformers, names are those that it
    publishes: with or without the prefix of the base model, renamed, experts one by one or stacked. Buffers that no
    file holds (`persistent=False`) and that are on the meta device are computed as `materialize` does.

    Under torch.distributed every rank must call it, and reads the files itself: only its parts, so that it holds at
    most what it stores and one tensor (for tensors that transformers joins of several: these and what they make). A
    parameter that had no values becomes a DTensor: split over dim 0 until the first plan moves it. An optimizer that
    was made before holds the new one. `mesh` is for a model that is not sharded yet.

    Returns what did not match, which is nothing with `strict`. Otherwise what is missing stays as it is, or is drawn
    where it has no values, and what is unexpected is left. Raises ShardcError for names or shapes that do not match,
    and for files that are missing or truncated; the model then stays as it was.
    """
    files, real = WeightFiles(path), mesh_of(model, mesh)
    named = tensors_of(model)
    if real is not None:
        kinds = str(sorted(files.shapes.items()))
        agree(Note(f"loading {type(model).__name__}", {"the tensors of the files": kinds}))
    fits = _Fits(model, files, named)
    fits.check(strict)
    names = {id(one): name for name, one in (*model.named_buffers(), *named.items())}
    places = {id(one): Destination(one, real) for one in named.values()}
    lacking = [one for name, one in _unfilled(model, named) if name not in fits.taken]

    def take(tensor: Tensor, value: Tensor) -> None:
        places.setdefault(id(tensor), Destination(tensor, real)).fill(lambda where: value[where])

    with same_draws(real):
        draw(model, lacking, take, advance=False)
    for conversion in fits.conversions:
        _fill(conversion, files, {name: places[id(named[name])] for name in fits.targets(conversion)})
    put(names, places.values())
    forget(model)
    return Unmatched(fits.missing, fits.unexpected)


def _unfilled(model: nn.Module, named: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """What is on the meta device, each tensor once."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, one in (*named.items(), *model.named_buffers()):
        if one.is_meta:
            seen.setdefault(id(one), (name, one))
    return seen.values()


def _fill(conversion: WeightSource, files: WeightFiles, places: Mapping[str, Destination]) -> None:
    if conversion.run is None:
        for place in places.values():
            place.fill(lambda where: files.part(conversion.sources[0], where))
    elif places:
        values = conversion.run(files.part)
        for name, place in places.items():
            place.fill(lambda where, value=values[name]: value[where])


class _Fits:
    """How what the files hold fits a model. `taken` are the names whose tensor gets its values, also by another of its
    names."""

    def __init__(self, model: nn.Module, files: WeightFiles, named: Mapping[str, Tensor]) -> None:
        self._model, self._files, self._named = model, files, named
        self.conversions = to_load(model, named, files.shapes)
        self._made: dict[str, tuple[int, ...]] = {}
        self._targets: dict[int, list[str]] = {}
        sources = {name: torch.empty(shape, device="meta") for name, shape in files.shapes.items()}
        met: set[int] = set()
        for conversion in self.conversions:
            made = {name: tuple(one.shape) for name, one in made_of(conversion, sources).items()}
            self._made |= made
            own = [name for name in made if name in named and id(named[name]) not in met]
            met |= {id(named[name]) for name in own}
            self._targets[id(conversion)] = own
        self.taken = {name for name, one in named.items() if id(one) in met}
        self.missing = self._but(sorted(named.keys() - self.taken), "missing")
        self.unexpected = self._but(sorted(self._made.keys() - named.keys()), "unexpected")

    def targets(self, conversion: WeightSource) -> list[str]:
        """The names of the model whose values a conversion makes."""
        return self._targets[id(conversion)]

    def _but(self, names: Sequence[str], kind: str) -> list[str]:
        pattern = ignored(self._model, kind)
        return [name for name in names if pattern is None or not pattern.search(name)]

    def check(self, strict: bool) -> None:
        """Raise ShardcError for shapes that do not fit; with `strict` also for names."""
        wrong = [
            f"{name} is {list(shape)} in the files and {list(self._named[name].shape)} in the model"
            for name, shape in sorted(self._made.items())
            if name in self._named and shape != tuple(self._named[name].shape)
        ]
        told = [f"of another shape: {_list(wrong)}"] if wrong else []
        if strict and self.missing:
            told.append(f"missing in the files: {_list([self._near(name) for name in self.missing])}")
        if strict and self.unexpected:
            told.append(f"unknown to the model: {_list(self.unexpected)}")
        if told:
            out = (
                "Check that the files are those of this model and its config"
                if wrong
                else "Rename what the files hold, or take what fits with load_pretrained(..., strict=False)"
            )
            kind = type(self._model).__name__
            raise ShardcError(f"{self._files.path} does not fit {kind}:\n  " + "\n  ".join([*told, out]))

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.unexpected, n=1, cutoff=0.8)
        return f"{name} (is it {near[0]}?)" if near else name


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
