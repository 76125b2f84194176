"""Notes on tensors of a trace: of which smaller tensor one is made, where that is known.

k = k[:, :, None].expand(2, 4, 3, 128, 64).reshape(2, 12, 128, 64)    ->    Repeated(k, dim=1, times=3)

A note on a tensor holds until something is written into it, or into what the note names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Note = TypeVar("Note")


@dataclass(frozen=True)
class Expanded:
    """`source`, with each of `times` standing that often along a dim (that of the result) where it has one element."""

    source: Tensor
    times: Mapping[int, int]


@dataclass(frozen=True)
class Repeated:
    """`source.repeat_interleave(times, dim)`."""

    source: Tensor
    dim: int
    times: int


@dataclass(frozen=True)
class Counted:
    """Numbers of which each is one more than that before it along the last dim."""


class Notes:
    """What is known of the tensors of one trace."""

    def __init__(self) -> None:
        self._notes: Any = WeakIdKeyDictionary()

    def put(self, tensor: Any, note: Any) -> None:
        """Note something of a tensor; nothing of a tensor of which torch does not count how often it was written."""
        if isinstance(tensor, Tensor) and note is not None and not tensor.is_inference():
            self._notes.setdefault(tensor, {})[type(note)] = note, _versions([tensor, *_tensors(note)])

    def get(self, tensor: Any, kind: type[Note]) -> Note | None:
        """The note of a kind on a tensor, if it has one that holds."""
        if not isinstance(tensor, Tensor):
            return None
        note, versions = self._notes.get(tensor, {}).get(kind, (None, ()))
        return note if note is not None and versions == _versions([tensor, *_tensors(note)]) else None


def _tensors(note: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for field in fields(note):
        value = getattr(note, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif is_dataclass(value):
            found += _tensors(value)
    return found


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def note_source(notes: Notes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Note of the result of a function of torch called `name` what it repeats, or that it counts."""
    if not isinstance(result, Tensor) or not args:
        return
    if name == "arange":
        notes.put(result, None if args[2:] or "step" in kwargs else Counted())
    elif name in _COUNTING and notes.get(args[0], Counted) and _same_end(result, args[0]):
        rest = [*args[1:], *kwargs.values()]
        index = name == "__getitem__" and not all(part in (None, slice(None), ...) for part in _parts(rest[0]))
        notes.put(result, None if index or any(isinstance(arg, Tensor) for arg in rest) else Counted())
    maker = _MAKERS.get(name)
    if maker is None or not isinstance(args[0], Tensor):
        return
    notes.put(result, maker(notes, args[0], args[1:], kwargs, result))


def _parts(index: Any) -> tuple[Any, ...]:
    parts = index if isinstance(index, tuple) else (index,)
    return tuple("tensor" if isinstance(part, Tensor) else part for part in parts)


def _same_end(first: Tensor, second: Tensor) -> bool:
    return first.shape[-1:] == second.shape[-1:]


Maker = Callable[[Notes, Tensor, tuple[Any, ...], Mapping[str, Any], Tensor], Any]


def _expanded(notes: Notes, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> Expanded | None:
    if result.ndim != x.ndim or result.numel() == 0:
        return None
    times = {dim: n for dim, n in enumerate(result.shape) if x.shape[dim] == 1 and n != 1}
    same = all(dim in times or n == x.shape[dim] for dim, n in enumerate(result.shape))
    return Expanded(x, times) if times and same else None


def _merged(notes: Notes, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> Repeated | None:
    """A view that joins the dim that was expanded with the one before."""
    note = notes.get(x, Expanded)
    if note is None or len(note.times) != 1:
        return None
    ((dim, times),) = note.times.items()
    if dim == 0 or result.shape != (*x.shape[: dim - 1], x.shape[dim - 1] * times, *x.shape[dim + 1 :]):
        return None
    return Repeated(note.source.squeeze(dim), dim - 1, times)


def _interleaved(notes: Notes, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> Repeated | None:
    times = args[0] if args else kwargs.get("repeats")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return Repeated(x, dim % x.ndim, times) if isinstance(times, int) and isinstance(dim, int) and times > 1 else None


def _moved(notes: Notes, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> Repeated | None:
    """A permutation of the dims of what is repeated."""
    note = notes.get(x, Repeated)
    if note is None or kwargs:
        return None
    dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if len(dims) == x.ndim and len(dims) != 2:
        order = [int(d) % x.ndim for d in dims]
    elif len(dims) == 2:
        order = list(range(x.ndim))
        first, second = (int(d) % x.ndim for d in dims)
        order[first], order[second] = second, first
    else:
        return None
    return Repeated(note.source.permute(order), order.index(note.dim), note.times)


def _turned(notes: Notes, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> Repeated | None:
    return _moved(notes, x, (-2, -1), {}, result)


def _copied(notes: Notes, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> Any:
    note = notes.get(x, Repeated)
    if note is not None:
        source = note.source if note.source.dtype == result.dtype else note.source.to(result.dtype)
        return Repeated(source, note.dim, note.times)
    return notes.get(x, Expanded) if x.dtype == result.dtype else None


_COUNTING = ("unsqueeze", "view", "reshape", "expand", "repeat", "__getitem__", "add", "__add__", "to", "long", "int")
_MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("expand", "expand_as", "repeat", "tile", "broadcast_to"), _expanded),
    **dict.fromkeys(("reshape", "view", "flatten"), _merged),
    "repeat_interleave": _interleaved,
    **dict.fromkeys(("transpose", "permute", "swapaxes", "swapdims"), _moved),
    "mT": _turned,
    **dict.fromkeys(("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as"), _copied),
}
