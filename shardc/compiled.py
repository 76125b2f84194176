"""A program lowered for a mesh: one set of sizes (`Compiled`), or all sizes of one captured program (`Family`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.capture.dynamic_sizes import Template, named_dims, sizes_of
from shardc.capture.inputs import flatten
from shardc.distribution import agree_on_program, before_call, check_data, check_world, with_global_batch
from shardc.errors import ShardcError
from shardc.explain.graphs import graph_after
from shardc.explain.plan import Plan
from shardc.explain.planned import plan_of
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.program import Constant, Program, Role
from shardc.options import Options
from shardc.passes.pipeline import NAMES, PIPELINE, part, run
from shardc.planning.compilation import Compilation, Pass
from shardc.planning.gc_pause import gc_paused
from shardc.runtime import DistributedMesh, Executable, load, local_mesh
from shardc.runtime.mesh.distributed import CALLED

TRACING = threading.RLock()
"""Held while a model is captured: for all threads, its tensors are fakes then, and flags of torch are set."""


class Compiled:
    """A program lowered for one mesh and one set of input shapes: `plan`, `code`, `graph(pass)`; call it to run it.

    Of a family, a call at other sizes runs the member for them; `at` gives that one.
    """

    def __init__(self, snapshots: Mapping[str, Compilation], family: Family | None = None) -> None:
        self.plan: Plan = plan_of(snapshots)
        self._snapshots = snapshots
        self._last = snapshots["codegen"]
        self._module = self._last.call.model
        self._family = family
        self._agreed: str | None = None
        self._executable: Executable | None = None
        self._state: list[tuple[str, dict[str, Tensor], str]] | None = None

    @property
    def code(self) -> str:
        """The generated Python, which is what runs; on ranks other than 0, once it has run (see `executable`)."""
        return self._last.code() if self._agreed is None else self._agreed

    def graph(self, name: str) -> str:
        """The graph after the pass of that name; `shardc.passes.pipeline.NAMES` has them. Raises ShardcError for any
        other name."""
        if name not in self._snapshots:
            raise ShardcError(f"no pass is called {name!r}; the passes are {', '.join(NAMES)}")
        return graph_after(self._snapshots[name])

    def save(self, path: str | Path) -> None:
        """Write the generated module; it runs with torch and shardc.runtime alone (`shardc.runtime.load`)."""
        Path(path).write_text(self.code)

    @property
    def executable(self) -> Executable:
        """The code, loaded on this process's mesh. Under torch.distributed all ranks take rank 0's code: each plans on
        its own, and one with less time for it would find another plan."""
        if self._executable is None:
            mesh = local_mesh(self.plan.mesh.sizes)
            source = self._last.code()
            module = load(source)
            if isinstance(mesh, DistributedMesh):
                agree_on_program(self._module, module.INPUTS, self._last.options)
            self._agreed = mesh.agreed(source)
            module = module if source == self._agreed else load(self._agreed)
            setattr(module, CALLED, type(self._module).__name__)
            self._executable = Executable(module, mesh)
        return self._executable

    def _registries(self) -> list[tuple[str, dict[str, Tensor], str]]:
        """Where the parameters and buffers of the program stand: name, the registry of their module, the name there."""
        if self._state is None:
            parts = dict(self._module.named_modules(remove_duplicate=False))
            used = {port.name for port in self._last.program.inputs if port.role in (Role.PARAMETER, Role.BUFFER)}
            self._state = []
            for name in used:
                path, _, key = name.rpartition(".")
                held = vars(parts[path])
                self._state.append((name, held["_parameters" if key in held["_parameters"] else "_buffers"], key))
        return self._state

    def broken(self) -> str:
        """Why a call is not one of this program: which value that the model's code reads has changed. "" if it is."""
        aside = self._last.program.aside
        return aside.broken() if aside is not None else ""

    def run(
        self, leaves: list[Any], arguments: Any, fallback: Callable[[frozenset[int]], Executable] | None = None
    ) -> Any:
        """Run on flat inputs, those of `arguments` (args and kwargs). Returns what the program returns, in its own
        structure, and leaves behind what the program leaves behind."""
        program = self._last.program
        with TRACING:
            executable = self.executable
            state = {name: registry[key] for name, registry, key in self._registries()}
        meta = next((name for name, t in state.items() if t.is_meta), None)
        if meta is not None:
            raise ShardcError(f"{meta} is on the meta device: this model was planned but has no values to run with")
        if isinstance(executable.mesh, DistributedMesh) and before_call(
            self._module, executable, state, leaves, self._last.options.data
        ):
            state = {name: registry[key] for name, registry, key in self._registries()}
        state |= program.constants | {name: place.get() for name, place in program.standing.items()}
        outputs = executable.run(state, leaves, fallback)
        outputs = [out if i in program.attached else out.detach() for i, out in enumerate(outputs)]
        return _returned(program, outputs, leaves, arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.at(ModelCall(self._module, args, kwargs)).run(flatten((args, kwargs))[0], (args, kwargs))

        with TRACING:
            reason = self.broken()
        if reason:
            raise ShardcError(f"{reason} when the model was compiled: put it back, or compile the model again")
        return with_global_batch(run, args, kwargs, self._last.mesh, self._last.options.data)

    def at(self, call: ModelCall) -> Compiled:
        """The program for the sizes of a call: this one, unless sizes are dynamic."""
        with TRACING:
            return self if self._family is None else self._family.at(call)

    def leaves_of(self, outputs: frozenset[int]) -> frozenset[int]:
        """The flat positions in the user's output of the graph outputs numbered `outputs`."""
        return frozenset(i for i, leaf in enumerate(self._last.program.out_leaves) if leaf in outputs)


def _returned(program: Program, outputs: list[Tensor], leaves: list[Any], arguments: Any) -> Any:
    """What the user's program returns, made of the outputs of ours; and what it leaves behind is left behind."""
    values: list[Any] = [
        leaf.value if isinstance(leaf, Constant) else outputs[leaf] if isinstance(leaf, int) else None
        for leaf in program.out_leaves
    ]
    if program.aside is not None:
        run = program.aside.run(values, leaves, arguments)
        for index, leaf in enumerate(program.out_leaves):
            if not isinstance(leaf, (int, Constant)):
                values[index] = leaf.make(run)
        program.aside.replay(run)
    return pytree.tree_unflatten(values[: program.out_spec.num_leaves], program.out_spec)


def compiled(call: ModelCall, mesh: Mesh, options: Options) -> Compiled:
    """Capture, plan and lower one call; with dynamic sizes the result serves all of them."""
    check_world(mesh)
    check_data(options.data, mesh)
    dims = named_dims(options.dynamic, call)
    with TRACING, gc_paused():
        if dims:
            return Family(Compilation(call, mesh, options, dims)).at(call)
        return Compiled(_run(PIPELINE, Compilation(call, mesh, options)))


def _run(passes: Sequence[Pass], c: Compilation) -> dict[str, Compilation]:
    snapshots: dict[str, Compilation] = {}
    run(passes, c, snapshots)
    return snapshots


class Family:
    """What one captured program is at the sizes met so far. It is planned at the first; the others reuse the plan's
    strategies and are only lowered. Sizes that break an assumption of the model's code are captured on their own, and
    so are sizes of one, which broadcast."""

    def __init__(self, asked: Compilation) -> None:
        self._asked = replace(asked, call=asked.call.without_arguments())
        self._members: dict[tuple[int, ...], Compiled] = {}
        self._captured: Compilation | None = None
        self._template: Template | None = None
        self._planned: Compilation | None = None
        self._planned_at = ""

    def at(self, call: ModelCall) -> Compiled:
        """The program for the sizes of a call."""
        sizes = sizes_of(self._asked.dims, flatten((call.args, dict(call.kwargs)))[0])
        key = tuple(sizes.values())
        if key not in self._members:
            self._members[key] = Compiled(self._at(replace(self._asked, call=call), sizes), self)
        return self._members[key]

    def _at(self, asked: Compilation, sizes: Mapping[str, int]) -> dict[str, Compilation]:
        seconds: Mapping[str, float] = {}
        if self._captured is None and min(sizes.values()) > 1:
            self._captured = run(part("capture", "capture"), asked)
            self._template = Template(self._captured.program, asked.dims)
            seconds = self._captured.seconds
        if self._captured is None or self._template is None or not self._template.admits(sizes):
            return _run(PIPELINE, replace(asked, dims={}))
        start = time.process_time()
        program = self._template.at(sizes)
        seconds = {**seconds, "sizes": time.process_time() - start}
        c = replace(self._captured, program=program, seconds=seconds)
        snapshots = {"capture": c}
        run(PIPELINE[1:], replace(c, reuse=self._planned, reuse_at=self._planned_at), snapshots)
        if self._planned is None:
            self._planned, self._planned_at = snapshots["assign"], ", ".join(f"{k}={n}" for k, n in sizes.items())
        return snapshots
