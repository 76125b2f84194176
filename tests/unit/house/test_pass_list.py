"""One list of passes: what names the passes names those of `PIPELINE`, in their order."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import shardc
from shardc.passes.pipeline import NAMES, PIPELINE, part

ROOT = Path(__file__).parents[3]


def test_passes_holds_the_list_and_one_file_a_pass() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")}
    assert files == {"__init__", "pipeline", *NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_the_one_of_its_file_and_shows_before_and_after(name: str) -> None:
    module = importlib.import_module(f"shardc.passes.{name}")
    assert getattr(module, name) is PIPELINE[NAMES.index(name)]
    text = module.__doc__ or ""
    assert text.lower().startswith(name) and text.count("\n") > 3
    assert "->" in text or "becomes" in text or "codegen" in name, f"{name} shows no program before and after"


def test_the_readme_draws_the_list() -> None:
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert picture is not None
    drawn = [word for word in re.findall(r"\w+", re.sub(r"\[.*?\]", "", picture[1])) if word in NAMES]
    assert tuple(dict.fromkeys(drawn)) == NAMES


def test_the_docs_write_the_list() -> None:
    text = (ROOT / "docs/design/index.md").read_text()
    blocks = (re.findall(r"\w+", block) for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL))
    assert list(NAMES) in blocks
    rows = [row for row in re.findall(r"^\| (\w+) \|", text, re.MULTILINE) if row in NAMES]
    assert tuple(rows) == NAMES


def test_a_compiled_program_has_a_graph_after_every_pass_and_no_other() -> None:
    compiled = shardc.compile(nn.Linear(8, 8), "dp=2", (torch.zeros(4, 8),))
    for name in NAMES:
        assert compiled.graph(name)
    with pytest.raises(shardc.ShardcError, match=f"the passes are {', '.join(NAMES)}"):
        compiled.graph("lower")


def test_a_part_of_the_list_is_a_part_of_the_list() -> None:
    assert part("capture", "codegen") == PIPELINE
    assert [one.name for one in part("reshard", "localize")] == ["reshard", "localize"]
