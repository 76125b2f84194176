"""What generated code needs to run: meshes, collectives, slicing, random numbers, attention, the executable.

This package imports torch and nothing else of shardc, so that a saved module runs without the compiler. Generated code
may call what the modules of `collectives` and `kernels` name in `__all__`. A new module there needs no other entry.
"""

import importlib
import pkgutil
from types import ModuleType

if __name__ != "shardc.runtime":
    raise ImportError("import shardc.runtime")

from shardc.runtime import collectives, kernels
from shardc.runtime.collectives.collective import Started, wait
from shardc.runtime.errors import RankError, ShardcError
from shardc.runtime.execute.executable import Executable
from shardc.runtime.execute.load import load
from shardc.runtime.execute.slots import Cuts, Slot, cut, cuts_of, paste, placements
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.distributed import DistributedMesh, local_mesh
from shardc.runtime.mesh.mesh import Context, RuntimeMesh, current
from shardc.runtime.mesh.parameters import distribute, replace_parameters
from shardc.runtime.mesh.virtual import VirtualMesh

__all__ = [
    "Context",
    "Cuts",
    "DistributedMesh",
    "Executable",
    "Part",
    "RankError",
    "RuntimeMesh",
    "ShardcError",
    "Slot",
    "Started",
    "VirtualMesh",
    "current",
    "cut",
    "cuts_of",
    "distribute",
    "load",
    "local_mesh",
    "paste",
    "placements",
    "replace_parameters",
    "wait",
]


def _called_by_generated_code(package: ModuleType) -> dict[str, object]:
    """The objects that the modules of a package name in `__all__`. ImportError where two modules use one name."""
    named: dict[str, object] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        loaded = importlib.import_module(f"{package.__name__}.{module}")
        for name in loaded.__all__:
            if globals().get(name, named.get(name)) not in (None, getattr(loaded, name)):
                raise ImportError(
                    f"two modules of shardc.runtime name {name!r} in __all__; rename it in {loaded.__name__}"
                )
            named[name] = getattr(loaded, name)
    return named


for _package in (collectives, kernels):
    _exported = _called_by_generated_code(_package)
    globals().update(_exported)
    __all__ += [name for name in _exported if name not in __all__]  # pyright: ignore[reportUnsupportedDunderAll]
