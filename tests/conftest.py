"""Settings shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from checks.fuzz import SEED, TIMES

torch.set_num_threads(1)  # the tests run in two processes on two cores
gc.set_threshold(50_000, 20, 50)  # a tenth of the time went into walking over all of torch, where little is garbage

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="shardc-tests-")  # what trial learns is not the user's
os.environ["SHARDC_PLAN_CACHE"] = "off"  # tests solve
os.environ.setdefault("SHARDC_VERIFY", "1")  # after every pass, also in the processes that tests start

# The tests start many processes. Where no bytecode may be written beside the sources, each would compile all of torch
# anew, which takes longer than most of the tests; workers, their children and later runs share what was compiled.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parents[1] / ".pytest_cache/bytecode")

settings.register_profile(
    "ci", deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


def pytest_report_header() -> str:
    return f"property tests: SHARDC_SEED={SEED} SHARDC_FUZZ={TIMES}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole-zoo", action="store_true", help="train every model on every mesh")
    parser.addoption(
        "--update-golden", action="store_true", help="write what is printed now to the texts in tests/golden/"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests first: one of them takes a minute, and must not begin when the other process is done."""
    items.sort(key=lambda item: "property" not in item.path.parts)
