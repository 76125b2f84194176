"""What a failed trace tells the user: the module and the line in their code, what torch says, and the way out.

    raise ValueError("too long")  in forward    ->    that very ValueError, as on one device
    self.up(x[:, :3])             (wrong shape) ->    a CaptureError that is a RuntimeError as well
    if x.sum() > 0:                             ->    a CaptureError

What the model raises by itself is raised once nothing else is to be tried (`ModelError`).
"""

from __future__ import annotations

import builtins
import dis
import linecache
from collections.abc import Callable, Iterator
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.capture.torch_patches.fake_tensors import is_data_dependent
from shardc.capture.user_frames import failing_line, is_of_modules, is_torch_or_ours
from shardc.errors import CaptureError, ShardcError

Result = TypeVar("Result")


class ModelError(CaptureError):
    """What the model raises by itself, as it would on one device: `error`, and the `place` in words."""

    error: Exception
    place: str
    at_all_sizes = False
    """Whether sizes were symbols, about which code may complain."""


def as_raised(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`. What the model raises by itself is raised as it is, with a note."""
    try:
        return function(*args)
    except ModelError as found:
        if found.at_all_sizes:
            raise
        error, place = found.error, found.place
    note = f"shardc: {place}, raises this in a trace, as on one device; what it has changed until then is put back"
    if _holds_tensors(error):
        note += "; its tensors are those of the trace, which have no values"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    raise error.with_traceback(_of_user(error.__traceback__))


def _holds_tensors(error: Exception) -> bool:
    """Whether an error has tensors, or tells of one in its text."""
    leaves = pytree.tree_leaves((error.args, vars(error)))
    return any(isinstance(leaf, Tensor) or "FunctionalTensor(" in str(leaf) for leaf in leaves)


def _of_user(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without the tracer, in which the user's forward was called."""
    first = traceback
    while first is not None and is_torch_or_ours(first.tb_frame.f_code.co_filename):
        first = first.tb_next
    return first or traceback


def explained(error: Exception, path: str, at: tuple[str, int] | None = None, by_model: bool = False) -> CaptureError:
    """The CaptureError for a failed trace in the module at `path`: where in the user's code (the file and line `at`, or
    where the error passed through), what, and the way out.

    It is of the type of the error as well, which is what code around the model expects. An error that is raised
    `by_model` (see `is_of_model`) makes a ModelError.
    """
    path, at = getattr(error, "selected", (path, at))
    innermost = at or failing_line(error.__traceback__)
    place, code = f"module {path!r}" if path else "the model", ""
    if innermost is not None:
        filename, line = innermost
        place += f", {filename}:{line}"
        text = linecache.getline(filename, line).strip()
        code = f"\n    {text}" if text else ""
    if is_data_dependent(error):
        keeps = " To keep or to print it, take the tensor itself (detach()), and its number outside of the model."
        asks = any(word in code for word in (".item(", ".tolist(", "float(", "int("))
        return CaptureError(
            f"{place}: the program branches on, or takes a shape from, a value that is only known when it runs. "
            "Use torch.where (or a mask) instead of the branch, or compute the value outside the model and pass it in."
            f"{keeps if asks else ''} ({type(error).__name__}){code}"
        )
    if "entirely functional graph" in str(error):
        return CaptureError(
            f"{place}: the model writes in place to a tensor that is neither a buffer nor an input, so the write would "
            "be lost: register the tensor with register_buffer"
        )
    reason = next(iter(str(error).splitlines()), "")
    message = f"{place}: the model cannot be traced: {type(error).__name__}: {reason}{code}"
    made = _of_type(error, ModelError if by_model else CaptureError, message)
    if isinstance(made, ModelError):
        made.error, made.place = error, place
    return made


def is_of_model(error: Exception, handled: BaseException | None) -> bool:
    """Whether an error that has left the model's code is what one device would raise: that code has raised it, or a
    library that knows nothing of traces, and not because of an error that is the trace's. What was `handled` when the
    trace began is no reason for it."""
    innermost, traceback = "", error.__traceback__
    while traceback is not None:
        innermost, traceback = traceback.tb_frame.f_code.co_filename, traceback.tb_next
    if any(is_data_dependent(one) or isinstance(one, ShardcError) for one in _chain(error, handled)):
        return False
    if is_torch_or_ours(innermost):
        return is_of_modules(innermost) and _is_raised(error)
    # functions in C have no frames; what they raise may be that there is nothing in the tensors of a trace
    return not isinstance(error, (RuntimeError, NotImplementedError)) or _is_raised(error)


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that were handled when it was raised, but for what was `handled` before."""
    seen, todo = {id(handled)}, [error]
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += filter(None, (one.__cause__, one.__context__))


def _is_raised(error: Exception) -> bool:
    """Whether the innermost frame has a `raise` where the error was raised."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and _instruction(traceback) in _RAISING


_RAISING = frozenset({"RAISE_VARARGS", "RERAISE"})


def _instruction(traceback: TracebackType) -> str:
    found = (one.opname for one in dis.get_instructions(traceback.tb_frame.f_code) if one.offset == traceback.tb_lasti)
    return next(found, "")


def _of_type(error: Exception, kind: type[CaptureError], message: str) -> CaptureError:
    """An error of a kind, which is of the type of another one as well where that is Python's."""
    theirs = next(cls for cls in type(error).__mro__ if cls.__module__ == builtins.__name__)
    try:
        return _both(kind, theirs)(message)
    except TypeError:  # some of Python's errors cannot be bases together with others
        return kind(message)


@cache
def _both(kind: type[CaptureError], theirs: type[Exception]) -> type[CaptureError]:
    if issubclass(kind, theirs):
        return kind
    methods: dict[str, Any] = {
        "__init__": Exception.__init__,
        "__str__": Exception.__str__,
        "__module__": kind.__module__,
    }
    methods["__reduce__"] = lambda error: (CaptureError, error.args)
    return type(kind.__name__, (kind, theirs), methods)
