"""The reader of cases: what it reads is what was printed, and what it cannot read it refuses by file and line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checks.parsed import read
from checks.shown import before, shown
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.options import Options
from shardc.passes.codegen import source_of
from shardc.passes.pipeline import NAMES, PIPELINE, run
from shardc.planning.compilation import Compilation


class Model(nn.Module):
    """What is hard to read back: views, attention, several results, draws, buffers, a lookup, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.norm = nn.Embedding(1000, 64), nn.Dropout(0.1), nn.BatchNorm1d(64)
        self.qkv, self.out, self.conv = nn.Linear(64, 192), nn.Linear(64, 1000), nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.table(tokens))
        q, k, v = (one.view(*one.shape[:2], 4, 16).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.norm(self.conv((x + y).transpose(1, 2))).transpose(1, 2)
        return nn.functional.cross_entropy(self.out(y).flatten(0, 1), tokens.flatten())


ASKED = {
    "vocabulary split": ({"table.weight": "tp,-", "out.weight": "tp,-"}, "unbounded"),
    "memory bounded": ({"qkv.weight": "tp,-"}, "60MB"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_a_pass_makes_of_text_is_what_it_makes_of_the_program(asked: str, tmp_path: Path) -> None:
    """All passes on a model; then each alone, on what the one before it left, as text."""
    constraints, memory = ASKED[asked]
    options = Options(hardware="cpu", constraints=constraints, memory=memory)
    call = ModelCall.of(Model(), (torch.zeros(16, 128, dtype=torch.long),))
    snapshots: dict[str, Compilation] = {}
    run(PIPELINE, Compilation(call, Mesh.parse("dp=2,tp=2"), options), snapshots)
    directives = ["mesh dp=2,tp=2", *(f"constraint {path}={spec}" for path, spec in constraints.items())]
    directives += [f"memory {memory}"]
    for name in NAMES[1:]:
        head = "\n".join(["# The model.", *directives])
        path = written(tmp_path, name, f"{head}\n\nbefore\n{before(snapshots, name)}")
        made = read(path).run().partition("\nafter\n")[2]
        c = snapshots[name]
        if name == "codegen":
            assert alike(without_overloads(made)) == alike(without_overloads(code_of(c)))
        else:
            assert without_overloads(made) == without_overloads(shown(c, name)), name


def code_of(c: Compilation) -> str:
    """The code, without what it tells of a plan, which a text does not have."""
    return source_of(c.lowered.read(), c.program, c.mesh)


def alike(code: str) -> tuple[str, list[str]]:
    """Code but for the names of values, some of which a text gives others: its statements, and its comments."""
    tree = ast.parse(code)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        bound = [one for one in ast.walk(function) if isinstance(one, ast.arg | ast.Name)]
        bound.sort(key=lambda one: (one.lineno, one.col_offset))
        written = [one for one in bound if isinstance(one, ast.arg) or not isinstance(one.ctx, ast.Load)]
        assigned = {one.arg if isinstance(one, ast.arg) else one.id for one in written}
        numbers: dict[str, str] = {}
        for one in bound:
            name = one.arg if isinstance(one, ast.arg) else one.id
            if name in assigned:
                new = numbers.setdefault(name, f"v{len(numbers)}")
                setattr(one, "arg" if isinstance(one, ast.arg) else "id", new)
        for one in ast.walk(function):
            if isinstance(one, ast.Delete):  # many names stand in parentheses
                targets = [name for target in one.targets for name in getattr(target, "elts", [target])]
                one.targets = sorted(targets, key=ast.unparse)
    return ast.unparse(tree), [text.strip() for text in re.findall(r"# (?!fmt).*$", code, re.M)]


def without_overloads(text: str) -> str:
    """`div.Scalar` and `div.Tensor` print alike, so that code that was read back may call the other."""
    return re.sub(r"(aten\.\w+)\.(Scalar|Tensor)\(", r"\1(", text).strip()


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name / "case.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


WRONG = {
    "type": ("normalize", "%x = input  f32[4, 8]\n%y = relu(%x)  f32[4, 9]\nreturn [%y]", r"5: .*makes f32\[4, 8\]"),
    "name": ("normalize", "%x = input  f32[4, 8]\n%y = rule(%x)  f32[4, 8]\nreturn [%y]", "5: neither torch nor"),
    "value": ("normalize", "%x = input  f32[4, 8]\n%y = relu(%z)  f32[4, 8]\nreturn [%y]", "5: %z is not assigned"),
    "arguments": ("normalize", "%x = input  f32[4, 8]\n%y = relu(%x, 1)  f32[4, 8]\nreturn [%y]", "5: no overload"),
    "return": ("normalize", "%x = input  f32[4, 8]", "4: the graph ends without"),
    "dtype": ("normalize", "%x = input  float[4, 8]\nreturn [%x]", "4: unknown dtype"),
    "chosen": ("reshard", "%x = input  f32[4, 8]\n%y = relu(%x)  f32[4, 8] +sum@dp\nreturn [%y]", "5: no strategy"),
    "line": ("reshard", "%x = input  f32[4, 8]\nreturn [%x]\nkeep %x", "6: write `shared"),
    "layouts": (
        "localize", "%x = input  f32[4@dp, 8]\n%y = relu(%x)  f32[4, 8@dp]\nreturn [%y]", "5: no strategy of relu",
    ),
    "variant": (
        "localize", "%x = input  f32[4, 8@dp]\n%y = _softmax(%x, 1, False)  f32[4, 8@dp]\nreturn [%y]",
        "5: more than one strategy .* by all_reduce",
    ),
    "local size": (
        "schedule", "%x = input  f32[4@dp, 8]\n%y = view(%x, [4, 2, 4])  f32[4@dp, 2, 4]\nreturn [%y]", "5: .*view",
    ),
    "collective": (
        "schedule", "%x = input  f32[4@dp, 8]\n%y = all_gather(%x, dim=0, axis=dp)  f32[4@dp, 8]\nreturn [%y]",
        r"5: all_gather makes \[4, 8\] a rank",
    ),
    "order": ("overlap", "%x = input  f32[4@dp, 8]\nreturn [%x]\norder\n  %x, wait %y", "7: wait %y: the graph has no"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused_by_file_and_line(case: str, tmp_path: Path) -> None:
    name, text, message = WRONG[case]
    path = written(tmp_path, name, f"# Wrong.\nmesh dp=2\nbefore\n{text}\n")
    with pytest.raises(AssertionError, match=f"{name}/case.txt:{message}"):
        read(path).run()


def test_unknown_directives_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "normalize", "# Wrong.\nmash dp=2\nbefore\n%x = input  f32[4]\nreturn [%x]\n")
    with pytest.raises(AssertionError, match=r"normalize/case.txt:2: known are mesh"):
        read(path).run()
