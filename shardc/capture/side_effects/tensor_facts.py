"""What code may ask of the model's tensors and of inputs, beside their values: in a trace they answer as on one device.

isinstance(self.up.weight, nn.Parameter)     # True, though a trace has another tensor in its place
self.up.weight.scale                         # an attribute that the user has set
x.is_leaf, x.grad_fn                         # True, None
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shardc.capture.user_frames import source_line
from shardc.errors import CaptureError

IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[attr-defined]

ASKED = (IS_LEAF, GRAD_FN)
"""Properties that the tensors of a trace have otherwise."""


class TensorFacts:
    """The tensors of a trace that stand for those of the user."""

    def __init__(self) -> None:
        self._users: dict[int, tuple[str, Tensor]] = {}

    def dress(self, name: str, traced: Tensor, user: Tensor) -> None:
        """From now on `traced` stands for `user`: with its attributes, and a parameter if that is one."""
        vars(traced).update({key: value for key, value in vars(user).items() if not key.startswith("_")})
        if isinstance(user, nn.Parameter):
            traced._is_param = True  # type: ignore[attr-defined]  # by which isinstance tells parameters
        self._users[id(traced)] = name, user

    def answer(self, function: Callable[..., Any], tensor: Any, line: str) -> Any:
        """What a property of a tensor is, as (value,); () where the trace knows by itself.

        Raises CaptureError where it differs from call to call."""
        if id(tensor) not in self._users:
            return ()
        name, user = self._users[id(tensor)]
        if name.startswith("input:") and user.requires_grad:
            raise CaptureError(
                f"forward asks at {line} whether {name} is a leaf of autograd's graph, which differs between calls: "
                "ask before the call, and pass the answer in"
            )
        return (True,) if function == IS_LEAF else (None,)

    def attribute_set(self, tensor: Tensor, name: str) -> None:
        """Raise CaptureError if an attribute is set on one of the user's tensors."""
        if id(tensor) in self._users and not name.startswith("_"):
            raise CaptureError(
                f"forward sets the attribute {name!r} of the tensor {self._users[id(tensor)][0]} at "
                f"{source_line(sys._getframe(2))}, which a compiled program does not set again: set an attribute of "
                "the model"
            )

    def undress(self) -> None:
        """Let go of the tensors."""
        self._users.clear()


def marks(tensor: Tensor) -> dict[str, Any]:
    """The attributes that code has set on a result of the trace."""
    return {key: value for key, value in vars(tensor).items() if key != "elem" and not key.startswith("_")}
