"""The line that tells what takes long."""

import time

import pytest

from shardc.inspect.progress import working


@pytest.mark.parametrize(("rank", "told"), [(None, True), ("0", True), ("3", False)])
def test_one_of_many_ranks_tells(
    rank: str | None, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with working("planning", patience=0.0):
        time.sleep(0.1)
    assert ("planning" in capsys.readouterr().err) == told


def test_what_is_soon_done_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with working("planning"):
        pass
    assert capsys.readouterr().err == ""
