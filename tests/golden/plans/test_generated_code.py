"""Generated code of a deep model is short, and lint and formatter find nothing in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shardc

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def code() -> str:
    """A Llama with the sizes of Llama-3-8B, but of three layers."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import llama
    finally:
        sys.path.pop(0)
    model, inputs = llama.build("8b", 3, llama.LlamaForCausalLMLoss), llama.example_inputs(32, 4096)
    return shardc.compile(model, "dp=4,tp=8", inputs, hardware="h100").code


def test_it_is_short(code: str) -> None:
    # both of these, a layer in each, and the end of the one in backward: a bucket begins within its last run
    assert code.count("\ndef ") == 5
    assert len(code.splitlines()) < 560


def test_lint_and_formatter_find_nothing(code: str, tmp_path: Path) -> None:
    (tmp_path / "llama.py").write_text(code)
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path / "llama.py")]
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run([sys.executable, "-m", "ruff", *command, *settings], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
