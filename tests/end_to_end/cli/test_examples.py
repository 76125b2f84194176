"""The programs in examples/ run, and the command line does on them what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checks.preloaded import ran
from shardc.cli import main

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"


def run(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run python with `command` in the root; check the exit code."""
    done = ran(*command)
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def cli(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run("-m", "shardc.cli", *arguments, code=code)


@pytest.mark.parametrize("arguments", [["mlp.py"], ["constrain.py"], ["train.py", "--steps", "2"]], ids=lambda a: a[0])
def test_example_runs(arguments: list[str]) -> None:
    assert "plan for mesh dp=2,tp=2" in run(str(EXAMPLES / arguments[0]), *arguments[1:]).stdout


def test_resume_saves_what_it_goes_on_from(tmp_path: Path) -> None:
    resume = [str(EXAMPLES / "resume.py"), "--folder", str(tmp_path), "--steps", "20"]
    assert "step   19  loss" in run(*resume).stdout
    assert (tmp_path / "step-20/manifest.json").exists()


@pytest.mark.distributed
def test_train_under_torchrun_prints_the_losses_of_the_virtual_mesh() -> None:
    train = [str(EXAMPLES / "train.py"), "--steps", "2", "--dropout", "0"]
    virtual = run(*train).stdout
    real = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", *train).stdout

    def losses(text: str) -> list[float]:
        return [float(line.split()[-1]) for line in text.splitlines() if line.startswith("step")]

    assert len(losses(virtual)) == 2
    assert losses(real) == pytest.approx(losses(virtual), abs=2e-5)


def test_plan_prints_the_plan() -> None:
    options = ("--mesh", "tp=4", "--hardware", "h100", "--constraint", "up.weight=tp,-")
    out = cli("plan", "examples/mlp.py", *options).stdout
    assert "plan for mesh tp=4 on h100" in out
    assert re.search(r"up\.weight +f32\[1024@tp, 256\]", out)


def test_compile_prints_the_graph_after_a_pass_and_writes_the_code(tmp_path: Path) -> None:
    file = tmp_path / "out.py"
    out = cli("compile", "examples/mlp.py", "--mesh", "tp=2", "--print-after", "capture", "-o", str(file)).stdout
    assert "addmm(" in out
    assert "def forward(" in file.read_text()
    assert "shardc.runtime" in file.read_text()


def test_run_compares_with_one_device() -> None:
    out = cli("run", "examples/mlp.py", "--mesh", "dp=2,tp=2").stdout
    assert "output 0: float32" in out
    assert "4 gradients: largest difference" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nowhere.py", "--mesh", "tp=2"], "nowhere.py is no file"),
        (["plan", "examples/text.py", "--mesh", "tp=2"], "lacks model() and inputs()"),
        (["plan", "examples/mlp.py", "--mesh", "tp=two"], "cannot read 'tp=two'"),
        (["plan", "examples/mlp.py", "--mesh", "tp=2", "--constraint", "up.weight"], "write PATTERN=SPEC"),
        (["plan", "examples/mlp.py", "--mesh", "tp=2", "--constraint", "upp.weight=tp,-"], "nearest: up.weight"),
        (["compile", "examples/mlp.py", "--mesh", "tp=2", "--print-after", "no"], "Expected one of"),
        (["run", "examples/llama.py", "--mesh", "tp=2"], "on the meta device"),
    ],
)
def test_what_the_user_can_mend_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_error_ends_the_process_with_code_2_and_no_traceback() -> None:
    done = cli("plan", "nowhere.py", "--mesh", "tp=2", code=2)
    assert done.stderr == "shardc: nowhere.py is no file; name a Python file with model() and inputs()\n"
