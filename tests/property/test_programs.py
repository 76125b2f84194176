"""Random programs on random meshes with random constraints: the values of a single device, or a ShardcError.

An example is one program on one mesh with one set of constraints and one kind of hardware. What asks about
no mesh, from capture to factors, is shared by a program's examples.
"""

from __future__ import annotations

import warnings
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checks.compiling import compiled_program, factored_program
from checks.fuzz import TIMES, searched
from samples.grower import AXES, Program, random_spec
from samples.random_programs import grow
from shardc.capture.trace import capture
from shardc.compiled import Compiled
from shardc.cost.hardware import Hardware, Link, hardware
from shardc.decided import Decided
from shardc.errors import CaptureError, RuleError, ShardcError
from shardc.explain.planned import plan_of
from shardc.ir.mesh import Mesh
from shardc.ir.program import Role
from shardc.planning.constraints import parameter_demands

EVERY = ("pointwise", "contraction", "view", "reduction", "shape", "index", "window")
MENUS: dict[str, tuple[str, ...]] = {
    "pointwise": ("pointwise",),
    "contraction": ("contraction", "contraction", "pointwise"),
    "view": ("view", "view", "contraction", "reduction"),
    "reduction": ("reduction", "pointwise", "view"),
    "shape": ("shape", "shape", "pointwise"),
    "shape and view": ("shape", "view", "contraction"),
    "index": ("index", "index", "pointwise"),
    "window": ("window", "view", "pointwise"),
    "all": EVERY,
    "all but windows": EVERY[:-1],
}
SHARES = 6  # examples per program
PROGRAMS = 36  # per menu
MESHES = {  # up to 12 devices
    1: [(2,), (3,), (4,), (1,)],
    2: [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (1, 2), (3, 4), (4, 3), (3, 3)],
    3: [(2, 2, 2), (2, 1, 2), (2, 3, 2), (3, 2, 1), (1, 1, 4), (2, 2, 3)],
}
counted = {"examples": 0, "refused": 0, "programs": 0, "shaky": 0}


def machine(random: Random) -> Hardware:
    """Links and arithmetic of random speed, so that every kind of plan is cheapest somewhere."""
    if random.random() < 0.2:
        return hardware("cpu")

    def speed() -> float:
        return 10.0 ** random.randint(2, 9)

    latency = random.choice((0.0, 1e-9, 1e-5))
    overlap = random.choice((0.0, 0.7, 1.0))
    stall = random.choice((0.0, 0.0, 1e-6, 1e-3))
    inside, between = (Link(latency, speed(), overlap=overlap, stall=stall) for _ in range(2))
    launch = random.choice((0.0, 1e-9, 1e-6))
    return Hardware("random", {"float32": speed()}, speed(), launch, random.choice((1, 2, 4, 64)), inside, between)


def run(
    program: Program, call: Program | Compiled, inputs: list[Tensor], started: frozenset[int]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients, by name order, with fixed tangents on the outputs numbered `started`."""
    torch.default_generator.manual_seed(3)
    outputs = call(*inputs)
    wanted = [t for t in (*program.parameters(), *inputs) if t.requires_grad]
    starts = [outputs[i] for i in sorted(started)]
    if not starts or not wanted:
        return [o.detach() for o in outputs], []
    tangents = [torch.linspace(1.0, -1.5, o.numel(), dtype=o.dtype).view(o.shape) for o in starts]
    return [o.detach() for o in outputs], list(torch.autograd.grad(starts, wanted, tangents, allow_unused=True))


def roots(program: Program, outputs: list[Tensor]) -> frozenset[int]:
    """The outputs from which backward starts: the loss, or all that have a gradient."""
    return frozenset(i for i, o in enumerate(outputs) if o.requires_grad and (i == 0 or not program.with_loss))


def off(found: list[Tensor | None], expected: list[Tensor | None], scale: float) -> float:
    """The largest difference, relative to the tensor's largest element, with a floor for values that cancel to zero."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            present = other if one is None else one
            worst = max(worst, 0.0 if present is None else float(present.abs().max()) / scale)
            continue
        assert one.shape == other.shape and one.dtype == other.dtype
        difference = float((one - other).abs().max())
        worst = max(worst, difference / max(float(other.abs().max()), 1e-2 * scale))
    return worst


@pytest.mark.parametrize("menu", MENUS)
def test_random_programs_equal_single_device(menu: str) -> None:
    """Ten menus with 200 examples or more each; few programs are too shaky to compare, few constraints are refused."""
    counted.update(dict.fromkeys(counted, 0))

    # shrinking takes minutes; the program is printed
    @searched(PROGRAMS, shrink=False)
    @given(random=st.randoms(use_true_random=False))
    def search(random: Random) -> None:
        examine(menu, random)

    search()
    print(f"{menu}: {counted}")
    assert counted["examples"] >= 200 * TIMES
    assert counted["refused"] < counted["examples"] / 3
    assert counted["shaky"] < counted["programs"] / 5


def examine(menu: str, random: Random) -> None:
    """Grow one program and compare it on several meshes."""
    axes = random.choice((1, 2, 2, 3))
    program, inputs = grow(random, MENUS[menu], random.randint(2, 8), axes)
    counted["programs"] += 1
    started = roots(program, program(*inputs))
    expected = run(program, program, inputs, started)
    flat = [*expected[0], *expected[1]]
    scale = max([float(t.abs().max()) for t in flat if t is not None and t.is_floating_point()], default=0.0) or 1.0
    if not all(t is None or torch.isfinite(t).all() for t in flat):
        counted["shaky"] += 1
        return
    program.noise = torch.Generator().manual_seed(0)
    noisy = run(program, program, inputs, started)
    program.noise = None
    if off([*noisy[0], *noisy[1]], flat, scale) > (1e-11 if program.exact else 1e-5):
        # a maximum of equals, or a branch on a rounding error: any order of additions may change it
        counted["shaky"] += 1
        return
    constrained = any(name.startswith("constrain") for name, _, _ in program.steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = capture(program, tuple(inputs), differentiable=started)
    ports = [port for port in captured.inputs if port.role is Role.PARAMETER]
    shapes = {name: list(p.shape) for name, p in program.named_parameters()}
    factored = None
    for _ in range(SHARES):
        sizes = random.choice(MESHES[axes])
        mesh = Mesh(tuple(zip(AXES, sizes, strict=False)))
        mode = random.choice(("auto", "auto", "propagate"))
        demands = {
            port.name: random_spec(random, shapes[port.name], mesh.sizes) for port in ports if random.random() < 0.3
        }
        device, whole = machine(random), random.random() < 0.8
        counted["examples"] += 1
        what = f"{program}\nmesh {mesh}, mode {mode}, constraints {demands}, {device}, whole outputs {whole}"
        try:
            specs = {name: tuple(_dims(spec)) for name, spec in demands.items()}
            asked = parameter_demands(captured, program, specs, mesh)
            factored = factored or factored_program(captured, mesh, program)
            told = {"demands": asked, "whole": whole, "mode": mode, "model": program, "factored": factored}
            made = compiled_program(captured, mesh, device, **told)
            made = {"capture": made["normalize"], **made}
            compiled = Compiled(Decided(made, plan_of(made)))
        except ShardcError as error:
            assert not isinstance(error, (RuleError, CaptureError)), what
            assert demands or constrained, what
            counted["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(what) from error
        try:
            compiled.executable.mesh.reset()
            found = run(program, compiled, inputs, started)
        except Exception as error:
            raise AssertionError(f"{what}\n{compiled.code}") from error
        assert off([*found[0], *found[1]], flat, scale) <= (1e-9 if program.exact else 1e-5), f"{what}\n{compiled.code}"
        if found[1] or not hasattr(compiled.executable.module, "backward"):
            sent = {axis: n for axis, n in compiled.executable.mesh.traffic.items()}
            assert compiled.plan.bytes_per_axis == pytest.approx(sent), f"{what}\n{compiled.code}"


def _dims(spec: tuple[str | tuple[str, ...] | None, ...]) -> list[tuple[str, ...] | None]:
    table: dict[object, tuple[str, ...] | None] = {None: (), "?": None}
    return [table[s] if s in table else (s,) if isinstance(s, str) else s for s in spec]  # type: ignore[misc]
