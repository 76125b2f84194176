"""The command line: `shardc plan | explain | compile | run FILE --mesh dp=2,tp=2`, `shardc calibrate FILE.toml`.

FILE is a Python file with two functions: `model()` gives the module, `inputs()` its inputs, a tuple or a dict.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from shardc import api
from shardc.errors import ConstraintError, ShardcError
from shardc.inspect.progress import working
from shardc.passes.pipeline import NAMES as PASSES
from shardc.runtime import DistributedMesh, local_mesh
from shardc.search import search_mesh

MEASURE = "Measure this machine, or under torchrun the cluster, and write what --hardware takes."
Inputs = tuple[Any, ...] | Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 2 for what the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ShardcError as error:
        print(f"shardc: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardc", description="Shard PyTorch programs over a mesh of devices.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], help: str, searches: bool = False
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(command=command)
        one.add_argument("file", type=Path, metavar="FILE", help="Python file with model() and inputs()")
        mesh = one.add_mutually_exclusive_group(required=True) if searches else one
        mesh.add_argument("--mesh", required=not searches, help="axes and sizes, the slowest first: dp=2,tp=4")
        if searches:
            mesh.add_argument("--devices", type=int, help="instead: rank all meshes of so many devices")
        one.add_argument("--hardware", help="what costs are for: h100, or a .toml file (default: this machine)")
        one.add_argument(
            "--mode", choices=("auto", "propagate"), default="auto", help="who decides what is not annotated"
        )
        one.add_argument(
            "--outputs", choices=("full", "sharded"), default="full", help="gather outputs or leave them sharded"
        )
        one.add_argument(
            "--on-unknown",
            choices=("replicate", "error"),
            default="replicate",
            help="operators that have no rule and no split",
        )
        one.add_argument("--memory", help="what a device may hold: 80GB, 24GiB")
        one.add_argument("--optimizer", help="whose state counts: adamw, sgd, ..., or bytes an element of a parameter")
        one.add_argument(
            "--constraint",
            action="append",
            default=[],
            metavar="PATTERN=SPEC",
            help="layout of a weight or a module's output: 'layers.*.up.weight=tp,-' (-: whole, ?: open)",
        )
        return one

    planner = add("plan", _plan, "Print the plan: layouts, conversions, predicted time, proof.", searches=True)
    planner.add_argument("--axes", default="dp,tp", help="with --devices: what axes there may be (default dp,tp)")
    explainer = add("explain", _explain, "Tell which demands conflict, or why a value lies as it does.")
    explainer.add_argument(
        "--why", metavar="VALUE", help="a parameter, a module (its output), input:0, or a printed name; else: conflicts"
    )
    explainer.add_argument("--layout", help="the layout to compare with: 'f32[256@tp, 64]' or 'tp,-'")
    compiler = add("compile", _compile, "Print the generated code, or the graph after a pass.")
    compiler.add_argument("--print-after", metavar="PASS", help=f"one of {', '.join(PASSES)}")
    compiler.add_argument("-o", "--output", type=Path, metavar="OUT.PY", help="write the generated code here")
    add("run", _run, "Run one step on the mesh (virtual, or under torchrun) and compare it with a single device.")
    calibrate = commands.add_parser("calibrate", help=MEASURE, description=MEASURE)
    calibrate.set_defaults(command=_calibrate)
    calibrate.add_argument("file", type=Path, metavar="FILE.toml", help="where the hardware file is written")
    calibrate.add_argument("--processes", type=int, help="without torchrun: how many (default: one a GPU, else 2)")
    return parser


def _plan(options: argparse.Namespace) -> int:
    if options.devices is not None:
        return _search(options, *_load(options.file))
    print(_compiled(options, *_load(options.file)).plan)
    return 0


def _search(options: argparse.Namespace, model: nn.Module, inputs: Inputs) -> int:
    """Rank the meshes; the last line plans for the best."""
    axes = [axis.strip() for axis in options.axes.split(",")]
    found = search_mesh(model, options.devices, inputs, axes=axes, **_asked(options), **_budget(options))
    names = ("hardware", "mode", "outputs", "memory", "optimizer")
    own = [f"--{name}={value}" for name in names if (value := getattr(options, name))]
    own += [f"--on-unknown={options.on_unknown}", *(f"--constraint={text}" for text in options.constraint)]
    defaults = {"--mode=auto", "--outputs=full", "--on-unknown=replicate"}
    command = ["shardc", "plan", str(options.file), f"--mesh={found.best}", *(o for o in own if o not in defaults)]
    print(f"{found}\n\n{shlex.join(command)}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    if options.layout is not None and options.why is None:
        raise ShardcError("--layout says how a value should lie; name the value with --why")
    plan = _compiled(options, *_load(options.file)).plan
    if options.why is None:
        print("\n\n".join(map(str, plan.conflicts())) or "what was demanded needs no split dim gathered or moved")
    else:
        print(plan.why(options.why) if options.layout is None else plan.why_not(options.why, options.layout))
    return 0


def _compile(options: argparse.Namespace) -> int:
    after: str | None = options.print_after
    if after is not None and after not in PASSES:
        raise ShardcError(f"--print-after {after}: no such pass; the passes are {', '.join(PASSES)}")
    compiled = _compiled(options, *_load(options.file))
    if after is not None:
        print(compiled.graph(after))
    if options.output is not None:
        try:
            compiled.save(options.output)
        except OSError as error:
            raise ShardcError(f"cannot write {options.output}: {error.strerror}") from error
        print(f"wrote {options.output}", file=sys.stderr)
    elif after is None:
        print(compiled.code)
    return 0


def _run(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model, inputs = _load(options.file)
    meta = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if meta is not None:
        raise ShardcError(f"{options.file}: {meta} is on the meta device; such a model can be planned but not run")
    single = copy.deepcopy(model)
    compiled = _compiled(options, model, inputs)
    torch.manual_seed(1)
    outputs = _tensors(_call(compiled, inputs))
    torch.manual_seed(1)
    expected = _tensors(_call(single, inputs))
    differences = [_difference(a, b) for a, b in zip(outputs, expected, strict=True)]
    lines = [
        f"output {index}: {_summary(_whole(tensor))}   largest difference to one device {difference:.1e}"
        for index, (tensor, difference) in enumerate(zip(outputs, differences, strict=True))
    ]
    if expected and expected[0].requires_grad:
        outputs[0].sum().backward()
        expected[0].sum().backward()
        alone = dict(single.named_parameters())
        gradients = {
            name: _difference(parameter.grad, alone[name].grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        if gradients:
            worst = max(gradients, key=gradients.__getitem__)
            lines.append(f"{len(gradients)} gradients: largest difference {gradients[worst]:.1e} ({worst})")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    """Measure on the processes of torchrun; without it, start it on this machine."""
    path: Path = options.file
    if path.suffix != ".toml":
        raise ShardcError(f"{path}: a hardware file is called *.toml")
    if not path.absolute().parent.is_dir():
        raise ShardcError(f"{path}: there is no folder {path.absolute().parent}")
    if "RANK" not in os.environ:
        processes = options.processes or torch.cuda.device_count() or 2
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*torchrun, "-m", "shardc.cli", "calibrate", str(path)]
        return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode
    from shardc.cost import calibrate  # scipy takes a second to import

    mesh = local_mesh(calibrate.layout_of_processes())
    assert isinstance(mesh, DistributedMesh)
    with working("measuring") if mesh.rank == 0 else nullcontext():
        measured = calibrate.calibrate(mesh, path.stem)
    if mesh.rank == 0:
        path.write_text(calibrate.toml(measured))
        print(f"{calibrate.table(measured)}\nwrote {path}")
    return 0


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


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The options that `compile` and `search_mesh` share."""
    constraints: dict[str, str] = {}
    for text in options.constraint:
        pattern, equals, spec = text.partition("=")
        if not equals or not pattern:
            raise ConstraintError(f"--constraint {text}: write PATTERN=SPEC, like 'layers.*.up.weight=tp,-'")
        constraints[pattern.strip()] = spec.strip()
    return {
        "mode": options.mode,
        "constraints": constraints,
        "hardware": options.hardware,
        "outputs": options.outputs,
        "on_unknown": options.on_unknown,
    }


def _compiled(options: argparse.Namespace, model: nn.Module, inputs: Inputs) -> api.Compiled:
    with working(f"compiling {options.file.name} for {options.mesh}"):
        return api.compile(model, options.mesh, inputs, **_asked(options), **_budget(options))


def _budget(options: argparse.Namespace) -> dict[str, Any]:
    optimizer: str | None = options.optimizer
    try:
        return {"memory": options.memory, "optimizer": None if optimizer is None else float(optimizer)}
    except ValueError:
        return {"memory": options.memory, "optimizer": optimizer}


def _call(function: Callable[..., Any], inputs: Inputs) -> Any:
    return function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _whole(tensor: Tensor) -> Tensor:
    """The global tensor, on this process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("nan")
    a, b = _whole(a).detach(), b.detach()
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _summary(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 1:
        return f"{kind} {tensor.item():.6f}"
    return f"{kind}{list(tensor.shape)} mean {tensor.double().mean().item():.6f}"


if __name__ == "__main__":
    sys.exit(main())
