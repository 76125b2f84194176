"""A plan, its summary, its answers and its advice: as text, on a terminal, in a notebook and as JSON."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import shardc
from shardc import ShardcError
from shardc.analysis.parallelism import AxisRole, AxisUse, Block, Parallelism, Use
from shardc.cli import main
from shardc.explain.plan import DEAREST, Plan
from shardc.explain.summary import Summary
from shardc.inspect.console import THEME, show
from shardc.inspect.data import data
from shardc.ir.mesh import Mesh
from shardc.ir.report import Columns, Report, Section

ROOT = Path(__file__).parents[3]
SUMMARY = Summary(
    Mesh.parse("dp=2,tp=4"), "h100",
    Parallelism(
        (AxisUse("dp", 2, (Use(AxisRole.DATA, "batch"), Use(AxisRole.STORAGE, "weights gathered before use")), 9, 9),
         AxisUse("tp", 4, (Use(AxisRole.TENSOR, "columns of weights"), Use(AxisRole.TENSOR, "rows of weights")))),
        (Block("layers.*", 4, {"dp": (Use(AxisRole.DATA, "batch", ("up", "down")),),
                               "tp": (Use(AxisRole.TENSOR, "columns of weights", tuple("abcdefgh")),
                                      Use(AxisRole.TENSOR, "rows of weights", ("down",)))}),),
    ),
    0.5, 1000, "tokens", 1e12, 0.25, 2**31, 2**33, 2**32, True,
    {"arithmetic": 0.3, "memory bandwidth": 0.0, "launches": 0.001, "dp": 0.05, "tp": 0.149},
    {"dp": "between nodes", "tp": "inside a node"},
)  # fmt: skip
TEXT = """\
dp=2,tp=4 on h100: 500.00 ms a step
  speed      2,000 tokens a second, 250 a device
  MFU        25.0% of the peak, for 1e+12 FLOPs a step
  binds      arithmetic 60%, tp (inside a node) 30%, dp (between nodes) 10%; and the bound on memory, for which values \
are regathered or computed again
  memory     2.0 GiB, 25% of the 8.0 GiB of a device

what the axes do
  dp: batch (data parallel); all weights are stored split, and gathered before use (fully sharded)
  tp: columns, then rows of weights (tensor parallel)

in each block
  layers.*  x4  dp  batch
                tp  columns: a, b, c, d, e, 3 more; rows: down"""


class Deep(nn.Module):
    """Equal layers; in the name of a parameter stands what HTML would read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(12))
        self.register_parameter("<b>&", nn.Parameter(torch.ones(64)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return (x * getattr(self, "<b>&")).square().mean()


@pytest.fixture(scope="module")
def plan() -> Plan:
    asked = {f"layers.{n}.weight": "tp,-" if n % 2 else "-,tp" for n in range(12)}
    return shardc.compile(Deep(), "tp=2", (torch.randn(32, 64),), hardware="h100", constraints=asked).plan


def test_a_summary_prints_well() -> None:
    assert str(SUMMARY) == TEXT
    assert SUMMARY.rate == 2000.0 and SUMMARY.binds == "arithmetic"
    assert str(Summary(Mesh.parse("dp=1"), "h100")) == "dp=1 on h100: 0 s a step"


def test_a_summary_is_of_the_plan(plan: Plan) -> None:
    summary = plan.summary
    assert (summary.rows, summary.unit) == (32, "samples")
    # every product once forward and, for its two gradients, twice backward; x needs none
    assert summary.flops == 2 * 32 * 64 * 64 * (12 * 3 - 1)
    assert summary.mfu == pytest.approx(summary.flops / 67e12 / 2 / summary.seconds, rel=0.5)
    assert summary.seconds == plan.predicted == pytest.approx(sum(summary.spent.values()))
    assert summary.held == plan.memory.peak and not summary.memory_binds


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_fits_a_terminal_and_folds_its_layers(plan: Plan, width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, theme=THEME)
    tables = [section for section in plan.report().sections if isinstance(section.content, Columns)]
    show(Report([], tables), console)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()]
    assert max(map(len, lines)) <= width
    assert sum("layers.*.weight" in line for line in lines[: lines.index("sent, per rank and step")]) == 2


def test_the_dearest_conversions_are_told_with_their_causes(plan: Plan) -> None:
    title, table = next((s.title, s.content) for s in plan.report().sections if s.title == "dearest conversions")
    assert isinstance(table, Columns) and 0 < len(table.rows) <= DEAREST
    seconds = {one.cause: one.seconds for one in plan.conversions if one.sent}
    assert all(seconds) and f"\n{title}\n" in str(plan)
    causes = [row[4] for row in table.rows]
    assert any(re.search(r"\+sum@tp to f?\[", cause) and ", for " in cause for cause in causes), causes
    assert any(row[1].startswith("x") and "layers.*" in row[5] for row in table.rows)


class Cells(HTMLParser):
    """The tags and the text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "shown", [lambda plan: plan, lambda plan: plan.summary, lambda plan: plan.why("<b>&"),
              lambda plan: plan.why_not("<b>&", "tp")],
)  # fmt: skip
def test_a_notebook_shows_the_same_and_escapes_it(plan: Plan, shown: Callable[[Plan], Plan]) -> None:
    what = shown(plan)
    cells = Cells(what._repr_html_())
    assert cells.tags <= {"pre", "b", "table", "tr", "td"} and "<b>&" not in what._repr_html_().replace("<b>&l", "")
    assert "".join(cells.text.split()) == "".join(str(what).split())


def test_json_is_whole_and_plain(plan: Plan) -> None:
    told = json.loads(json.dumps(data(plan), allow_nan=False))
    assert told["mesh"] == {"tp": 2} and told["summary"]["unit"] == "samples"
    assert told["summary"]["binds"] == plan.summary.binds and told["summary"]["rate"] == plan.summary.rate
    assert [axis["axis"] for axis in told["summary"]["parallelism"]["axes"]] == ["tp"]
    section = Report(["a"], [Section("b", Columns([["c"]], "<"))])
    assert data(section) == {
        "head": ["a"], "sections": [{"title": "b", "content": {"rows": [["c"]], "aligned": "<"}}], "tail": []
    }  # fmt: skip
    assert data({Mesh.parse("dp=2"): float("inf"), "x": {1.5}}) == {"{'dp': 2}": None, "x": [1.5]}


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("plan examples/mlp.py --mesh tp=2", {"mesh", "operators", "predicted", "proof", "summary"}),
        ("plan examples/mlp.py --devices 2", {"ranked", "command", "devices"}),
        ("explain examples/mlp.py --mesh tp=2 --why up.weight", {"layout", "readers", "runner_up"}),
    ],
)
def test_commands_print_json(
    command: str, keys: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main([*command.split(), "--hardware", "h100", "--json"]) == 0
    assert keys <= json.loads(capsys.readouterr().out).keys()


def test_advice_is_planned_and_helps(plan: Plan) -> None:
    found = plan.advice()
    assert 0 < len(found) <= 3 and [one.gain for one in found] == sorted((one.gain for one in found), reverse=True)
    best = found[0]
    assert best.change == "twice the batch" and best.summary.rows == 64
    assert best.gain == pytest.approx(best.summary.rate / plan.summary.rate - 1.0, abs=0.02)
    assert re.fullmatch(r"twice the batch: \+\d+\.\d% samples a second \(.* a step, .* a device\)", str(best))


def test_a_plan_that_was_loaded_cannot_be_asked_for_advice(plan: Plan) -> None:
    import pickle

    with pytest.raises(ShardcError, match="compile the model again"):
        pickle.loads(pickle.dumps(plan)).advice()
