"""What a failed trace tells the user: the module and the line in their code, what torch says, and the way out."""

from __future__ import annotations

import linecache

from shardc.capture.torch_patches.fake_tensors import is_data_dependent
from shardc.capture.user_frames import failing_line
from shardc.errors import CaptureError


def explained(error: Exception, path: str, at: tuple[str, int] | None = None) -> CaptureError:
    """The CaptureError for a failed trace in the module at `path`: where in the user's code (the file and line `at`, or
    where the error passed through), what, and the way out."""
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
    return CaptureError(f"{place}: the model cannot be traced: {type(error).__name__}: {reason}{code}")
