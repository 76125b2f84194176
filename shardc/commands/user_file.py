"""What every command that plans takes: the user's Python file, a mesh, options."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import nn
from tyro.conf import Positional, arg

from shardc.api import Inputs
from shardc.compiled import Compiled
from shardc.errors import ShardcError
from shardc.family import compiled
from shardc.inspect.progress import working
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.options import Options

UserFile = Annotated[Path, Positional, arg(metavar="FILE", help="Python file with model() and inputs().")]
FLAT = arg(name="")  # the options stand beside the other flags
AXES = arg(metavar="AXIS=SIZE,...", help="Axes and sizes, the slowest first: dp=2,tp=4.", help_behavior_hint="")


@dataclass(frozen=True)
class OnMesh:
    """A command that compiles a file for one mesh."""

    file: UserFile
    mesh: Annotated[str, AXES]
    options: Annotated[Options, FLAT]

    def compiled(self) -> Compiled:
        return compile_file(self.file, self.mesh, self.options)


def compile_file(file: Path, mesh: str, options: Options) -> Compiled:
    """The program of a user's file on a mesh, such as "dp=2,tp=4"."""
    model, inputs = load_file(file)
    with working(f"compiling {file.name} for {mesh}"):
        return compiled(ModelCall.of(model, inputs), Mesh.parse(mesh), options)


def load_values(path: Path) -> tuple[nn.Module, Inputs]:
    """The model and the inputs of the user's file, to run: with values."""
    model, inputs = load_file(path)
    meta = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if meta is not None:
        raise ShardcError(f"{path}: {meta} is on the meta device; such a model can be planned but not run")
    return model, inputs


def load_file(path: Path) -> tuple[nn.Module, Inputs]:
    """The model and the inputs of the user's file, which may import its neighbours."""
    if not path.is_file():
        raise ShardcError(f"{path} is no file; name a Python file with model() and inputs()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ShardcError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    with _told(path):
        spec.loader.exec_module(module)
    missing = [name for name in ("model", "inputs") if not callable(getattr(module, name, None))]
    if missing:
        names = " and ".join(f"{name}()" for name in missing)
        raise ShardcError(f"{path} lacks {names}; model() gives the nn.Module and inputs() a tuple or dict of inputs")
    with _told(path):
        model, inputs = module.model(), module.inputs()
    if not isinstance(model, nn.Module):
        raise ShardcError(f"{path}: model() gives a {type(model).__name__}, not an nn.Module")
    if not isinstance(inputs, (tuple, Mapping)):
        raise ShardcError(f"{path}: inputs() gives a {type(inputs).__name__}, not a tuple or dict")
    return model, inputs


@contextmanager
def _told(path: Path) -> Generator[None]:
    """Tell of an error in the user's file in one message, with the line of the file."""
    try:
        yield
    except ShardcError:
        raise
    except Exception as error:
        frames = [one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename) == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        where = path if line is None else f"{path}:{line}"
        raise ShardcError(f"{where}: {type(error).__name__}: {error}") from error
