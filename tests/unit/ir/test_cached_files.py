"""Folders of kept files do not grow for ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardc.ir import cached_files
from shardc.ir.cached_files import keep_file, used


def test_what_was_used_longest_ago_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_files, "MOST_BYTES", 1000)
    for number in range(10):
        keep_file(tmp_path / f"{number}.json", "x" * 100)
        os.utime(tmp_path / f"{number}.json", (number, number))
    assert len(list(tmp_path.iterdir())) == 10
    used(tmp_path / "0.json")
    keep_file(tmp_path / "new.json", "x" * 100)
    assert {path.stem for path in tmp_path.iterdir()} == {"0", "7", "8", "9", "new"}


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    keep_file(tmp_path / "taken" / "file.json", "x")
    used(tmp_path / "nowhere")
    assert (tmp_path / "taken").read_text() == ""
