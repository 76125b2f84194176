"""torch.distributions during a trace: without the checks of their arguments, which look at values.

Normal(mean, scale).log_prob(x)    # asks whether all of scale is positive: no trace can know
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributions import Distribution

_NO_SIZE = torch.Size()
_initialise = Distribution.__init__


@contextmanager
def unchecked() -> Generator[None]:
    """As torch.compile does: no distribution checks its arguments or samples, not even one that was told to."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Distribution, "__init__", _without_checks))
        stack.enter_context(patch.object(Distribution, "_validate_sample", _accept))
        stack.enter_context(patch.object(Distribution, "_validate_args", False))
        yield


def _without_checks(
    self: Distribution,
    batch_shape: torch.Size = _NO_SIZE,
    event_shape: torch.Size = _NO_SIZE,
    validate_args: bool | None = None,
) -> None:
    _initialise(self, batch_shape, event_shape, validate_args=False)


def _accept(self: Distribution, value: Tensor) -> None:
    """What `_validate_sample` returns where it finds nothing wrong."""
