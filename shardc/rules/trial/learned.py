"""What trial has learned, remembered: in this process for every operator, on disk for those that torch ships.

The key holds everything that the answer depends on: schema, types, sizes and all other arguments, the version of torch
and the code of the trial itself. Operators of the user are learned anew in every process: their schema does not tell
that their code has changed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.rules.trial import checker, guard, recombine, sample_call, trial
from shardc.rules.trial.sample_call import SampleCall
from shardc.rules.trial.trial import Learned, learn

_KNOWN: dict[str, Learned] = {}


def learned(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Learned:
    """The rule of one call of an operator that has none, found by trial (a fraction of a second) or remembered."""
    key = _key(SampleCall.of(operator, args, kwargs))
    if key not in _KNOWN:
        path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        shipped = operator.namespace in ("aten", "prims")
        found = _read(path, key) if shipped else None
        if found is None:
            found = learn(operator, args, kwargs)
            if shipped:
                _write(path, key, found)
        _KNOWN[key] = found
    return _KNOWN[key]


def _key(call: SampleCall) -> str:
    kwargs = sorted(call.kwargs.items())
    return repr((torch.__version__, _code(), str(call.operator._schema), call.args, kwargs, call.actual, call.dtypes))


@functools.cache
def _code() -> str:
    """A hash of the trial's own code."""
    modules = (checker, guard, recombine, sample_call, trial)
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(text).hexdigest()[:16]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardc" / "rules"


def _read(path: Path, key: str) -> Learned | None:
    """What a file remembers; None if it is not there, damaged, or about something else."""
    try:
        told = json.loads(path.read_text())
        if told["key"] != key:
            return None
        reads = told["reads"]
        sizes = {int(p): tuple(size) if isinstance(size, list) else size for p, size in told["sizes"].items()}
        found = Learned(
            told["text"],
            tuple(frozenset(group) for group in told["linear"]),
            tuple(frozenset(group) for group in reads) if reads is not None else None,
            sizes,
            told["replicated"],
            told["refused"],
        )
        if not found.refused:
            found.rule()  # reads the text
        return found
    except Exception:  # whatever is wrong with the file, the operator is tried again
        return None


def _write(path: Path, key: str, found: Learned) -> None:
    """Remember on disk, as one step, so that no other process reads half a file; a disk that is full is no error."""
    told = {
        "key": key,
        "text": found.text,
        "linear": [sorted(group) for group in found.linear],
        "reads": [sorted(group) for group in found.reads] if found.reads is not None else None,
        "sizes": {str(p): size for p, size in found.sizes.items()},
        "replicated": found.replicated,
        "refused": found.refused,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(told))
        part.replace(path)
    except OSError:
        return
