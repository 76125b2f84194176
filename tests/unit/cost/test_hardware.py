"""Hardware files: ours name the source of every number, wrong ones are told in one message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shardc.cost.collectives import ALGORITHMS
from shardc.cost.hardware import hardware
from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.runtime import all_gather, all_reduce, reduce_scatter

FOLDER = Path(__file__).parents[3] / "shardc/cost/hardware"
FILES = sorted(path.stem for path in FOLDER.glob("*.toml"))
GOOD = (FOLDER / "h100.toml").read_text()


@pytest.mark.parametrize("name", FILES)
def test_our_files_load_and_name_the_source_of_every_number(name: str) -> None:
    device = hardware(name)
    assert device.name == name and device.memory > 1e9 and set(device.algorithms) == set(ALGORITHMS)
    assert device.compute_seconds(1e12, 0.0, torch.bfloat16) < device.compute_seconds(2e12, 0.0, torch.bfloat16)
    text = (FOLDER / f"{name}.toml").read_text()
    for line in text.splitlines():
        if re.match(r"(memory|memory_bandwidth|launch|start|latency|bandwidth) *=|\[flops\]", line):
            assert re.search(r"# .*\w", line), f"{name}.toml: a number without unit and source: {line}"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[inside]", "[within]", r"lacks the table \[inside\]"),
        ("memory_bandwidth =", "bandwidth =", "lacks memory_bandwidth"),
        ("latency = 1.9e-6", "latency = 'fast'", "inside.latency is 'fast'; it must be a number"),
        ("bandwidth = 370e9", "bandwidth = -1", "inside.bandwidth is -1; it must be above zero"),
        ("overlap = 0.9 ", "overlap = 9 ", "between.overlap is 9.0; it must be from 0 to 1"),
        ("overlap = 0.9 ", "stall = -1e-6 ", "between.stall is -1e-06"),
        ("devices_per_node = 8", "devices_per_node = 8.5", "devices_per_node is 8.5, not a whole number"),
        ("float32 =", "float31 =", "lacks flops.float32"),
        ('"tree"', '"shrub"', "algorithms.all_reduce is .*'shrub'.*some of ring, tree, star, direct, hierarchical"),
        ("all_reduce = [", "allreduce = [", "no collective is called 'allreduce'; write one of all_gather,"),
        ("[between]", "[inside.measured.gather]\nlatency = 1\nbandwidth = 1\n[between]", "measured names gather"),
        ("[between]", "profile = [[2, 1.0], [1, 1.0]]\n[between]", r"inside\.profile is .* by ascending bytes"),
        ("[between]", "profile = [3]\n[between]", r"inside\.profile is \[3\]"),
        (
            "[between]",
            "[inside.spanning.permute]\nlatency = 1\nbandwidth = 1\n[between]",
            "spanning is not read; move it to",
        ),
        ("[flops]", "[flops", "h100.toml is not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_one_message(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "h100.toml"
    assert before in GOOD
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(ShardcError, match=message) as caught:
        hardware(path)
    assert str(path) in str(caught.value)


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "\n[inside.measured.all_gather]\nlatency = 1e-3\nbandwidth = 1e6\n")
    device, mesh = hardware(str(path)), Mesh.parse("tp=8")
    assert device.name == "mine"
    gather, reduce = (device.collective_seconds(kind, 0.0, mesh, "tp") for kind in (all_gather, reduce_scatter))
    assert gather == pytest.approx(9.6e-6 + 7e-3) and reduce == pytest.approx(9.6e-6 + 7 * 1.9e-6)
    with pytest.raises(ShardcError, match=r"no hardware file .*nowhere\.toml; `shardc calibrate"):
        hardware(tmp_path / "nowhere.toml")


def test_links_along_axes_that_span_nodes_have_figures_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "\n[between.spanning.all_gather]\nlatency = 1e-3\nbandwidth = 1e6\n")
    device, plain = hardware(path), hardware("h100")
    for kind, mesh, axis, same in (
        (all_gather, "pp=2,tp=16", "tp", False),
        (all_reduce, "pp=2,tp=16", "tp", True),
        (all_gather, "pp=2,tp=16", "pp", True),  # one rank a node
        (all_gather, "dp=16,tp=4", "dp", True),  # two, but rings of four devices side by side
        (all_gather, "dp=16,tp=4", "tp", True),  # within a node
    ):
        one, other = (each.collective_seconds(kind, 1e6, Mesh.parse(mesh), axis) for each in (device, plain))
        assert (one == other) == same, (kind, mesh, axis)
