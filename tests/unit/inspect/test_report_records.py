"""What the report says of a plan: the same as the plan, and as the runtime, which cuts tensors for real."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc.api
from samples.textbook import Transformer
from shardc.compiled import Compiled
from shardc.inspect.html import data, questions
from shardc.inspect.html.data import Asking, fullest, plan_records
from shardc.inspect.html.layouts import Pictures, runs_of_dim
from shardc.inspect.html.page import in_script, page
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.planning.scheduled import recorded
from shardc.runtime.mesh.orders import FOLDED, axis_of, dealt, order_of

ASKING = Asking("shardc explain model.py --mesh=dp=2,tp=2", shell=True)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    asked = {
        "hardware": "h100",
        "optimizer": "adam",
        "constraints": {"blocks.0.up.weight": ("tp", None)},
    }
    return shardc.api.compile(Transformer(64, 4), "dp=2,tp=2", (torch.randn(64, 32, 64),), **asked)


@pytest.fixture(scope="module")
def records(compiled: Compiled) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "MOST_SEARCHES", 2)
        return plan_records(compiled.reported(ASKING).snapshots, compiled.plan, ASKING)


def brute_force(dim: str, mesh: Mesh, place: dict[str, int]) -> list[int]:
    """The positions of a dim that the rank at a place has: cut atom by atom, as the runtime cuts tensors."""
    (atoms,) = Layout.parse(f"f32[{dim}]").dims
    positions = torch.arange(Layout.parse(f"f32[{dim}]").shape[0]).view([atom.size for atom in atoms])
    for index, atom in enumerate(atoms):
        for axis in atom.axes:
            ranks, rank = mesh.ranks[axis], place[axis_of(axis)]
            if order_of(axis) == FOLDED:
                positions = dealt(positions, index, FOLDED, ranks, rank)
            else:
                chunk = -(-positions.shape[index] // ranks)
                start = min(rank * chunk, positions.shape[index])
                positions = positions.narrow(index, start, min(chunk, positions.shape[index] - start))
    return positions.flatten().tolist()


@pytest.mark.parametrize(
    "dim", ["24", "24@dp", "24@(dp,tp)", "24@(tp,dp)", "24@tp~folded", "24@(dp,tp~folded)", "(4@dp 6@tp)", "(4 6@tp)"]
)
def test_parts_are_those_that_the_runtime_cuts(dim: str) -> None:
    mesh = Mesh.parse("dp=2,tp=3")
    layout = Layout.parse(f"f32[{dim}]")
    for dp, tp in itertools.product(range(2), range(3)):
        place = {"dp": dp, "tp": tp, "tp~folded": tp}
        runs = runs_of_dim(layout.dims[0], place, mesh)
        assert [at for start, length in runs for at in range(start, start + length)] == brute_force(dim, mesh, place)


def test_padding_belongs_to_no_part() -> None:
    mesh = Mesh.parse("tp=4")
    (dim,) = Layout.parse("f32[5@tp]").dims
    assert [runs_of_dim(dim, {"tp": rank}, mesh) for rank in range(4)] == [[[0, 2]], [[2, 2]], [[4, 1]], []]


def test_pictures_say_in_words_what_axes_do() -> None:
    pictures = Pictures(Mesh.parse("dp=2,cp=2,tp=2"))
    number = pictures.number(Layout.parse("f32[16@cp~folded, 8] +sum@tp"))
    assert [word for _, word, _ in pictures.layouts[number]["axes"]] == ["broadcast", "split", "partial"]
    assert "folded" in pictures.layouts[number]["axes"][1][2] and "sum" in pictures.layouts[number]["axes"][2][2]
    assert pictures.number(Layout.parse("f32[16@cp~folded, 8] +sum@tp")) == number and len(pictures.layouts) == 1


def summed(module: dict[str, Any], figure: str) -> float:
    inner = [*module.get("children", []), *module.get("group", [])]
    return module.get(figure, 0.0) + sum(summed(child, figure) for child in inner)


def sent(module: dict[str, Any], axis: int) -> float:
    inner = [*module.get("children", []), *module.get("group", [])]
    own = module["sent"][axis][1] if "sent" in module else 0.0
    return own + sum(sent(child, axis) for child in inner)


def test_modules_sum_to_the_plan(compiled: Compiled, records: dict[str, Any]) -> None:
    plan, modules = compiled.plan, records["modules"]
    assert summed(modules, "compute") == pytest.approx(plan.compute, rel=2e-3)
    assert summed(modules, "peak") == plan.memory.peak
    for number, axis in enumerate(plan.mesh.names):
        assert sent(modules, number) == pytest.approx(plan.bytes_per_axis[axis], rel=2e-3)


def test_repeated_layers_stand_in_one_group_where_they_lie_alike() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    with torch.no_grad():
        asked: Any = {"mode": "propagate", "constraints": {"3.weight": ("tp", None)}}
        compiled = shardc.api.compile(model, "tp=2", (torch.randn(8, 16),), **asked)
    tree = plan_records(compiled.reported(ASKING).snapshots, compiled.plan, ASKING)["modules"]
    assert [child["name"] for child in tree["children"]] == ["0–2", "3"]
    assert [one["name"] for one in tree["children"][0]["group"]] == ["0", "1", "2"]


def test_the_timeline_ends_when_the_plan_does(compiled: Compiled, records: dict[str, Any]) -> None:
    line = records["timeline"]
    ends = [(start + length) * line["tick"] for start, length in zip(line["start"], line["length"], strict=True)]
    assert line["seconds"] == pytest.approx(compiled.plan.predicted)
    assert max(ends) == pytest.approx(line["seconds"], rel=1e-3)
    assert {line["lanes"][lane] for lane in line["lane"]} == {
        "",
        *(one.axis for one in compiled.plan.conversions if one.sent),
    }


def test_what_one_lane_carries_follows_one_after_another(records: dict[str, Any]) -> None:
    line = records["timeline"]
    for lane in range(3):
        free = 0
        for at, start, length in zip(line["lane"], line["start"], line["length"], strict=True):
            if at == lane:
                assert start >= free - 1
                free = start + length


def test_the_curve_of_memory_has_the_peak_of_the_plan(compiled: Compiled, records: dict[str, Any]) -> None:
    memory = records["memory"]
    assert max(map(sum, zip(*memory["held"], strict=True))) == compiled.plan.memory.peak
    assert memory["peak"]["parts"] == compiled.plan.memory.largest
    assert memory["at"] == sorted(memory["at"])


def test_a_long_curve_keeps_its_peaks(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    step = recorded(compiled.reported(ASKING).snapshots["schedule"])
    moments = list(zip(step.starts, step.moments, strict=True))
    monkeypatch.setattr(data, "MOST_MOMENTS", 10)
    shown = fullest(moments)
    assert len(shown) <= 10 < len(moments)
    assert max(one.total for _, one in shown) == compiled.plan.memory.peak


def test_answers_are_those_of_the_plan_and_few_are_searched_for(compiled: Compiled, records: dict[str, Any]) -> None:
    answers = {one["value"]: one for one in records["answers"]}
    assert {"blocks.0.up.weight", "blocks.0.norm1.weight", "input:0"} <= answers.keys()
    compared = [one for one in answers.values() if any(line.startswith("  next best") for line in one["why"])]
    searched = [one for one in compared if one["instead"]]
    assert len(searched) == 2
    for one in compared:
        assert "\n".join(one["why"]) == str(compiled.plan.why(one["value"]))
    costs = [cost for one in answers.values() for cost in one["instead"].values() if cost]
    assert costs and all("step" in cost or "same cost" in cost or "impossible" in cost for cost in costs)
    assert not answers["blocks.0.up.weight"]["instead"] and answers["blocks.0.down.weight"]["instead"], (
        "its alternatives are listed without their cost"
    )


def test_in_large_models_nothing_is_searched_for(compiled: Compiled) -> None:
    made = questions.answers(compiled.plan, compiled.plan.placed, questions.MOST_NODES + 1)
    assert made and not any(cost for one in made for cost in one["instead"].values())


def test_a_plan_that_was_reused_from_other_sizes_is_reported() -> None:
    with torch.no_grad():
        model = shardc.api.shard(nn.Linear(16, 16), mesh="tp=2")
        for batch in (4, 6, 8):
            model(torch.randn(batch, 16))
    compiled = model.compiled
    made = plan_records(compiled.reported(ASKING).snapshots, compiled.plan, ASKING)
    assert made["timeline"]["seconds"] == pytest.approx(compiled.plan.predicted)
    assert any("reused from other sizes" in line for one in made["answers"] for line in one["why"])


def test_pictures_of_graphs_have_no_two_boxes_in_one_place(records: dict[str, Any]) -> None:
    drawn = [graph for graph in records["graphs"] if not graph.get("same")]
    names = [graph["pass"] for graph in records["graphs"]]
    assert "capture" in names and "reshard" in names and "codegen" not in names
    assert {graph["same"] for graph in records["graphs"] if graph.get("same")} <= {graph["pass"] for graph in drawn}
    for graph in drawn:
        places = [tuple(box[2:6]) for box in graph["boxes"]]
        assert len(set(places)) == len(places)
        assert all(level < graph["bands"][band][1] for _, _, band, _, level, _, _ in graph["boxes"])
        assert all(0 <= end < len(places) for end in graph["edges"])


def test_of_layers_that_are_alike_one_is_drawn() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(6)))
    with torch.no_grad():
        compiled = shardc.api.compile(model, "tp=2", (torch.randn(8, 16),), mode="propagate")
    graphs = plan_records(compiled.reported(ASKING).snapshots, compiled.plan, ASKING)["graphs"]
    captured = graphs[0]
    shown = [captured["labels"][box[0]] for box in captured["boxes"]]
    assert shown.count("relu") == 1 and "5 more" in shown
    assert captured["modules"][captured["bands"][-1][0]] == "1–5"


class _Json(HTMLParser):
    """Reads what stands in the page's element for data."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.scripts, self.text = False, 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.within = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self.within = False

    def handle_data(self, data: str) -> None:
        self.text += data if self.within else ""


NAMES = ["</script><script>alert(1)</script>", "<!--<script>", "a\"b'c&amp;", "größe\u2028層\ud800", "${x}$title"]


def test_no_name_ends_the_data() -> None:
    reader = _Json()
    reader.feed(page(NAMES[0], [{"names": NAMES}]))
    read = json.loads(reader.text)
    assert read == {"title": NAMES[0], "plans": [{"names": NAMES}]}
    assert reader.scripts == 3
    assert not set("<>&") & set(in_script(NAMES))


def test_the_page_is_whole_and_asks_nothing_of_the_network(compiled: Compiled, records: dict[str, Any]) -> None:
    text = page("a title", [{"name": "dp=2,tp=2", **records}])
    assert "default-src 'none'" in text
    assert (
        'src="' not in text
        and "<link" not in text
        and "@import" not in text
        and "fetch(" not in text.split("<script>")[2]
    )
    assert "Copyright 2010" in text  # the licence of d3 wants its notice


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("</script>'\"é", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules["</script>'\"é"](x)  # type: ignore[misc]


def test_a_model_with_odd_names_is_reported(tmp_path: Any) -> None:
    with torch.no_grad():
        compiled = shardc.api.compile(Odd(), "tp=2", (torch.randn(4, 8),))
    compiled.to_html(tmp_path / "odd.html", against=compiled)
    reader = _Json()
    reader.feed((tmp_path / "odd.html").read_text(encoding="utf-8"))
    first, second = json.loads(reader.text)["plans"]
    assert "</script>'\"é.weight" in [tensor[1] for tensor in first["tensors"]]
    assert first["asking"] == {"command": "compiled.plan", "shell": False}
    assert second["asking"]["command"] == "against.plan"
