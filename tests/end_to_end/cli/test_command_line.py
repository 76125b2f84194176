"""The command line is derived from the options: each is a flag, is read, and is written back."""

from __future__ import annotations

import inspect
import io
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from checks.preloaded import ran
from shardc import ShardcError
from shardc.api import compile, shard
from shardc.cli import Command, main
from shardc.flags import REGISTRY, parsed, spelled
from shardc.options import Options, SearchOptions, ShardOptions, Text, as_keywords
from shardc.passes.pipeline import NAMES
from shardc.search.search import search_mesh

ROOT = Path(__file__).parents[3]
RENAMED = {"constraints": "--constraint"}
"""Fields whose flag is given once an entry, and is named for one."""


def read(*arguments: str) -> Any:
    return parsed(Command, arguments, "")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line tells of arguments that it refuses."""
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("shardc: ") and "Traceback" not in told.err
    assert not re.search(r"[╭│╰─\x1b]", told.err)
    return " ".join(told.err.split())


def helped(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert not exit.value.code
    return capsys.readouterr().out


def flags(help: str) -> set[str]:
    """The flags that a help text lists: those that a line begins with."""
    return set(re.findall(r"^[│ ] (?:-\w [A-Z.]+, )?(--[a-z][a-z-]*)", help, re.MULTILINE))


def flag(name: str) -> str:
    return RENAMED.get(name, "--" + name.replace("_", "-"))


@pytest.mark.parametrize(
    ("command", "options", "more"),
    [
        ("plan", SearchOptions, {"--mesh", "--devices", "--seq", "--json", "--output"}),
        ("explain", Options, {"--mesh", "--why", "--layout", "--json"}),
        ("report", Options, {"--mesh", "--output", "--against"}),
        ("compile", Options, {"--mesh", "--print-after", "--output"}),
        ("run", Options, {"--mesh", "--json"}),
        ("trace", Options, {"--mesh", "--output"}),
        ("profile", Options, {"--mesh", "--output", "--steps"}),
    ],
)
def test_the_flags_are_the_options(
    command: str, options: type[Options], more: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    help = helped(capsys, command)
    assert flags(help) == {flag(one.name) for one in fields(options)} | more
    assert "The optimizer whose state counts" in help  # the docstring of a field
    assert "FILE" in help and "model() and inputs()" in help


@pytest.mark.parametrize(
    ("function", "options"), [(compile, Options), (shard, ShardOptions), (search_mesh, SearchOptions)]
)
def test_the_keywords_are_the_options(function: Any, options: type[Options]) -> None:
    assert {one.name for one in fields(options)} <= inspect.signature(function).parameters.keys()


def pair(text: str) -> tuple[str, int]:
    name, _, number = text.partition(":")
    return name, int(number)


WEIGHTS = Text("NAME:N", "a:1", pair, lambda entry: f"{entry[0]}:{entry[1]}", flag="weight")


@dataclass(frozen=True, kw_only=True)
class MoreOptions(Options):
    """Options with fields of every kind."""

    depth: int = 3
    """How deep to look."""

    loud: bool = False
    """Whether to tell more."""

    weights: Annotated[Mapping[str, int] | None, Text("NAME:N", "a:1", pair, lambda e: f"{e[0]}:{e[1]}", "weight")] = (
        None
    )
    """What counts how much."""


def more(*arguments: str) -> MoreOptions:
    return tyro.cli(MoreOptions, args=arguments, registry=REGISTRY, config=(tyro.conf.FlagConversionOff,))


def test_a_new_field_is_a_flag_and_a_keyword_without_another_edit(capsys: pytest.CaptureFixture[str]) -> None:
    asked = more("--depth", "5", "--loud", "True", "--weight", "a:1", "--weight", "b:2", "--memory", "80GB")
    assert asked == MoreOptions(depth=5, loud=True, weights={"a": 1, "b": 2}, memory="80GB")
    words = spelled(asked, MoreOptions)
    assert words == ["--memory=80GB", "--depth=5", "--loud=True", "--weight=a:1", "--weight=b:2"]
    assert more(*words) == asked
    assert spelled(asked, Options) == ["--memory=80GB"]
    with pytest.raises(SystemExit):
        more("--help")
    help = capsys.readouterr().out
    assert "How deep to look. (default: 3)" in help and "What counts how much. (like a:1; repeatable)" in help

    def told(what: str, options: MoreOptions) -> tuple[str, int]:
        return what, options.depth

    assert as_keywords("asked", told, MoreOptions)("it", depth=7) == ("it", 7)


def test_a_first_step_loads_nothing_that_it_can_do_without() -> None:
    """What draws, solves and explains takes longer to import than a plan takes to be read from the cache."""
    program = """
import sys, torch, shardc.api
heavy = {"tyro", "docstring_parser", "rich", "scipy", "z3", "numba", "transformers"}
tower = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
shardc.api.shard(tower, mesh="dp=2,tp=2")(torch.randn(4, 8)).sum().backward()
print(*sorted(heavy & set(sys.modules)))
import shardc.search.search
print(*sorted({"tyro", "docstring_parser"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "\n\n"


def test_every_flag_is_read_and_written_back() -> None:
    words = [
        "--mode=propagate",
        "--constraint=up.weight=tp,-",
        "--constraint=layers.*=(dp,tp),?",
        "--hardware=h100",
        "--outputs=sharded",
        "--on-unknown=error",
        "--dynamic=input_ids=0:batch,1:seq",
        "--dynamic=mask=0:batch",
        "--memory=80GB",
        "--optimizer=8.0",
        "--axes=a,b,c",
        "--time-limit=5.0",
    ]
    options = read("plan", "x.py", "--devices", "8", *words).options
    assert options == SearchOptions(
        mode="propagate",
        constraints={"up.weight": "tp,-", "layers.*": "(dp,tp),?"},
        hardware="h100",
        outputs="sharded",
        on_unknown="error",
        dynamic={"input_ids": {0: "batch", 1: "seq"}, "mask": {0: "batch"}},
        memory="80GB",
        optimizer=8.0,
        axes=("a", "b", "c"),
        time_limit=5.0,
    )
    assert spelled(options, SearchOptions) == words
    apart = [word for given in words for word in given.split("=", 1)]
    assert read("plan", "x.py", "--devices", "8", *apart).options == options
    assert spelled(SearchOptions(), SearchOptions) == []
    assert read("run", "x.py", "--mesh", "tp=2", "--optimizer", "adamw").options.optimizer == "adamw"


@pytest.mark.parametrize("layout", ["-,tp", "-", "-,-", "?,-", "f32[256@tp, 64]"])
def test_a_layout_may_begin_with_a_dash(layout: str) -> None:
    asked = ("explain", "x.py", "--mesh", "tp=2", "--why", "up.weight")
    assert read(*asked, "--layout", layout).layout == read(*asked, f"--layout={layout}").layout == layout


def test_output_has_a_short_flag() -> None:
    assert read("compile", "x.py", "--mesh", "tp=2", "-o", "y.py").output == Path("y.py")
    assert read("compile", "--mesh=tp=2", "x.py", "--output", "y.py").output == Path("y.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Expected one of {plan, explain, report, compile, run, diff, trace, profile, calibrate}"),
        ("plann x.py", "Available subcommands: plan, explain, report, compile, run, diff, trace, profile, calibrate"),
        ("plan --mesh tp=2", "Missing from shardc plan: FILE"),
        ("run x.py", "--mesh"),
        ("plan x.py", "--mesh, --devices"),
        ("plan x.py --mesh tp=2 --devices 2", "--mesh and --devices are not allowed together"),
        ("plan x.py --mesh tp=2 --axes a,b --time-limit 3", "--axes=a,b --time-limit=3.0 is for a search"),
        ("plan x.py --devices two", "'two'"),
        ("plan x.py --mesh tp=2 y.py", "Unrecognized options: y.py"),
        ("plan x.py --mesh tp=2 --memry 80GB", "Perhaps you meant: --memory BYTES|unbounded For full"),
        ("plan x.py --mesh tp=2 --memory", "Missing value for argument '--memory'"),
        ("plan x.py --mesh tp=2 --memory lots", "memory='lots' is not an amount of memory; write '80GB'"),
        ("plan x.py --mesh tp=2 --optimizer adm", "optimizer='adm' is not known; it is one of sgd"),
        ("plan x.py --mesh tp=2 --hardware h10", "no hardware called 'h10'; write one of"),
        ("plan x.py --mesh tp=2 --mode aut", "'aut' for argument '--mode'. Expected one of ('auto', 'propagate')"),
        ("plan x.py --mesh tp=2 --outputs no", "Expected one of ('auto', 'full', 'sharded')"),
        ("plan x.py --mesh tp=2 --on-unknown no", "Expected one of ('replicate', 'error')"),
        ("plan x.py --mesh tp=2 --constraint =tp", "--constraint =tp: write PATTERN=SPEC"),
        ("plan x.py --mesh tp=2 --constraint a=tp --constraint a=-", "--constraint names 'a' twice"),
        ("plan x.py --mesh tp=2 --dynamic x", "--dynamic x: write ARGUMENT=DIM:NAME,..., like 'input_ids=0:batch"),
        ("plan x.py --mesh tp=2 --dynamic x=0:a,0:b", "--dynamic x=0:a,0:b: write ARGUMENT=DIM:NAME"),
        ("plan x.py --mesh tp=2 --dynamic 'x=0:a b'", "--dynamic x=0:a b: write ARGUMENT=DIM:NAME"),
        ("plan examples/mlp.py --devices 2 --dynamic x=0:batch", "dynamic= has no meaning for a search"),
        ("plan examples/mlp.py --devices 2 --batch 8:4", "batch='8:4' is no batch"),
        ("compile x.py --mesh tp=2 --print-after no", "Expected one of " + str(NAMES)),
        (
            "compile examples/mlp.py --mesh tp=2 -o nowhere/at/all.py",
            "cannot write nowhere/at/all.py: there is no folder",
        ),
        ("report examples/mlp.py --mesh tp=2 -o nowhere/at/all.html", "there is no folder"),
        ("report examples/mlp.py --mesh tp=2 --against tp", "cannot read 'tp' in mesh 'tp'"),
        ("explain x.py --mesh tp=2 --layout tp", "name the value with --why"),
        ("calibrate mine.yaml", "mine.yaml: a hardware file is called *.toml"),
        ("calibrate nowhere/mine.toml", "there is no folder"),
        ("calibrate mine.toml --processes many", "'many'"),
    ],
)
def test_what_cannot_be_read_is_one_message(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert message in said(capsys, *shlex.split(arguments))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])  # the frame that is taken off differs
def test_a_message_is_the_same_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in said.items():
        monkeypatch.setattr(sys, name, stream)
    code = main(shlex.split("plan x.py --mesh tp=2 --memry 80GB"))
    told = {}
    for name, stream in said.items():
        stream.seek(0)
        told[name] = stream.read()
    assert code == 2 and told["stdout"] == ""
    assert told["stderr"] == (
        "shardc: Unrecognized options: --memry, 80GB\nPerhaps you meant:\n    --memory BYTES|unbounded\n"
        "For full helptext, run shardc --help\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_the_kind", "mine.py:1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("def model(:", "mine.py:1: SyntaxError: invalid syntax"),
        ("def model():\n    return 1 / 0\ndef inputs():\n    return ()", "mine.py:2: ZeroDivisionError"),
        ("model = inputs = 3", "mine.py lacks model() and inputs(); model() gives the nn.Module"),
        ("def inputs():\n    return ()", "mine.py lacks model(); model() gives the nn.Module"),
        ("def model():\n    return 3\ndef inputs():\n    return ()", "model() gives a int, not an nn.Module"),
        (
            "from torch.nn import Linear\ndef model():\n    return Linear(2, 2)\ndef inputs():\n    return 3",
            "inputs() gives a int, not a tuple or dict",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_message(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(text)
    assert message in said(capsys, "plan", str(tmp_path / "mine.py"), "--mesh", "tp=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan mine.txt --mesh tp=2", "mine.txt is no Python file"),
        ("diff no.json no.json", "no.json"),
        ("diff mine.txt mine.txt", "mine.txt"),
        ("plan examples/mlp.py --devices 2 -o plan.json", "-o writes the plan for one mesh; name it with --mesh"),
        ("plan examples/mlp.py --mesh tp=2 -o no/plan.json", "cannot write no/plan.json: there is no folder"),
        ("plan examples/mlp.py --mesh tp=2 --plan no.json", "no.json"),
        ("trace examples/mlp.py --mesh tp=2 -o no/trace.json", "cannot write no/trace.json: there is no folder"),
        ("profile examples/mlp.py --mesh tp=2 --steps 0 -o trace.json", "--steps=0 measures nothing"),
        ("profile examples/mlp.py --mesh tp=2 -o no/trace.json", "cannot write no/trace.json: there is no folder"),
        ("report examples/mlp.py --mesh tp=2 -o .", "cannot write .: it is a folder; name a file"),
        ("explain examples/mlp.py --mesh tp=2 --why upp.weight", "nearest: up.weight"),
        ("explain examples/mlp.py --mesh tp=2 --why up.weight --layout xp,-", "xp"),
        ("calibrate mine.toml --processes 0", "--processes=0"),
    ],
)
def test_what_cannot_be_done_is_one_message(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("not JSON")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert message in said(capsys, *shlex.split(arguments))


def test_reading_refuses_with_an_error_of_ours() -> None:
    with pytest.raises(ShardcError, match="Unrecognized options: --no"):
        read("run", "x.py", "--mesh", "tp=2", "--no")


def test_a_report_names_the_commands_that_tell_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = tmp_path / "report.html"
    asked = ["report", "examples/mlp.py", "--mesh", "tp=2", "--hardware", "h100", "-o", str(page)]
    assert main([*asked, "--against", "dp=2"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {page} (")
    text = page.read_text(encoding="utf-8")
    for mesh in ("tp=2", "dp=2"):
        assert f'"command":"shardc explain examples/mlp.py --mesh={mesh} --hardware=h100","shell":true' in text


def test_dynamic_sizes_are_planned_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = ["plan", "examples/mlp.py", "--mesh", "tp=2"]
    assert main([*asked, "--dynamic", "x=0:batch", "--dynamic", "target=0:batch"]) == 0
    assert "plan for mesh tp=2" in capsys.readouterr().out
    assert main([*asked, "--dynamic", "y=0:batch"]) == 2
    assert "y" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--tyro-print-completion", shell])
    assert not exit.value.code
    script = capsys.readouterr().out
    assert all(word in script for word in ("shardc", "explain", "print-after", "reshard", "on-unknown"))


def test_a_plan_is_plain_in_a_pipe_and_coloured_on_a_terminal() -> None:
    command = [sys.executable, "-m", "shardc.cli", "plan", "examples/mlp.py", "--mesh", "tp=2", "--hardware", "h100"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "200"}
    environment.pop("NO_COLOR", None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "environ", environment)
        piped = ran(*command[1:])
    assert (
        piped.returncode == 0 and "\x1b" not in piped.stdout and piped.stderr in ("", "compiling mlp.py for tp=2 ...\n")
    )
    master, terminal = pty.openpty()
    with subprocess.Popen(command, stdout=terminal, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment) as process:
        os.close(terminal)
        shown = b""
        while piece := _read(master):
            shown += piece
    os.close(master)
    assert process.returncode == 0 and b"\x1b[36mf32[1024, 256]\x1b[0m" in shown

    def words(text: str) -> list[str]:
        return re.sub(r"\x1b\[[\d;]*m", "", text).split("compiled in")[0].split()

    assert words(shown.decode()) == words(piped.stdout)


def _read(terminal: int) -> bytes:
    """What comes next; nothing when the other end is closed, which Linux tells as an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_whoever_closes_the_pipe_has_seen_enough() -> None:
    command = f"{sys.executable} -m shardc.cli plan examples/mlp.py --mesh tp=4 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("plan for mesh tp=4") and "Traceback" not in done.stderr and done.returncode == 0
