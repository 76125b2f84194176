"""The line that tells what takes long, and the bar that tells how much is done."""

import io
import sys
import time

import pytest

from shardc.inspect.progress import tracked, working


class _Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch, rank: str = "0") -> _Terminal:
    """A terminal in place of stderr. No fixture: pytest puts its own stream there when the test begins."""
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("RANK", rank)
    return stream


@pytest.mark.parametrize(("rank", "told"), [(None, True), ("0", True), ("3", False)])
def test_one_of_many_ranks_tells(
    rank: str | None, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with working("planning", patience=0.0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ("planning ...\n" if told else "")


def test_what_is_soon_done_is_not_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with working("planning"):
        pass
    terminal = terminal_of(monkeypatch)
    with working("planning"):
        pass
    assert terminal.getvalue() == "" and capsys.readouterr().err == ""


def test_a_terminal_shows_the_time_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with working("planning", patience=0.0):
        time.sleep(0.3)
    assert "planning" in terminal.getvalue() and "0:00:00" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_terminal_is_the_first_ranks(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch, rank)
    with working("planning", patience=0.0):
        time.sleep(0.1)
    assert list(tracked(range(3), "meshes")) == [0, 1, 2]
    assert ("planning" in terminal.getvalue() and "meshes" in terminal.getvalue()) == (rank == "0")
    assert bool(terminal.getvalue()) == (rank == "0")


def test_an_error_ends_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with pytest.raises(ValueError, match="no"), working("planning", patience=0.0):
        time.sleep(0.1)
        raise ValueError("no")
    assert terminal.getvalue().endswith("\x1b[2K")


def test_a_bar_counts_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    assert list(tracked(iter("abc"), "meshes", 3)) == ["a", "b", "c"]
    assert "meshes" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_a_bar_is_silent_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2], "meshes")) == [1, 2]
    assert capsys.readouterr() == ("", "")
