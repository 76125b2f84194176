"""The reader of cases: what it reads is what was printed, and what it cannot read it refuses by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checks.parsed import read
from checks.shown import before, shown
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.options import Options
from shardc.passes.pipeline import NAMES, PIPELINE, run
from shardc.planning.compilation import Compilation

HEAD = "# A program.\nmesh dp=2,tp=2\nconstraint up.weight=tp,-\n"


class Model(nn.Module):
    """Views, a softmax, several results, a mean, and a gradient for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(256, 64, bias=False), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(self.norm(x)).view(-1, 8, 32).softmax(-1)
        return self.down(heads.flatten(1)).square().mean()


@pytest.mark.parametrize("memory", [None, "4MB"])
def test_what_a_pass_makes_of_text_is_what_it_makes_of_the_program(memory: str | None, tmp_path: Path) -> None:
    """All passes on a model; then each alone, on what the one before it left, as text."""
    options = Options(hardware="cpu", constraints={"up.weight": "tp,-"}, memory=memory)
    call = ModelCall.of(Model(), (torch.zeros(4096, 64),))
    snapshots: dict[str, Compilation] = {}
    run(PIPELINE, Compilation(call, Mesh.parse("dp=2,tp=2"), options), snapshots)
    directives = HEAD + (f"memory {memory}\n" if memory else "")
    for name in NAMES[1:]:
        path = written(tmp_path, name, f"{directives}\nbefore\n{before(snapshots, name)}")
        made = read(path).run().partition("\nafter\n")[2]
        # `div.Scalar` and `div.Tensor` print alike; a case means the second
        expected = shown(snapshots[name], name).replace(".Scalar(", ".Tensor(")
        assert made.strip() == expected.strip(), name


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
