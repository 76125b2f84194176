"""A process that compiles many programs: what it has compiled and dropped does not fill its memory."""

from __future__ import annotations

import gc
import linecache
import weakref
from functools import _lru_cache_wrapper

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph_module import _loader

import shardc
from shardc.capture.torch_patches import fake_tensors
from shardc.planning.gc_pause import gc_paused

COUNT = 8


def dropped(widths: range) -> None:
    for width in widths:
        model = shardc.shard(nn.Sequential(nn.Linear(width, width), nn.ReLU()), mesh="a=2")
        model(torch.ones(4, width)).sum().backward()


def live() -> dict[str, int]:
    """What is there: tensors, texts of generated code, torch's and ours, and all objects."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(one), Tensor) for one in objects)
    return {"tensors": tensors, "code": len(linecache.cache), "graphs": len(_loader.eval_cache), "all": len(objects)}


def without_bound() -> dict[str, int]:
    """The entries of shardc's caches that have no bound."""
    caches = (one for one in gc.get_objects() if type(one) is _lru_cache_wrapper)
    ours = [one for one in caches if one.__module__.startswith("shardc") and one.cache_info().maxsize is None]
    return {f"{one.__module__}.{one.__qualname__}": one.cache_info().currsize for one in ours}


def test_programs_that_are_dropped_leave_next_to_nothing() -> None:
    dropped(range(8, 12, 2))
    before = live()
    kept = shardc.shard(nn.Sequential(nn.Linear(12, 12), nn.ReLU()), mesh="a=2")
    kept(torch.ones(4, 12)).sum().backward()
    with_one = live()
    assert with_one["tensors"] > before["tensors"] and with_one["code"] > before["code"]
    del kept
    entries = without_bound()
    dropped(range(14, 14 + 2 * COUNT, 2))
    after = live()
    left = after.pop("all") - before.pop("all")
    assert after == before
    assert left < 2000 * COUNT  # entries of caches that have a bound
    assert all(entries[name] == count for name, count in without_bound().items())


def test_what_torch_knows_of_operators_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped(range(8, 10, 2))
    known = FakeTensorMode.cache_info().size
    monkeypatch.setattr(fake_tensors, "MOST_KNOWN", known - 1)
    fake_tensors.fake_mode()
    assert FakeTensorMode.cache_info().size < known


def test_the_end_of_a_pause_frees_what_only_holds_itself() -> None:
    class Ring:
        def __init__(self) -> None:
            self.ring = self

    assert gc.isenabled()
    with gc_paused():
        assert not gc.isenabled()
        inside = weakref.ref(Ring())
        assert inside() is not None
    assert inside() is None and gc.isenabled()
