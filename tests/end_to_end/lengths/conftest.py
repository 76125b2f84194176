"""Counts the traces of a model."""

from __future__ import annotations

import pytest

from shardc.capture.model_trace import ModelTrace


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One element a trace of the model."""
    found: list[object] = []
    real = ModelTrace.run
    monkeypatch.setattr(ModelTrace, "run", lambda self: (found.append(self), real(self))[1])
    return found
