"""Files of weights in the safetensors format: which tensors they hold, parts of them, and new ones.

model.safetensors                                        one file, or a folder that holds it
model.safetensors.index.json, model-00001-of-00003...    an index, or the folder that holds it
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardc.errors import ShardcError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in the format. Source: github.com/huggingface/safetensors, `Dtype`."""


class TensorHeader(NamedTuple):
    """A tensor of which only shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightFiles:
    """The tensors of one safetensors file, or of the files of a folder or an index.

    `shapes` is by name. Nothing is read but headers, which tell whether a file is complete. Raises ShardcError for
    what is missing, truncated or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._home: dict[str, Any] = {}
        for file, names in _named(self.path):
            opened = _opened(file)
            held = set(opened.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise ShardcError(f"{self.path} says that {name} is in {file.name}, but it is not: copy it again")
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                self._home[name] = opened

    def part(self, name: str, where: tuple[slice, ...] = ()) -> Tensor:
        """A part of a tensor, as a view of the mapped file: only what is copied from it is read."""
        if not self.shapes[name]:
            return self._home[name].get_tensor(name)
        return self._home[name].get_slice(name)[where or (slice(None),)]


def _named(path: Path) -> Iterable[tuple[Path, list[str] | None]]:
    """The files of a path, each with the names to take from it (None: all)."""
    if path.is_dir():
        index, single = path / INDEX, path / SINGLE
        if single.is_file():
            return [(single, None)]
        if index.is_file():
            return _by_index(index)
        others = sorted(path.glob("*.safetensors"))
        if others:
            return [(one, None) for one in others]
        raise ShardcError(
            f"{path} holds no {SINGLE} and no {INDEX}: name a folder of safetensors, or convert what is there, by "
            "transformers' save_pretrained or safetensors.torch.save_file"
        )
    if not path.is_file():
        raise ShardcError(f"{path} is neither a file nor a folder: name model.safetensors, or the folder that holds it")
    return _by_index(path) if path.suffix == ".json" else [(path, None)]


def _by_index(index: Path) -> Iterable[tuple[Path, list[str] | None]]:
    try:
        where = json.loads(index.read_text())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in where.items():
            files.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardcError(f"{index} is no index of safetensors (a JSON object with weight_map): {error!r}") from error
    return [(index.parent / file, names) for file, names in sorted(files.items())]


def _opened(file: Path) -> Any:
    if file.is_symlink() and not file.exists():
        raise ShardcError(f"{file} is a link to a file that is not there: copy it again")
    try:
        opened: Any = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ShardcError(
            f"{file} cannot be read as safetensors: {error}. It is missing, truncated or of another format: copy it "
            "again, or save it by safetensors.torch.save_file"
        ) from error
    return opened


def in_files(tensors: Mapping[str, TensorHeader], most: float) -> dict[str, list[str]]:
    """The names of the tensors of each file, by the name of the file: in order, each file of at most so many bytes
    where no tensor alone is larger."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, one in tensors.items():
        if groups[-1] and held + one.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += one.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}


def write_index(folder: Path, tensors: Mapping[str, TensorHeader], files: Mapping[str, Sequence[str]]) -> None:
    """Write the index of several files."""
    total = sum(one.nbytes for one in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write(file: Path | None, tensors: Mapping[str, TensorHeader], value: Callable[[str], Tensor]) -> None:
    """Write tensors to a file, one after another: no two values are held at a time.

    All values are asked for, also without a file and after a failure: ranks ask for them together. Raises OSError where
    it cannot write, and ShardcError for a dtype that the format does not have."""
    text = _header(tensors)
    failed: OSError | None = None
    with ExitStack() as stack:
        try:
            out = None if file is None else stack.enter_context(file.open("wb"))
        except OSError as error:
            out, failed = None, error
        failed = failed or _written(out, struct.pack("<Q", len(text)) + text)
        for name in tensors:
            whole = value(name)
            failed = failed or _written(out, whole)
            del whole
    if failed is not None:
        raise failed


def _header(tensors: Mapping[str, TensorHeader]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, one in tensors.items():
        if one.dtype not in DTYPES:
            raise ShardcError(f"{name} is {one.dtype}, which the safetensors format does not have: convert it first")
        offsets = [offset, offset + one.nbytes]
        header[name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": offsets}
        offset += one.nbytes
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)  # what follows is aligned to eight bytes


def _written(out: BinaryIO | None, data: bytes | Tensor) -> OSError | None:
    """Write to a file, if there is one; returns what went wrong."""
    try:
        if out is not None:
            out.write(data if isinstance(data, bytes) else memoryview(_bytes(data)))
    except OSError as error:
        return error
    return None


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
