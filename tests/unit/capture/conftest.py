"""Watching what capture does with repeated layers."""

from __future__ import annotations

import pytest

from checks.stitched import Spy


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)
