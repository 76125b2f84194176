"""The command line: `shardc plan | explain | compile | run FILE --mesh dp=2,tp=2`, `shardc calibrate FILE.toml`.

FILE is a Python file with two functions: `model()` gives the module, `inputs()` its inputs, a tuple or a dict.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import nn
from tyro.conf import Positional, arg, create_mutex_group, subcommand
from tyro.constructors import PrimitiveConstructorSpec

from shardc.api import Inputs
from shardc.compiled import Compiled
from shardc.errors import ShardcError
from shardc.family import compiled
from shardc.flags import parsed, spelled
from shardc.inspect.console import show, show_code
from shardc.inspect.progress import working
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.one_step import compared
from shardc.options import Options, SearchOptions
from shardc.passes.pipeline import NAMES as PASSES
from shardc.runtime import DistributedMesh, local_mesh
from shardc.search import search

UserFile = Annotated[Path, Positional, arg(metavar="FILE", help="Python file with model() and inputs().")]
FLAT = arg(name="")  # the options stand beside the other flags
AXES = arg(metavar="AXIS=SIZE,...", help="Axes and sizes, the slowest first: dp=2,tp=4.", help_behavior_hint="")
ONE_OF = create_mutex_group(required=True, title="mesh, or devices")
PASS = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PASS",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
    choices=PASSES,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 2 for what the user can mend."""
    try:
        command: Command = parsed(Command, arguments, "Shard PyTorch programs over a mesh of devices.")
        return command.run()
    except ShardcError as error:
        print(f"shardc: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough of it: `shardc plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@dataclass(frozen=True)
class PlanCommand:
    """Print the plan: layouts, conversions, predicted time, proof."""

    file: UserFile
    options: Annotated[SearchOptions, FLAT]
    mesh: Annotated[str | None, ONE_OF, AXES] = None
    devices: Annotated[int | None, ONE_OF, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Instead: plan for all meshes of so many devices, rank them, and print the command for the best."""

    def run(self) -> int:
        flags = spelled(self.options, Options)
        if self.devices is not None:
            ranking = search(*_load(self.file), self.devices, self.options)
            show(ranking.report())
            print("\n" + shlex.join(["shardc", "plan", str(self.file), f"--mesh={ranking.best}", *flags]))
            return 0
        assert self.mesh is not None  # one of the two is required
        idle = [flag for flag in spelled(self.options, SearchOptions) if flag not in flags]
        if idle:
            raise ShardcError(f"{' '.join(idle)} is for a search; ask for one with --devices in place of --mesh")
        show(_compiled(self.file, self.mesh, self.options).plan.report())
        return 0


@dataclass(frozen=True)
class OnMesh:
    """A command that compiles a file for one mesh."""

    file: UserFile
    mesh: Annotated[str, AXES]
    options: Annotated[Options, FLAT]

    def compiled(self) -> Compiled:
        return _compiled(self.file, self.mesh, self.options)


@dataclass(frozen=True)
class ExplainCommand(OnMesh):
    """Tell which demands conflict, or why a value has its layout."""

    why: Annotated[str | None, arg(metavar="VALUE", help_behavior_hint="(without it: conflicts)")] = None
    """A parameter, a module (its output), input:0, or a printed name."""
    layout: Annotated[str | None, arg(metavar="LAYOUT", help_behavior_hint="(like 'f32[256@tp, 64]' or 'tp,-')")] = None
    """The layout to compare with."""

    def run(self) -> int:
        if self.layout is not None and self.why is None:
            raise ShardcError("--layout says how a value should lie; name the value with --why")
        plan = self.compiled().plan
        if self.why is None:
            show("\n\n".join(map(str, plan.conflicts())) or "what was demanded needs no split dim gathered or moved")
        else:
            show(str(plan.why(self.why) if self.layout is None else plan.why_not(self.why, self.layout)))
        return 0


@dataclass(frozen=True)
class CompileCommand(OnMesh):
    """Print the generated code, or the graph after a pass."""

    print_after: Annotated[str | None, PASS, arg(help_behavior_hint="")] = None
    """Print the graph as this pass leaves it."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="OUT.PY", help_behavior_hint="")] = None
    """Write the generated code here."""

    def run(self) -> int:
        program = self.compiled()
        if self.print_after is not None:
            show(program.graph(self.print_after))
        if self.output is not None:
            try:
                program.save(self.output)
            except OSError as error:
                raise ShardcError(f"cannot write {self.output}: {error.strerror}") from error
            print(f"wrote {self.output}", file=sys.stderr)
        elif self.print_after is None:
            show_code(program.code)
        return 0


@dataclass(frozen=True)
class RunCommand(OnMesh):
    """Run one step on the mesh (virtual, or under torchrun) and compare it with a single device."""

    def run(self) -> int:
        torch.manual_seed(0)
        model, inputs = _load(self.file)
        meta = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
        if meta is not None:
            raise ShardcError(f"{self.file}: {meta} is on the meta device; such a model can be planned but not run")
        with working(f"compiling {self.file.name} for {self.mesh}"):
            single = copy.deepcopy(model)
            options = replace(self.options, data=None)  # inputs() gives the whole batch on every rank
            program = compiled(ModelCall.of(model, inputs), Mesh.parse(self.mesh), options)
        differences = compared(program, model, single, inputs)
        if os.environ.get("RANK", "0") == "0":
            show("\n".join(differences))
        return 0


@dataclass(frozen=True)
class CalibrateCommand:
    """Measure this machine, or under torchrun the cluster, and write what --hardware takes."""

    file: Annotated[Path, Positional, arg(metavar="FILE.toml", help="Where the hardware file is written.")]
    processes: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="(default: one a GPU, else 2)")] = None
    """Without torchrun: how many."""

    def run(self) -> int:
        if self.file.suffix != ".toml":
            raise ShardcError(f"{self.file}: a hardware file is called *.toml")
        if not self.file.absolute().parent.is_dir():
            raise ShardcError(f"{self.file}: there is no folder {self.file.absolute().parent}")
        return self._measure() if "RANK" in os.environ else self._start_processes()

    def _start_processes(self) -> int:
        processes = self.processes or torch.cuda.device_count() or 2
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*torchrun, "-m", "shardc.cli", "calibrate", str(self.file)]
        return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode

    def _measure(self) -> int:
        from shardc.cost import calibrate  # scipy takes a second to import

        mesh = local_mesh(calibrate.layout_of_processes())
        assert isinstance(mesh, DistributedMesh)
        with working("measuring"):
            measured = calibrate.calibrate(mesh, self.file.stem)
        if mesh.rank == 0:
            self.file.write_text(calibrate.toml(measured))
            show(calibrate.report(measured))
            print(f"wrote {self.file}")
        return 0


Command = (
    Annotated[PlanCommand, subcommand("plan")]
    | Annotated[ExplainCommand, subcommand("explain")]
    | Annotated[CompileCommand, subcommand("compile")]
    | Annotated[RunCommand, subcommand("run")]
    | Annotated[CalibrateCommand, subcommand("calibrate")]
)


def _compiled(file: Path, mesh: str, options: Options) -> Compiled:
    model, inputs = _load(file)
    with working(f"compiling {file.name} for {mesh}"):
        return compiled(ModelCall.of(model, inputs), Mesh.parse(mesh), options)


def _load(path: Path) -> tuple[nn.Module, Inputs]:
    """The model and the inputs of the user's file, which may import its neighbours."""
    if not path.is_file():
        raise ShardcError(f"{path} is no file; name a Python file with model() and inputs()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ShardcError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    missing = [name for name in ("model", "inputs") if not callable(getattr(module, name, None))]
    if missing:
        names = " and ".join(f"{name}()" for name in missing)
        raise ShardcError(f"{path} lacks {names}; model() gives the nn.Module and inputs() a tuple or dict of inputs")
    model, inputs = module.model(), module.inputs()
    if not isinstance(model, nn.Module):
        raise ShardcError(f"{path}: model() gives a {type(model).__name__}, not an nn.Module")
    if not isinstance(inputs, (tuple, Mapping)):
        raise ShardcError(f"{path}: inputs() gives a {type(inputs).__name__}, not a tuple or dict")
    return model, inputs


if __name__ == "__main__":
    sys.exit(main())
