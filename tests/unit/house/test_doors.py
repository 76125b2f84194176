"""The doors of the house: each walk of CONTRIBUTING.md, applied to a copy of the tree, counted and tried."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from checks.preloaded import ran

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = {
    title: int(count) for title, count in re.findall(r"^\| \[([^\]]+)\]\(#[\w-]+\) \| (\d) \|$", PAGE, re.MULTILINE)
}
WALKS = [walk for walk in re.split(r"^## ", PAGE, flags=re.MULTILINE) if "```diff" in walk]


def block(walk: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", walk, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{walk.splitlines()[0]} has no {language} block"
    return found[1]


def files_of(diff: str) -> set[str]:
    return set(re.findall(r"^diff --git a/(\S+)", diff, re.MULTILINE))


def title(walk: str) -> str:
    first = walk.splitlines()[0]
    return first[0].lower() + first[1:]


def test_every_door_is_walked() -> None:
    assert list(PLACES) == [title(walk) for walk in WALKS]
    assert list(PLACES.values()) == [1, 2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("walk", WALKS, ids=title)
def test_a_walk_touches_as_many_places_as_it_says(walk: str) -> None:
    assert len(files_of(block(walk, "diff"))) == PLACES[title(walk)]


def test_every_walk_works_one_after_another(tmp_path: Path) -> None:
    for folder in ("shardc", "passes", "runtime"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    script = tmp_path / "walk.py"
    for walk in WALKS:
        applied = subprocess.run(
            ["git", "apply", "-"], input=block(walk, "diff"), cwd=tmp_path, capture_output=True, text=True
        )
        assert applied.returncode == 0, f"{title(walk)}: the diff no longer applies; write it anew\n{applied.stderr}"
        script.write_text(block(walk, "python"))
        done = ran(str(script), cwd=tmp_path, path=tmp_path)
        assert done.returncode == 0, f"{title(walk)}:\n{done.stderr}"
