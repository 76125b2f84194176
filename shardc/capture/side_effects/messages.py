"""What forward tells the user: what it prints, logs and warns of. Every run tells it again.

    print("rows", x.shape[0])               # the text of the trace
    logger.info("loss %s, call %d", loss, self.calls)    # with the loss of each run, and its number

Nothing is told while the model is traced: a trace may run the model several times, or fail.
"""

from __future__ import annotations

import builtins
import copy
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.capture.side_effects.reachable import Reachable
from shardc.capture.side_effects.readings import put_in_place
from shardc.capture.side_effects.replay import CallRun, Describer, Recipe, holds_tensors
from shardc.capture.torch_patches.module_internals import version
from shardc.capture.torch_patches.symbols import is_symbolic
from shardc.capture.user_frames import is_installed
from shardc.errors import CaptureError


@dataclass(frozen=True)
class Message:
    """One message: its parts as they are in the trace, or as recipes, and what tells them. `copies` are tensors as they
    were when it was told, by identity: the tensor, how often it was written until then, and a copy."""

    parts: tuple[Any, ...]
    tell: Callable[[tuple[Any, ...]], Any]
    copies: Mapping[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict[int, tuple[Tensor, int, Tensor]])

    @staticmethod
    def of(parts: tuple[Any, ...], tell: Callable[[tuple[Any, ...]], Any]) -> Message:
        """The message with its parts as they are now, whatever is written into them afterwards."""
        copies: dict[int, tuple[Tensor, int, Tensor]] = {}

        def kept(part: Any) -> Any:
            if isinstance(part, Tensor) and id(part) not in copies:
                copies[id(part)] = part, version(part), part.clone()
            return part

        return Message(pytree.tree_map(kept, parts, is_leaf=_is_size), tell, copies)

    def described(self, describer: Describer) -> Message:
        """The same, without what belongs to the trace."""

        def then(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            tensor, before, copied = self.copies[id(part)]
            return tensor if version(tensor) == before else copied  # the tensor may be there already, as a result

        parts = pytree.tree_map(then, self.parts, is_leaf=_is_size)
        made = tuple(describer.describe(part) if _differs(part) else part for part in parts)
        return Message(made, self.tell)

    def replay(self, run: CallRun) -> None:
        """Tell it."""
        self.tell(tuple(part.make(run) if isinstance(part, Recipe) else part for part in self.parts))


class Messages:
    """The messages of one run of the model under the tracer, by code of the user's in this thread."""

    def __init__(self) -> None:
        self.noted: list[Message] = []
        self._thread = threading.get_ident()
        self._once = False

    @contextmanager
    def told_once(self) -> Generator[None]:
        """In here, messages are told at once, and not again: what tells them does not run in the next call."""
        before, self._once = self._once, True
        try:
            yield
        finally:
            self._once = before

    @contextmanager
    def noting(self, reachable: Reachable) -> Generator[None]:
        """In here, messages are noted."""
        really_print, really_warn, really_handle = builtins.print, warnings.warn, logging.Logger.handle

        def note_print(*values: Any, **options: Any) -> None:
            frame, stream = sys._getframe(1), options.get("file")
            if not self.own(frame) or stream not in (None, sys.stdout, sys.stderr):
                return really_print(*values, **options)
            name = "stderr" if stream is sys.stderr else "stdout"  # which may be another in the next call

            def tell(made: tuple[Any, ...]) -> None:
                print(*made, **{**options, "file": getattr(sys, name)})

            self.noted.append(Message.of(tuple(_text(value, frame) for value in values), tell))
            return None

        def note_warning(
            message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **options: Any
        ) -> None:
            frame = sys._getframe(1)
            if not self.own(frame) or options:
                return really_warn(message, category, stacklevel + 1, source, **options)
            kind = type(message) if isinstance(message, Warning) else category or UserWarning
            text = message if isinstance(message, Warning) else _text(message, frame)
            while stacklevel > 1 and frame.f_back is not None:
                frame, stacklevel = frame.f_back, stacklevel - 1
            place, line, space = frame.f_code.co_filename, frame.f_lineno, frame.f_globals

            def tell(made: tuple[Any, ...]) -> None:
                known = space.setdefault("__warningregistry__", {})
                warnings.warn_explicit(made[0], kind, place, line, space.get("__name__"), known)

            self.noted.append(Message.of((text,), tell))
            return None

        def note_record(logger: logging.Logger, record: logging.LogRecord) -> None:
            if not self._here() or is_installed(record.pathname):
                return really_handle(logger, record)
            if not _differs(record.args):
                record.msg, record.args = record.getMessage(), None
            noted = copy.copy(record)
            noted.args = None
            if noted.exc_info and noted.exc_info[0] is not None:  # as text: frames hold tensors of the trace
                noted.exc_text = logging.Formatter().formatException(noted.exc_info)  # type: ignore[arg-type]
            noted.exc_info = None

            def tell(made: tuple[Any, ...]) -> None:
                again = copy.copy(noted)
                again.args, again.created = made[0], time.time()
                again.msecs = again.created % 1 * 1000
                logger.handle(again)

            self.noted.append(Message.of((record.args,), tell))
            return None

        with ExitStack() as stack:
            for name in {"stdout", "stderr"} & reachable.names if "write" in reachable.names else ():
                stack.enter_context(patch.object(sys, name, _Stream(name, getattr(sys, name), self)))
            put_in_place(stack, reachable, [(builtins, "print", note_print), (warnings, "warn", note_warning)])
            stack.enter_context(patch.object(logging.Logger, "handle", note_record))
            yield

    def own(self, frame: FrameType) -> bool:
        """Whether it is code of the user's that tells something in every call."""
        return self._here() and not is_installed(frame.f_code.co_filename)

    def _here(self) -> bool:
        return threading.get_ident() == self._thread and not self._once


class _Stream:
    """Stands in for an output of the process: what the user's code writes to it is a message."""

    def __init__(self, name: str, stream: Any, messages: Messages) -> None:
        self._name, self._stream, self._messages = name, stream, messages

    def write(self, text: str) -> int:
        """As of the stream."""
        frame = sys._getframe(1)
        if not self._messages.own(frame):
            return int(self._stream.write(text))
        name = self._name
        self._messages.noted.append(Message((_text(text, frame),), lambda made: getattr(sys, name).write(made[0])))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _differs(value: Any) -> bool:
    """Whether a part of a message is another one in each run: it holds tensors, or sizes that change."""
    return holds_tensors(value) or any(map(is_symbolic, pytree.tree_leaves(value)))


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)  # of which pytree makes a mere tuple


def _text(value: Any, frame: FrameType) -> Any:
    """A part of a message that is the same in every run, as text; all others as they are."""
    if _differs(value):
        return value
    text = str(value)
    if "FakeTensor(" in text or "FunctionalTensor(" in text:
        raise CaptureError(
            f"forward tells the values of a tensor at {frame.f_code.co_filename}:{frame.f_lineno}, which only a run "
            "knows: hand the tensor itself to print, not a text of it"
        )
    return text
