"""Every model of the zoo: one training step on a mesh equals single device in loss, gradients, buffers and draws."""

from __future__ import annotations

import itertools

import pytest

from shardc.ir.layout import Layout
from shardc.ir.program import Role
from zoo.case import Entry
from zoo.pictures import PICTURES
from zoo.plain import PLAIN
from zoo.text import TEXT
from zoo.trial import MESHES, Trial, trial

ZOO: dict[str, Entry] = {**TEXT, **PICTURES, **PLAIN}


HARD_TO_PROVE = frozenset({"gru", "llama", "mixtral", "mobilenet", "qwen2_moe"})
"""Over two axes the solver takes most of a minute to prove the best plans of all of these."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model on one mesh, in turn (HARD_TO_PROVE: on one axis); with --whole-zoo on every mesh."""
    if "mesh" in metafunc.fixturenames:
        if metafunc.config.getoption("--whole-zoo"):
            pairs = list(itertools.product(ZOO, MESHES))
        else:
            pairs = [(name, MESHES[1 if name in HARD_TO_PROVE else k % 2]) for k, name in enumerate(ZOO)]
        metafunc.parametrize(("name", "mesh"), pairs)


@pytest.mark.filterwarnings("ignore:forward leaves something in .*recurrent_states")
def test_trains_like_single_device(name: str, mesh: str) -> None:
    done = trial(ZOO[name], mesh)
    assert done.wrong == []
    check_split(done)


def check_split(done: Trial) -> None:
    """A parameter and a value computed from it lie split beyond the batch, as was asked."""
    plan = done.compiled.plan
    assert any(_split(placed.layout, 0) for placed in plan.placed if placed.role == Role.PARAMETER.value)
    computed = plan.layouts.keys() - {placed.name for placed in plan.placed}
    assert any(_split(plan.layouts[name], 1) for name in computed)


def _split(layout: Layout, first: int) -> bool:
    return any(atom.axes for dim in layout.dims[first:] for atom in dim)
