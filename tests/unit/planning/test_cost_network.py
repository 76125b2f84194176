"""The cost network of real programs: its optimum equals an independent MILP, its price that of what is emitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix
from torch import Tensor, nn

import shardc.rules  # noqa: F401  (registers the rules)
from shardc.api import compile as compile_model
from shardc.capture.trace import capture
from shardc.cost.hardware import Hardware, Link, hardware
from shardc.ir.mesh import Mesh
from shardc.passes.normalize import normalized
from shardc.planning.cost_network import CostNetwork, LayoutDemands
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.rules.factors.factoring import factor
from shardc.solver.problem import Problem
from shardc.solver.proof.certificate import check
from shardc.solver.solve import solve


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(torch.relu(self.up(x)))).pow(2).mean()


def devices() -> list[Hardware]:
    cpu = hardware("cpu")
    return [cpu, replace(cpu, launch=0.0, inside=Link(1e-9, 1e12)), replace(cpu, inside=Link(1e-6, 1e8))]


def by_milp(problem: Problem) -> float:
    """The optimum by HiGHS, with a 0/1 variable per choice and per pair of choices (the local polytope)."""
    scale = 1e6
    costs: list[float] = []
    bounds: list[float] = []
    first: list[int] = []
    rows: list[tuple[dict[int, float], float]] = []

    def add(values: np.ndarray) -> int:
        start = len(costs)
        finite = np.isfinite(values)
        costs.extend((np.where(finite, values, 0.0) * scale).tolist())
        bounds.extend(finite.astype(float).tolist())
        return start

    for unary in problem.unary:
        first.append(add(unary))
        rows.append((dict.fromkeys(range(first[-1], first[-1] + len(unary)), 1.0), 1.0))
    for (u, v), table in problem.edges.items():
        start, (m, n) = add(table.ravel()), table.shape
        rows += [({**{start + i * n + j: 1.0 for j in range(n)}, first[u] + i: -1.0}, 0.0) for i in range(m)]
        rows += [({**{start + i * n + j: 1.0 for i in range(m)}, first[v] + j: -1.0}, 0.0) for j in range(n)]
    entries = [(r, c, x) for r, (row, _) in enumerate(rows) for c, x in row.items()]
    matrix = coo_matrix(
        ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])), (len(rows), len(costs))
    )
    right = np.array([value for _, value in rows])
    integral = np.zeros(len(costs))
    integral[: max(first) + len(problem.unary[-1])] = 0
    for start, unary in zip(first, problem.unary, strict=True):
        integral[start : start + len(unary)] = 1
    result = milp(
        costs,
        constraints=LinearConstraint(matrix.tocsr(), right, right),
        bounds=Bounds(0, bounds),
        integrality=integral,
    )
    assert result.success, result.message
    return float(result.fun) / scale


@pytest.mark.parametrize("device", devices(), ids=["cpu", "fast", "slow"])
@pytest.mark.parametrize("mesh", ["dp=4", "dp=2,tp=2"])
@pytest.mark.parametrize("sizes", [(8, 64, 256), (64, 16, 32)])
def test_optimum_equals_an_independent_milp(sizes: tuple[int, int, int], mesh: str, device: Hardware) -> None:
    batch, width, hidden = sizes
    program = normalized(capture(Mlp(width, hidden), (torch.zeros(batch, width),)))
    network = CostNetwork(factor(program), Mesh.parse(mesh), device, LayoutDemands())
    network.build()
    problem = network.problem()
    solution = solve(problem)
    assert solution.exact
    assert solution.cost == pytest.approx(by_milp(problem), rel=1e-6)
    assert check(problem, solution.certificate) <= solution.cost * (1 + 1e-9)


@pytest.mark.parametrize("device", devices(), ids=["cpu", "fast", "slow"])
@pytest.mark.parametrize("mesh", ["dp=4", "dp=2,tp=2", "a=2,b=2,c=2"])
def test_what_is_emitted_costs_what_the_solver_promised(mesh: str, device: Hardware) -> None:
    plan = compile_model(Mlp(64, 256), mesh, (torch.zeros(8, 64),), hardware=device).plan
    emitted = plan.compute + sum(conversion.seconds for conversion in plan.conversions)
    assert emitted <= plan.cost * (1 + 1e-9)
    # lowering may reuse a step that two conversions share
    assert emitted == pytest.approx(plan.cost - plan.simplified, rel=0.01)


class Biased(nn.Module):
    """Layers alike, of modules whose parameters forward reads and backward need not."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(16, 32) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x.pow(2).mean()


def test_under_a_bound_on_memory_layers_that_are_alike_share_all_tables() -> None:
    """Else the solver could not fold them: the network of Qwen2 had three times the variables of Llama's."""
    mesh = Mesh.parse("dp=2,tp=2")
    tables: list[int] = []
    for layers in (3, 5):
        program = normalized(capture(Biased(layers), (torch.randn(8, 16),)))
        network = RecomputeNetwork(factor(program), mesh, hardware("cpu"), LayoutDemands())
        network.build()
        problem, loads = network.problem(), network.memory_terms()
        tables.append(len({*map(id, problem.edges.values()), *(id(load.table) for load in loads.all)}))
    assert tables[0] == tables[1]
