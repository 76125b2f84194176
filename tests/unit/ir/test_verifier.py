"""The verifier on captured programs, on what runs the passes, and on its own documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import shardc
from checks.verifying import CASES, Left, assert_breaks, left, message_of, snapshots
from samples.textbook import MLP
from shardc.ir import verifier
from shardc.ir.facts import FACTS, NOWHERE, Lowered, captured, describe
from shardc.ir.invariants import captured as at_capture
from shardc.ir.invariants import shapes, structure
from shardc.ir.invariants.invariant import Checked
from shardc.ir.program import Port, Role, value_of
from shardc.ir.verifier import STAGE_AFTER, STAGES, VerificationError
from shardc.passes import localize
from shardc.passes.pipeline import NAMES

aten = torch.ops.aten
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("case", CASES)
def test_what_every_pass_leaves_of_small_programs_is_right(case: str) -> None:
    assert tuple(snapshots(case)) == NAMES
    for name in NAMES:
        left(case, name).verify()


def test_every_pass_leaves_a_program_at_a_stage() -> None:
    assert tuple(STAGE_AFTER) == NAMES
    assert set(STAGE_AFTER.values()) == set(STAGES)


def _two_names(of: Left) -> None:
    of.node("relu").name = "mm"


def _other_facts(of: Left) -> None:
    fact = value_of(of.node("relu"))
    changed(of.node("relu"), value=fact.to(torch.float64))


def _other_operand(of: Left) -> None:
    of.node("relu").args = (of.node("tangent_0"),)


def _port_less(of: Left) -> None:
    del of.program.outputs[0]


@pytest.mark.parametrize("harm", [_two_names, _other_facts, _other_operand, _port_less])
def test_what_was_right_and_changes_in_place_is_checked_again(harm: Callable[[Left], None]) -> None:
    broken, known = left("mlp", "normalize"), verifier.Known()
    broken.program = replace(broken.program, outputs=[*broken.program.outputs])
    for name in ("normalize", "factor"):
        verifier.verify(name, "captured", broken.graph, broken.program, broken.mesh, known=known)
    harm(broken)
    with pytest.raises(VerificationError):
        verifier.verify("retile", "captured", broken.graph, broken.program, broken.mesh, known=known)


def test_what_is_as_it_was_is_asked_once() -> None:
    case, known = left("mlp", "codegen"), verifier.Known()
    checked = Checked(case.graph, case.program, case.mesh, case.source)
    for one in known.open("overlapped", checked):
        known.add(one)
    assert [one.name for one in known.open("generated", checked)] == ["names_are_read_while_they_live"]
    known.add(known.open("generated", checked)[0])
    assert not known.open("generated", checked)
    other = Checked(case.graph, case.program, case.mesh, case.source + "\n")
    assert [one.name for one in known.open("generated", other)] == ["names_are_read_while_they_live"]


@pytest.fixture
def mlp() -> Left:
    return left("mlp", "normalize")


def changed(node: fx.Node, **changes: Any) -> None:
    describe(node, replace(captured(node), **changes))


def test_two_nodes_of_one_name(mlp: Left) -> None:
    node = mlp.node("relu")
    node.name = "mm"
    with pytest.raises(VerificationError, match=r"names_are_unique[^^]*\^ %mm: there is another node"):
        mlp.verify()


def test_an_operand_that_is_made_too_late(mlp: Left) -> None:
    mlp.node("relu").append(mlp.node("mm"))
    assert_breaks(mlp, structure.operands_come_first, mlp.node("constrain"), "reads %mm, which is not made before it")


def test_an_input_among_the_calls(mlp: Left) -> None:
    call = mlp.node("permute")
    call.append(mlp.node("tangent_0"))
    assert_breaks(mlp, at_capture.inputs_come_first, call, "stands before a placeholder")


def test_a_module_that_is_called(mlp: Left) -> None:
    mlp.node("relu").op = "call_module"
    assert_breaks(mlp, structure.nodes_are_inputs_calls_and_an_output, mlp.node("relu"), "'call_module'")


def test_a_missing_port_of_an_input(mlp: Left) -> None:
    mlp.program = replace(mlp.program, inputs=mlp.program.inputs[:-1])
    assert_breaks(mlp, structure.inputs_have_ports, mlp.node("up_weight"), "3 ports for 4 nodes")


def test_a_missing_port_of_an_output(mlp: Left) -> None:
    mlp.program = replace(mlp.program, outputs=mlp.program.outputs[1:])
    assert_breaks(mlp, structure.outputs_have_ports, mlp.graph.output_node(), "2 ports for 3 nodes")


def test_a_port_of_an_output_among_the_inputs(mlp: Left) -> None:
    mlp.program = replace(mlp.program, inputs=[*mlp.program.inputs[:-1], Port(Role.OUTPUT, "", 0)])
    assert_breaks(mlp, structure.inputs_have_ports, mlp.node("up_weight"), "a output stands among the ports here")


def test_two_equal_ports(mlp: Left) -> None:
    inputs = mlp.program.inputs
    mlp.program = replace(mlp.program, inputs=[inputs[0], inputs[0], *inputs[2:]])
    assert_breaks(mlp, structure.inputs_have_ports, mlp.node("up_weight"), "two ports are the parameter up.weight")


def test_an_output_that_is_none(mlp: Left) -> None:
    output = mlp.graph.output_node()
    output.args = ((None, *output.args[0][1:]),)  # type: ignore[index]
    assert_breaks(mlp, structure.outputs_have_ports, output, "the output 0 is None")


def test_a_node_without_facts(mlp: Left) -> None:
    del mlp.node("relu").meta[FACTS]
    assert_breaks(mlp, at_capture.facts_are_captured, mlp.node("relu"), "has no facts")


def test_facts_of_another_stage(mlp: Left) -> None:
    describe(mlp.node("relu"), Lowered(NOWHERE))
    assert_breaks(mlp, at_capture.facts_are_captured, mlp.node("relu"), "facts of another stage, Lowered")


def test_a_value_of_another_shape(mlp: Left) -> None:
    changed(mlp.node("relu"), value=torch.empty(32, 32, device="meta"))
    assert_breaks(
        mlp, at_capture.values_are_inferred, mlp.node("relu"), "float32[32, 32], its operands make float32[32, 64]"
    )


def test_a_value_of_another_dtype(mlp: Left) -> None:
    changed(mlp.node("relu"), value=torch.empty(32, 64, device="meta", dtype=torch.float64))
    assert_breaks(mlp, at_capture.values_are_inferred, mlp.node("relu"), "float64[32, 64], its operands make float32")


def test_a_call_that_cannot_run(mlp: Left) -> None:
    product = mlp.node("mm")
    product.args = (product.args[0], mlp.node("up_weight"))
    assert_breaks(mlp, at_capture.values_are_inferred, product, "cannot run on its operands")


def test_a_result_taken_out_in_place_of_another() -> None:
    heads = left("heads", "capture")
    mean = heads.node("getitem_1")
    mean.args = (mean.args[0], 0)
    assert_breaks(heads, at_capture.values_are_inferred, mean, "its operands make float32[4, 8, 16]")


def test_forward_that_reads_backward(mlp: Left) -> None:
    node = mlp.node("relu")
    changed(node, origin=replace(captured(node).origin, phase="backward"))
    reader = mlp.node("mm_1")
    assert_breaks(
        mlp, at_capture.forward_reads_nothing_of_backward, reader, "is of forward, and reads %relu of backward"
    )


def test_an_output_that_needs_a_tangent(mlp: Left) -> None:
    output = mlp.graph.output_node()
    results: Any = output.args[0]
    output.args = ((results[1], *results[1:]),)
    assert_breaks(
        mlp, structure.forward_needs_no_tangents, mlp.first(aten.expand.default), "reads the tangent %tangent_0"
    )


def test_a_tangent_of_no_output(mlp: Left) -> None:
    mlp.program = replace(mlp.program, inputs=[*mlp.program.inputs[:-1], Port(Role.TANGENT, "", 5)])
    assert_breaks(mlp, at_capture.tangents_pair_with_outputs, mlp.node("tangent_0"), "the tangent of output 5")


def test_gradients_in_each_others_place(mlp: Left) -> None:
    output = mlp.graph.output_node()
    results: Any = output.args[0]
    output.args = ((results[0], results[2], results[1]),)
    said = "is float32[16, 64], its parameter or input %up_weight is float32[64, 16]"
    assert_breaks(mlp, at_capture.gradients_pair_with_inputs, results[2], said)


def test_a_gradient_of_nothing(mlp: Left) -> None:
    outputs = [*mlp.program.outputs[:-1], Port(Role.GRADIENT, "sideways.weight")]
    mlp.program = replace(mlp.program, outputs=outputs)
    gradient: Any = mlp.graph.output_node().args[0][-1]  # type: ignore[index]
    assert_breaks(mlp, at_capture.gradients_pair_with_inputs, gradient, "the gradient of 'sideways.weight'")


def test_a_gradient_of_an_output_that_it_does_not_name(mlp: Left) -> None:
    port = next(port for port in mlp.program.outputs if port.role is Role.GRADIENT)
    mlp.program = replace(mlp.program, depends_on={port: (1,)})
    node = dict(zip(mlp.program.outputs, mlp.graph.output_node().args[0], strict=True))[port]  # type: ignore[arg-type]
    said = "depends on the outputs (1,), and reads tangents of (0,)"
    assert_breaks(mlp, at_capture.gradients_read_the_tangents_that_they_name, node, said)


def test_a_mutation_of_what_the_model_does_not_have() -> None:
    normed = left("normed", "normalize")
    outputs = list(normed.program.outputs)
    place = next(index for index, port in enumerate(outputs) if port.role is Role.MUTATION)
    outputs[place] = Port(Role.MUTATION, "norm.scale")
    normed.program = replace(normed.program, outputs=outputs)
    node: Any = normed.graph.output_node().args[0][place]  # type: ignore[index]
    said = "'norm.scale', which is neither of the model nor an input"
    assert_breaks(normed, at_capture.mutations_pair_with_what_they_change, node, said)


def test_several_values_where_there_is_one(mlp: Left) -> None:
    changed(mlp.node("mm"), value=(captured(mlp.node("mm")).value,))
    assert_breaks(mlp, at_capture.values_are_inferred, mlp.node("mm"), "its operands make")


def test_what_cannot_be_checked_is_an_error_too() -> None:
    heads = left("heads", "capture")
    heads.node("getitem_1").args = (heads.node("native_layer_norm"), 7)
    assert message_of(heads, at_capture.values_are_inferred)[0].startswith("it could not be checked: IndexError")


def test_a_fault_inside_a_pass_is_told_right_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled() -> shardc.Compiled:
        asked: Any = {"mode": "propagate", "constraints": {"up": ("dp", None)}}
        return shardc.compile(MLP(16, 64), "dp=2", (torch.randn(32, 16),), **asked)

    monkeypatch.setenv(verifier.VARIABLE, "1")
    compiled()
    monkeypatch.setattr(localize, "_SIZED", set[Any]())  # sizes stay global
    with pytest.raises(VerificationError, match="the pass 'localize' broke the invariant 'sizes_are_local'") as caught:
        compiled()
    assert not isinstance(caught.value, shardc.ShardcError)
    assert "bug of shardc and not of your program" in str(caught.value)
    assert re.search(r"%expand = expand\(%tangent_0, \[32, 16\]\).*\n    \^ %expand: names sizes", str(caught.value))
    monkeypatch.delenv(verifier.VARIABLE)
    compiled()  # nobody looks


def test_the_message_shows_the_whole_of_a_short_program() -> None:
    short = left("mlp", "localize")
    expand = short.first(aten.expand.default)
    expand.args = (expand.args[0], [32, 16])
    lines = message_of(short, shapes.sizes_are_local)
    assert [line.split(" = ")[0].strip() for line in lines] == [
        "%pow_1", "%all_gather", "%sum_1", "%div", "%expand",
        "^ %expand: names sizes [32, 16], a part is [16, 16]",
        "%div_1", "%pow_2", "%mul", "%mul_1",
    ]  # fmt: skip


def listed(page: str) -> dict[str, dict[str, str]]:
    """Per section of the page the invariants that it lists, with their sentences."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        items = re.findall(r"^- `(\w+)`: (.*?)(?=^- |^$|\Z)", text, re.MULTILINE | re.DOTALL)
        if items:
            found[title] = {name: " ".join(sentence.split()) for name, sentence in items}
    return found


def test_the_page_lists_every_invariant_in_its_own_words() -> None:
    page = listed((ROOT / "docs/design/verifier.md").read_text())
    written = {name: sentence for items in page.values() for name, sentence in items.items()}
    invariants = {one.name: one.sentence for stage in STAGES.values() for one in stage}
    assert written == invariants
    assert sum(map(len, page.values())) == len(invariants), "each is listed once"
    for title, items in page.items():  # the first stage at which they hold is what the section is called after
        stages = [stage for stage, held in STAGES.items() if items.keys() <= {one.name for one in held}]
        assert stages and stages[0] in title.lower(), title
