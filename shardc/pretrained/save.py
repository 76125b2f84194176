"""`save_pretrained`: a model's values as files of safetensors, with the names that transformers publishes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardc.cost.memory import bytes_of
from shardc.errors import ShardcError
from shardc.pretrained.files import INDEX, SINGLE, TensorHeader, in_files, write, write_index
from shardc.pretrained.hf_names import WeightSource, made_of, of_transformers, to_save
from shardc.pretrained.places import tensors_of
from shardc.runtime.mesh.agreement import Note, agree


def save_pretrained(model: nn.Module, path: str | Path, *, max_shard_size: str | float = "5GB") -> None:
    """Write the values of a model to a folder: `model.safetensors`, or files of at most `max_shard_size` and an index.

    transformers' `from_pretrained`, `load_pretrained` and whatever else reads safetensors take them, without shardc:
    tensors are whole, and of tied weights one is written. For a model of transformers, names are those that it
    publishes, and `config.json` and the generation config are written as well.

    Under torch.distributed every rank must call it; rank 0 writes. A rank holds at most what it stores and one tensor,
    which is gathered for it (for tensors that transformers splits into several: these as well).

    The files are written aside and take the place of older ones when they are complete. What else the folder holds
    stays. Raises ShardcError, on every rank, where they cannot be written; the folder then stays as it was.
    """
    size = bytes_of(max_shard_size)
    folder = Path(path)
    named = _values(model)
    if dist.is_initialized():
        kinds = str([(name, str(one.dtype), list(one.shape)) for name, one in named.items()])
        agree(Note(f"saving {type(model).__name__}", {"its tensors": kinds, "the folder": str(folder)}))
    tensors: dict[str, TensorHeader] = {}
    sources: dict[str, WeightSource] = {}
    for conversion in to_save(model, named):
        for name, one in made_of(conversion, named).items():
            tensors[name] = TensorHeader(tuple(one.shape), one.dtype)
            sources[name] = conversion
    files = in_files(tensors, size)
    value = _WholeValues(named, sources)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    aside: list[Path] = []

    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(20, "it is a file, not a folder", str(folder))
        aside.append(Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".saving", dir=folder.parent)))

    try:
        _on_rank_0(begin, writes, folder)
        for file, names in files.items():
            held = {name: tensors[name] for name in names}
            _on_rank_0(lambda file=file, held=held: write(aside[0] / file, held, value), writes, folder, held, value)
        _on_rank_0(lambda: _finish(model, aside[0], folder, tensors, files), writes, folder)
    finally:
        for one in aside:
            shutil.rmtree(one, ignore_errors=True)


def _values(model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors to write, each once. Raises ShardcError for one without values."""
    left_out: set[str] = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", None) or ())
    named = {name: one for name, one in tensors_of(model).items() if name not in left_out}
    kept: dict[int, str] = {}
    for name, one in sorted(named.items(), key=lambda item: item[0] in tied):  # the one that transformers looks for
        if one.is_meta:
            raise ShardcError(f"{name} is on the meta device: materialize or load the model first")
        kept.setdefault(id(one), name)
    return {name: one for name, one in named.items() if kept[id(one)] == name}


class _WholeValues:
    """The whole values of tensors of files, one at a time. What one conversion makes is held until all of it is
    asked for. Every rank must ask for the same."""

    def __init__(self, named: Mapping[str, Tensor], sources: Mapping[str, WeightSource]) -> None:
        self._named, self._sources = named, sources
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        conversion = self._sources[name]
        if conversion.run is None:
            return self._whole(conversion.sources[0])
        if name not in self._made:
            self._made |= conversion.run(self._whole)
        return self._made.pop(name)

    def _whole(self, name: str) -> Tensor:
        one = self._named[name]
        return one.full_tensor().detach() if isinstance(one, DTensor) else one.detach()


def _finish(
    model: nn.Module, aside: Path, folder: Path, tensors: Mapping[str, TensorHeader], files: Mapping[str, list[str]]
) -> None:
    """Write what goes beside the weights, and put all in place."""
    if list(files) != [SINGLE]:
        write_index(aside, tensors, files)
    if of_transformers(model):
        _write_config(model, aside)
    for file in aside.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    aside.chmod(0o777 & ~_umask())
    if not folder.exists():
        aside.rename(folder)
        return
    for file in folder.iterdir():  # all but older weights
        old = file.name in (SINGLE, INDEX) or (file.suffix == ".safetensors" and file.name.startswith("model-"))
        if not old and not (aside / file.name).exists():
            _link(file, aside / file.name)
    former = folder.with_name(f"{aside.name}.former")
    folder.rename(former)
    aside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _link(old: Path, new: Path) -> None:
    if old.is_dir():
        shutil.copytree(old, new, symlinks=True, copy_function=_linked)
    else:
        _linked(str(old), str(new))


def _linked(old: str, new: str) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(old, new, follow_symlinks=False)


def _write_config(model: nn.Module, folder: Path) -> None:
    """`config.json` as transformers writes it, and the generation config."""
    kind: Any = model
    kind.config.dtype = str(kind.dtype).removeprefix("torch.")
    kind.config.architectures = [type(model).__name__]
    kind.config.save_pretrained(folder)
    if kind.can_generate():
        kind.generation_config.save_pretrained(folder)


def _on_rank_0(
    action: Callable[[], None],
    writes: bool,
    folder: Path,
    names: Mapping[str, TensorHeader] | None = None,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Do it on the rank that writes, while the others take part in gathering. ShardcError on all where it failed."""
    failed: BaseException | None = None
    told = ""
    if writes:
        try:
            action()
        except OSError as error:
            failed, told = error, f"cannot save to {folder}: {error.strerror or error}"
    elif names is not None and value is not None:
        write(None, names, value)
    if dist.is_initialized():
        box = [told]
        dist.broadcast_object_list(box, 0)
        told = box[0]
    if told:
        raise ShardcError(f"{told}. What the folder held stays; free space there, or name another folder") from failed
