"""What `--json` prints: the shape of it is kept beside this file, `json/*.txt`, with a word for every number."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardc.cli import main

ROOT = Path(__file__).parents[3]
NUMBER = re.compile(r"\d+\.\d+(e-?\d+)?")
MESH = "--mesh tp=2 --hardware h100"


def shape(value: Any) -> Any:
    """The keys, and what kind of values stand there; of a list its first element."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0]), *(["..."] if len(value) > 1 else [])] if value else []
    return NUMBER.sub("N", value) if isinstance(value, str) and len(value) < 40 else type(value).__name__


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plan", f"plan examples/mlp.py {MESH}"),
        ("devices", "plan examples/mlp.py --devices 2 --hardware h100"),
        ("why", f"explain examples/mlp.py {MESH} --why up.weight"),
        ("why_not", f"explain examples/mlp.py {MESH} --why up.weight --layout=-,tp"),
        ("conflicts", f"explain examples/mlp.py {MESH} --constraint up.weight=tp,- --constraint down.weight=tp,-"),
        ("run", "run examples/mlp.py --mesh tp=2"),
        ("diff", "diff before.json after.json"),
    ],
)
def test_json_has_the_shape_that_programs_read(
    name: str,
    arguments: str,
    golden: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if name == "diff":
        for file, constraint in (("before", "tp,-"), ("after", "-,tp")):
            made = f"plan examples/mlp.py {MESH} --constraint=up.weight={constraint} -o {file}.json"
            assert main(shlex.split(made)) == 0
        capsys.readouterr()
    assert main([*shlex.split(arguments), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    golden(name, json.dumps(shape(told), indent=2, ensure_ascii=False) + "\n")
