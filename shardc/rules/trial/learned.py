"""A cache of the rules that trials learned: in this process for every operator, on disk for those of torch.

The key has everything that the answer depends on: schema, dtypes, sizes and all other arguments, the version of torch,
and the code of the trial itself. Operators of the user are learned again in every process, since their schema does not
change with their code.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.ir.cached_files import cache_folder, keep_file
from shardc.rules.trial import checker, guard, recombine, sample_call, trial
from shardc.rules.trial.sample_call import SampleCall
from shardc.rules.trial.trial import Learned, learn

_KNOWN: dict[str, Learned] = {}


def learned(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Learned:
    """What trial knows about one call of an operator without a rule. A trial takes a fraction of a second."""
    key = _key(SampleCall.of(operator, args, kwargs))
    if key not in _KNOWN:
        path = cache_folder("rules") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        shipped = operator.namespace in ("aten", "prims")
        answer = _read(path, key) if shipped else None
        if answer is None:
            answer = learn(operator, args, kwargs)
            if shipped:
                _write(path, key, answer)
        _KNOWN[key] = answer
    return _KNOWN[key]


def _key(call: SampleCall) -> str:
    kwargs = sorted(call.kwargs.items())
    return repr((torch.__version__, _code(), str(call.operator._schema), call.args, kwargs, call.actual, call.dtypes))


@functools.cache
def _code() -> str:
    """A hash of the code of the trial."""
    modules = (checker, guard, recombine, sample_call, trial)
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(text).hexdigest()[:16]


def _read(path: Path, key: str) -> Learned | None:
    """The answer in a file; None if the file is missing, damaged, or has another key."""
    try:
        data = json.loads(path.read_text())
        if data["key"] != key:
            return None
        reads = data["reads"]
        sizes = {int(p): tuple(size) if isinstance(size, list) else size for p, size in data["sizes"].items()}
        answer = Learned(
            data["text"],
            tuple(frozenset(group) for group in data["linear"]),
            tuple(frozenset(group) for group in reads) if reads is not None else None,
            sizes,
            data["replicated"],
            data["refused"],
        )
        if not answer.refused:
            answer.rule()  # reads the text
        return answer
    except Exception:  # after any error in the file, the operator is tried again
        return None


def _write(path: Path, key: str, answer: Learned) -> None:
    data = {
        "key": key,
        "text": answer.text,
        "linear": [sorted(group) for group in answer.linear],
        "reads": [sorted(group) for group in answer.reads] if answer.reads is not None else None,
        "sizes": {str(p): size for p, size in answer.sizes.items()},
        "replicated": answer.replicated,
        "refused": answer.refused,
    }
    keep_file(path, json.dumps(data))
