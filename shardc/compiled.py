"""A program lowered for a mesh and one set of sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.capture.inputs import flatten
from shardc.decided import Decided
from shardc.deferred import deferred
from shardc.distribution import agree_on_program, before_call, with_global_batch
from shardc.errors import ShardcError
from shardc.explain.graphs import graph_after
from shardc.explain.plan import Plan
from shardc.explain.planned import plan_of
from shardc.inspect.html.data import Asking
from shardc.inspect.html.page import Reported, report_page
from shardc.inspect.measured import Statements, statements
from shardc.inspect.trace import Process, predicted, write
from shardc.ir.model_call import ModelCall
from shardc.ir.named_files import write_file
from shardc.ir.program import Constant, Program, Role, depended_on
from shardc.options import INDUCTOR
from shardc.passes.capture import TRACING
from shardc.passes.pipeline import NAMES
from shardc.planning.compilation import Compilation
from shardc.runtime import DistributedMesh, Executable, load, local_mesh
from shardc.runtime.execute.accumulation import GradientSums
from shardc.runtime.execute.slot_tensors import WatchedState
from shardc.runtime.mesh.distributed import CALLED

MAIN = """

if __name__ == "__main__":
    import sys

    from shardc.runtime.execute.saved import main

    main(sys.argv[0])
"""
"""What a saved module does as a program."""


_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


class AnySizes(Protocol):
    """What has the program for the sizes of any call."""

    def at(self, call: ModelCall, leaves: Sequence[Any]) -> Compiled: ...


class Compiled:
    """A program lowered for one mesh and one set of input shapes: `plan`, `code`, `graph(pass)`; call it to run it.

    Of a family, a call at other sizes runs the member for them; `at` gives that one.
    """

    def __init__(self, decided: Decided, family: AnySizes | None = None) -> None:
        self.plan: Plan = decided.plan
        self._snapshots = snapshots = decided.snapshots
        self._last = snapshots["codegen"]
        self._program = self._last.program
        self._module = self._last.call.model
        self._family = family
        self._agreed: str | None = None
        self._depended_on: frozenset[int] | None = None
        self._executable: Executable | None = None
        self._accumulating: Compiled | None = None
        self._at_planned_sizes = True
        self._state: list[tuple[str, dict[str, Tensor], str]] | None = None
        self._held: tuple[int, WatchedState] | None = None
        self._unwatched = False
        """Whether the program reads tensors that the guards do not look at, because it writes them."""

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
        """Write the generated module; it runs with torch and shardc.runtime alone (`shardc.runtime.load`). It is also a
        program: `torchrun ... FILE --check` compares processes with a virtual mesh (`shardc.runtime.execute.saved`).
        Raises ShardcError where the file cannot be written.
        """
        write_file(path, f"{self.code}{MAIN}")

    def trace(self, path: str | Path) -> None:
        """Write the predicted timeline of a step as a trace that Perfetto (ui.perfetto.dev) shows: what the rank
        computes, what every mesh axis carries, and what is held. Raises ShardcError where the file cannot be
        written."""
        write(Path(path), [self.timeline()])

    def timeline(self) -> Process:
        """The predicted timeline of a step, as traces show it."""
        return predicted(self._snapshots["overlap"])

    def statements(self) -> Statements:
        """The calls of the code, as they run: what measured timelines tell of them."""
        return statements(self._snapshots["overlap"])

    def to_html(self, path: str | Path, against: Compiled | None = None) -> None:
        """Write the plan as one HTML page, which needs no network: modules, layouts, memory, timeline, graphs, and why
        values lie as they do. With `against`, both plans are shown side by side.

        Answers that need another search are in the page where the model is small; for others it names the command.
        """
        shown = [self.reported(Asking("compiled.plan", shell=False))]
        if against is not None:
            shown.append(against.reported(Asking("against.plan", shell=False)))
        write_file(path, report_page(shown))

    def reported(self, asking: Asking) -> Reported:
        """This program for a report, whose reader asks its plan more as `asking` says."""
        return Reported(self._snapshots, self.plan, asking)

    @property
    def program(self) -> Program:
        """The captured program."""
        return self._program

    @property
    def planned(self) -> Compilation:
        """The compilation once strategies were assigned, for others to reuse."""
        return self._snapshots["assign"]

    @property
    def executable(self) -> Executable:
        """The code, loaded on this process's mesh. Under torch.distributed all ranks take rank 0's code: at sizes
        that a plan is not for, each plans on its own, and one with less time for it would find another."""
        if self._executable is None:
            mesh = local_mesh(self.plan.mesh.sizes)
            source = self._last.code()
            module = load(source)
            if isinstance(mesh, DistributedMesh):
                agree_on_program(self._last)
            self._agreed = mesh.agreed(source)
            module = module if source == self._agreed else load(self._agreed)
            setattr(module, CALLED, type(self._module).__name__)
            self._executable = Executable(self.prepared(module), mesh)
        return self._executable

    def prepared(self, module: ModuleType) -> ModuleType:
        """A module of the generated code, as it is to run."""
        if self._last.options.compile != INDUCTOR:
            return module
        from shardc.runtime.execute.inductor import compiled  # torch's compilers take seconds to import

        return compiled(module)

    @property
    def accumulating(self) -> Compiled:
        """The same plan with gradients that are reduced once, behind several backwards (`shardc.accumulate`): itself
        where it reduces none, and at sizes that it shares a source with. Raises InfeasibleError where that takes more
        memory than there may be."""
        if self._accumulating is None:
            possible = self._at_planned_sizes and self._last.epilogue is None
            found = deferred(self._snapshots) if possible else None
            self._accumulating = self if found is None else Compiled(Decided(found, plan_of(found)), self._family)
        return self._accumulating

    def for_sizes(self, program: Program, source: str, executable: Executable) -> Compiled:
        """This program at other sizes, by the source of many: with the same plan, and the same graphs."""
        other = copy.copy(self)
        other._program, other._agreed, other._executable = program, source, executable
        other._accumulating, other._at_planned_sizes, other._held = None, False, None
        return other

    def _registries(self) -> list[tuple[str, dict[str, Tensor], str]]:
        """Where the parameters and buffers of the program stand: name, the registry of their module, the name there."""
        if self._state is None:
            parts = dict(self._module.named_modules(remove_duplicate=False))
            used = [port.name for port in self._program.inputs if port.role in (Role.PARAMETER, Role.BUFFER)]
            self._state = []
            for name in used:
                path, _, key = name.rpartition(".")
                held = vars(parts[path])
                self._state.append((name, held["_parameters" if key in held["_parameters"] else "_buffers"], key))
        return self._state

    def _state_now(self) -> dict[str, Tensor]:
        """The parameters, buffers and constants of the program, wherever they stand now. Raises ShardcError for one
        without values."""
        state = {name: registry[key] for name, registry, key in self._registries()}
        if any(map(_IS_META, state.values())):
            meta = next(name for name, tensor in state.items() if tensor.is_meta)
            raise ShardcError(f"{meta} is on the meta device: this model was planned but has no values to run with")
        return state | self._program.constants | {name: place.get() for name, place in self._program.standing.items()}

    def _watched_state(self) -> WatchedState | None:
        """The same, if the guards look at each of them, as they have done for this call: from call to call, the same
        mapping until they find a difference. None where they do not."""
        program, effects = self._program, self._program.effects
        if effects is None or self._unwatched:
            return None
        if self._held is None or self._held[0] != effects.version:
            places = [(registry, key) for _, registry, key in self._registries()]
            places += [(place.container, place.key) for place in program.standing.values()]
            self._unwatched = not all(effects.knows(*place) for place in places)
            self._held = effects.version, WatchedState(self._state_now())
        return None if self._unwatched else self._held[1]

    def broken(self, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
        """Why a call with these arguments (args and kwargs) is not one of this program: which value that the model's
        code reads has changed. "" if it is."""
        effects = self._program.effects
        return effects.broken(arguments) if effects is not None else ""

    def changes(self) -> frozenset[tuple[int, Any]]:
        """What has broken the guards until now, each as the identity of a container and a key in it."""
        effects = self._program.effects
        return effects.changes() if effects is not None else frozenset()

    def as_captured(self) -> AbstractContextManager[None]:
        """In here, the values that the model's code reads are those for which this program holds."""
        effects = self._program.effects
        return effects.as_captured() if effects is not None else nullcontext()

    def run(
        self,
        leaves: list[Any],
        arguments: Any,
        fallback: Callable[[frozenset[int]], Executable] | None = None,
        sums: GradientSums | None = None,
    ) -> Any:
        """Run on flat inputs, those of `arguments` (args and kwargs). Returns what the program returns, in its own
        structure, and leaves behind what the program leaves behind. `broken` has just found that the call is one of
        this program. With `sums`, gradients that it reduces once, if
        there are any, go there."""
        program = self._program
        with TRACING:
            executable = self.executable
            state = self._watched_state() or self._state_now()
            if isinstance(executable.mesh, DistributedMesh) and before_call(
                self._module, executable, state, leaves, self._last.options.data
            ):
                state = self._state_now()
        if executable.deferred and any(not state[name].is_leaf for name in executable.deferred):
            sums = None  # what they were computed from needs their gradients now
        record = bool(program.attached) and not torch.is_grad_enabled()
        before = program.effects.before() if program.effects is not None else {}
        outputs = executable.run(state, leaves, fallback, sums, record)
        outputs = [out if i in program.attached else out.detach() for i, out in enumerate(outputs)]
        for index in self._within():
            if outputs[index].requires_grad:
                outputs[index].retain_grad = _no_gradient  # type: ignore[method-assign]
        return _returned(program, outputs, leaves, arguments, before)

    def _within(self) -> frozenset[int]:
        """The outputs from which others are computed: part of their gradients stays within the program."""
        if self._depended_on is None:
            self._depended_on = depended_on(self._program)
        return self._depended_on

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves = flatten((args, kwargs))[0]
            return self.at(ModelCall(self._module, args, kwargs), leaves).run(leaves, (args, kwargs))

        with TRACING:
            reason = self.broken((args, kwargs))
        if reason:
            raise ShardcError(f"{reason} when the model was compiled: put it back, or compile the model again")
        return with_global_batch(run, args, kwargs, self._last.mesh, self._last.options.data)

    def at(self, call: ModelCall, leaves: Sequence[Any]) -> Compiled:
        """The program for the sizes of a call with these flat inputs: this one, unless sizes are dynamic."""
        with TRACING:
            return self if self._family is None else self._family.at(call, leaves)

    def leaves_of(self, outputs: frozenset[int]) -> frozenset[int]:
        """The flat positions in the user's output of the graph outputs numbered `outputs`."""
        return frozenset(i for i, leaf in enumerate(self._program.out_leaves) if leaf in outputs)


def _returned(
    program: Program, outputs: list[Tensor], leaves: list[Any], arguments: Any, before: dict[int, Any]
) -> Any:
    """What the user's program returns, made of the outputs of ours; and what it leaves behind is left behind."""
    values: list[Any] = [
        leaf.value if isinstance(leaf, Constant) else outputs[leaf] if isinstance(leaf, int) else None
        for leaf in program.out_leaves
    ]
    if program.effects is not None:
        run = program.effects.run(values, leaves, arguments, before)
        for index, leaf in enumerate(program.out_leaves):
            if not isinstance(leaf, (int, Constant)):
                values[index] = leaf.make(run)
        for value in values[program.out_spec.num_leaves :]:
            if isinstance(value, Tensor) and value.requires_grad:
                value.retain_grad = _no_gradient  # type: ignore[method-assign]
        program.effects.replay(run)
        if program.effects.returned is not None:
            return program.effects.returned.make(run)
    return pytree.tree_unflatten(values[: program.out_spec.num_leaves], program.out_spec)


def _no_gradient() -> None:
    raise ShardcError(
        "retain_grad on a tensor from which a sharded model computes another result, or which it has left behind: its "
        "gradient stays within the program. Return the tensor from forward and compute what follows outside of the "
        "model, or shard the parts before and after it"
    )
