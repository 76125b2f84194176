"""Global switches of torch during a trace: each makes torch, or a library on top of it, take the path that traces."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # whose module has a logger

from shardc.capture.torch_patches import module_forwards, transformers
from shardc.capture.torch_patches.autocast import traced_on_the_cpu
from shardc.capture.torch_patches.compiling_flag import CompilingFlag
from shardc.capture.torch_patches.eager_semantics import patched
from shardc.capture.user_frames import source_line
from shardc.errors import CaptureError


def _refusing_backward() -> Callable[..., Any]:
    thread, backward = threading.get_ident(), torch.autograd.backward

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:  # another thread trains another model
            return backward(*args, **kwargs)
        raise CaptureError(
            f"forward calls backward at {source_line(sys._getframe(1))}, which adds to .grad, and a compiled program "
            "has none within: take the gradients with torch.autograd.grad"
        )

    return refuse


@contextmanager
def tracing_flags(module: nn.Module, compiling: CompilingFlag) -> Generator[None]:
    """Set the switches for a trace of `module`, `compiling` among them. At the end, also after an error, they are as
    they were, and so are the states of torch's and Python's random generators."""
    generator, python_random = torch.get_rng_state(), random.getstate()
    with ExitStack() as stack:
        # torch sets this flag in its own compilers only. (The exporting flag would not do: transformers drops is_causal
        # where it is set.)
        stack.enter_context(patch.object(torch.compiler, "_is_compiling_flag", compiling))
        # AOTAutograd traces in anomaly mode, which formats a Python stack per operator. Provenance knows the lines, so
        # the switch is replaced by one that does nothing. The user's own anomaly mode would look for nan in fakes.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(patch.object(torch.autograd, "detect_anomaly", lambda *_, **__: nullcontext()))
        stack.enter_context(patch.object(torch.autograd, "backward", _refusing_backward()))
        # With mkldnn, recurrent layers become fused CPU operators, whose backward no rule can split. The public switch,
        # torch.backends.mkldnn.flags, also sets precisions.
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(traced_on_the_cpu(module))
        stack.enter_context(patched())
        stack.enter_context(module_forwards.patched())
        # what the user has compiled with torch.compile runs as it was written
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # What a fake tensor cannot do is told by the error that is raised, and is no error where a trace may fail.
        stack.enter_context(patch.object(logging.getLogger(FakeTensorMode.__module__), "disabled", True))
        if "transformers" in sys.modules:
            stack.enter_context(transformers.patched(module))
        try:
            yield
        finally:
            torch.set_rng_state(generator)
            random.setstate(python_random)
