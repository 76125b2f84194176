"""The options of `shard`, `compile` and `search_mesh`. Each stands here once; the command line is derived from them."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch

from shardc.cost.hardware import Hardware, hardware, this_hardware
from shardc.cost.memory import HEADROOM, NO_STATES, States, bytes_of, states_of
from shardc.errors import ConstraintError, ShardcError
from shardc.ir.constrain import Spec, serialise
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Dynamic
from shardc.ir.precision import Precision
from shardc.runtime.kernels.mixture.fused import CAPACITY
from shardc.runtime.kernels.random import INDEPENDENT

SMALL = 2.0**20
"""Bytes up to which `outputs="auto"` gathers an output: on the links of a node this takes no longer than a few kernels
do, and what a person prints, compares or logs (losses, metrics, classes) is smaller."""
OPTIMIZER = "adamw"
"""The optimizer whose state has to fit beside parameters that train, where none is named and hardware is."""
UNBOUNDED = "unbounded"
EXACT = "exact"
INDUCTOR = "inductor"


@dataclass(frozen=True)
class Text:
    """How the command line spells an option that holds more than a word or a number. `read` makes the value of a text,
    and raises ShardcError or ValueError where it cannot; `write` is its inverse.

    An option with a `flag` is a mapping: the flag is given once an entry, and a text is one `(key, value)`."""

    form: str
    example: str
    read: Callable[[str], Any] = str
    write: Callable[[Any], str] = str
    flag: str | None = None


def _read_constraint(text: str) -> tuple[str, str]:
    pattern, equals, spec = text.partition("=")
    if not equals or not pattern.strip():
        raise ConstraintError(f"--constraint {text}: write PATTERN=SPEC, like 'layers.*.up.weight=tp,-'")
    return pattern.strip(), spec.strip()


def _read_dynamic(text: str) -> tuple[str, dict[int, str]]:
    argument, _, dims = text.partition("=")
    named: dict[int, str] = {}
    for piece in dims.split(","):
        dim, _, name = (part.strip() for part in piece.partition(":"))
        if not argument.strip() or not dim.isdigit() or not name.isidentifier() or int(dim) in named:
            raise ShardcError(f"--dynamic {text}: write ARGUMENT=DIM:NAME,..., like 'input_ids=0:batch,1:seq'")
        named[int(dim)] = name
    return argument.strip(), named


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _dtype(given: str | torch.dtype) -> torch.dtype:
    """The floating type of this name. Raises ShardcError for any other name."""
    found = given if isinstance(given, torch.dtype) else getattr(torch, given.removeprefix("torch."), None)
    if found not in _FLOATING:
        names = ", ".join(map(_name, _FLOATING))
        raise ShardcError(f"{given} is no type to compute in; it is one of {names}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPE = Text("DTYPE", "bfloat16", _dtype, _name)
CONSTRAINT = Text(
    "PATTERN=SPEC",
    "'layers.*.up.weight=tp,-' (-: whole, ?: open)",
    _read_constraint,
    lambda entry: f"{entry[0]}={serialise(entry[1])}",
    flag="constraint",
)
DYNAMIC = Text(
    "ARGUMENT=DIM:NAME,...",
    "input_ids=0:batch,1:seq",
    _read_dynamic,
    lambda entry: f"{entry[0]}={','.join(f'{dim}:{name}' for dim, name in entry[1].items())}",
    flag="dynamic",
)
AXES = Text("AXIS,...", "dp,tp", _names, ",".join)


def _number_or_range(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def batch_range(given: int | str) -> tuple[int, int]:
    """The rows of the smallest and of the largest batch: `"64:256"` → (64, 256). Raises ShardcError for other texts."""
    low, colon, high = str(given).partition(":")
    ends = (low, high if colon else low)
    if not all(end.strip().isdigit() for end in ends) or not 1 <= int(ends[0]) <= int(ends[1]):
        raise ShardcError(f"batch={given!r} is no batch: write a number of rows, a range like 64:1024, or {AUTO}")
    return int(ends[0]), int(ends[1])


OPTIMIZERS = Text("NAME,...", "adamw-8bit,sgd", _names, ",".join)
BATCH = Text("ROWS|LOW:HIGH|auto", "256", _number_or_range)

AUTO = "auto"
"""As many micro-batches as make the fastest step that fits."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of a compilation, beside the model, its inputs and the mesh. Raises ShardcError for a value
    that makes no sense."""

    mode: Literal["auto", "propagate"] = "auto"
    """Who decides the layouts that nothing demands: the solver (`auto`), or GSPMD's propagation of the constraints,
    with the rest whole (`propagate`)."""

    constraints: Annotated[Mapping[str, Spec], CONSTRAINT] = field(default_factory=dict[str, Spec])
    """Layouts of weights and of modules' outputs, by path with wildcards: `{"layers.*.up.weight": ("tp", None)}`."""

    hardware: Annotated[str | Path | Hardware | None, Text("NAME|FILE.toml", "h100")] = None
    """What costs are for: `h100`, a .toml file that `shardc calibrate` wrote, or a `Hardware`. Without it, this
    machine."""

    outputs: Literal["auto", "full", "sharded"] = "auto"
    """How outputs come back: all whole on every rank (`full`), all as they lie (`sharded`: DTensors under
    torch.distributed, global tensors on a virtual mesh), or whole up to 1 MiB and else as they lie (`auto`)."""

    on_unknown: Literal["replicate", "error"] = "replicate"
    """What becomes of an operator that has no rule and that trial finds no split of: it runs whole on every rank, or
    is refused."""

    dynamic: Annotated[Dynamic, DYNAMIC] = field(default_factory=dict[str, Mapping[int, str]])
    """Dims of arguments that change from call to call: `{"input_ids": {0: "batch", 1: "seq"}}`. The program is captured
    and planned once, and lowered anew for sizes not met before."""

    data: Annotated[str | None, Text("AXIS,...", "dp,fsdp")] = None
    """The axes along which every process brings its own part of the batch, as a DistributedSampler deals it: dim 0 of
    every tensor with as many rows as the first. Loss and gradients are those of the global batch. Without it, and on a
    virtual mesh, inputs are the global batch."""

    memory: Annotated[str | float | None, Text("BYTES|unbounded", "80GB")] = None
    """What a device may hold at any time, in bytes or as `80GB`; `unbounded` for no bound. Without it, the memory of
    the hardware that was named, less a tenth; no bound for this machine. Where something has to give, values are kept
    split and regathered, or computed again in backward, whichever costs the least time."""

    optimizer: Annotated[str | float | None, Text("NAME|BYTES", "adamw", _number_or_word)] = None
    """The optimizer whose state counts in `memory`: `adamw`, `sgd`, ..., those of torch; `adamw-master` (16-bit
    parameters with a copy and moments in 32 bits), `adamw-bf16`, `adamw-8bit`, `adamw-4bit`; or bytes an element of a
    parameter that trains. Without it, `adamw` where the bound is that of the hardware; else none."""

    capacity: float = CAPACITY
    """The rows for which a rank that holds a part of the experts has room, in multiples of the mean: its memory is
    reckoned with so many. The worst that routing can do is the most that is ever reckoned with."""

    overflow: Literal["rounds", "error", "drop"] = "rounds"
    """What becomes of more rows than `capacity`, where experts exchange tokens: they travel in several rounds
    (`rounds`), the step fails (`error`), or these experts count as zero for their tokens (`drop`)."""

    imbalance: float = 1.0
    """How many times the mean the busiest rank's experts do, as measured: it sets their time. Without it, routing is
    taken to be balanced."""

    randomness: Literal["auto", "exact", "independent"] = "auto"
    """Which random numbers are drawn: those of the single device, on every mesh (`exact`), or others, as good, which
    every device draws for its part alone, inside fused kernels where there are such (`independent`; ranks with the same
    part draw the same). Either way the seed is that of `torch.manual_seed`. `auto`: exact where the model is on the
    CPU, independent where it is on another device; of a model on `meta`, where the hardware draws faster so."""

    microbatches: int | Literal["auto"] | None = 1
    """Into how many micro-batches the batch, dim 0 of the first tensor, is divided: they run one after another, so that
    a device holds the activations of one. Values are those of the whole batch, also random ones, and gradients are
    reduced once. `auto`: as many as make the fastest step that fits into `memory`. A search that is told no number
    tries what the bound on memory may need."""

    param_dtype: Annotated[str | torch.dtype | None, DTYPE] = None
    """The type in which the model computes. Parameters stay in their own type, and so do their gradients and what the
    optimizer holds; the plan casts them before it gathers them. Without it, they are used as they are. This and the
    next three mean what they mean in FSDP2's `MixedPrecisionPolicy`, for the model as a whole."""

    reduce_dtype: Annotated[str | torch.dtype | None, DTYPE] = None
    """The type in which ranks sum gradients of parameters. Without it, `param_dtype`; without that, whichever of the
    program's own types is cheapest."""

    output_dtype: Annotated[str | torch.dtype | None, DTYPE] = None
    """The type of floating outputs. Without it, they have the type in which they were computed."""

    cast_forward_inputs: bool = True
    """Whether floating inputs are cast to `param_dtype`."""

    compile: Literal["none", "inductor"] = "none"
    """What compiles the generated code: with `inductor`, every function of it, one for each kind of layer. Then a chain
    of elementwise operators counts as one kernel. On the CPU that needs a C++ compiler."""

    plan: Annotated[str | Path | None, Text("PLAN.JSON", "plan.json")] = None
    """A plan that was saved: nothing is solved. What the file leaves out is, with the rest held fixed. Options that
    the call does not name are those of the plan. A plan of another program is refused."""

    cache: bool = True
    """Whether a plan that took long to find is kept for later processes, and theirs taken: in the folder
    `$SHARDC_PLAN_CACHE` or, without it, `~/.cache/shardc/plans`."""

    def __post_init__(self) -> None:
        if self.imbalance < 1.0 or self.capacity <= 0.0:
            raise ShardcError(
                f"imbalance={self.imbalance} must be 1 or more, and capacity={self.capacity} above 0: both are "
                "multiples of the mean"
            )
        if self.microbatches not in (AUTO, None) and (type(self.microbatches) is not int or self.microbatches < 1):
            raise ShardcError(f"microbatches={self.microbatches!r} must be a whole number, 1 or more, or {AUTO!r}")
        for name, values in _choices(type(self)).items():
            if getattr(self, name) not in values:
                raise ShardcError(f"{name}={getattr(self, name)!r} is not known; it is one of {', '.join(values)}")
        for name in ("constraints", "dynamic"):  # None is taken for nothing; what the caller changes later is not ours
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _dtype(getattr(self, name)))
        _ = self.device, self.budget, states_of(self.optimizer)  # refuse now what cannot be read

    @cached_property
    def device(self) -> Hardware:
        """The hardware that costs are for."""
        return hardware(self.hardware or this_hardware())

    @cached_property
    def budget(self) -> float | None:
        """The bytes that a device may hold; None without a bound."""
        if self.memory is not None:
            return None if self.memory == UNBOUNDED else bytes_of(self.memory)
        return (1.0 - HEADROOM) * self.device.memory if self.hardware_bounds else None

    @cached_property
    def hardware_bounds(self) -> bool:
        """Whether the bound on memory is that of the hardware, since another one was not asked for."""
        return self.memory is None and self.hardware is not None and math.isfinite(self.device.memory)

    @property
    def precision(self) -> Precision:
        """The types in which the model computes."""
        given = (self.param_dtype, self.reduce_dtype, self.output_dtype)
        parameters, reduce, outputs = (None if one is None else _dtype(one) for one in given)
        return Precision(parameters, reduce, outputs, self.cast_forward_inputs)

    def drawn_on(self, device: str) -> str:
        """The randomness, `exact` or `independent`, of a model on a device of this type."""
        if self.randomness != "auto":
            return self.randomness
        faster = self.device.draws > self.device.stream if device == "meta" else device != "cpu"
        return INDEPENDENT if faster else EXACT

    def states(self, trains: bool) -> States:
        """The bytes that the optimizer holds for an element of a parameter, of a program that trains or does not."""
        if self.optimizer is None and self.hardware_bounds:
            return states_of(OPTIMIZER) if trains else NO_STATES
        return states_of(self.optimizer)

    @property
    def whole_bytes(self) -> float:
        """The most bytes of an output that comes back whole on every rank."""
        return {"auto": SMALL, "full": math.inf, "sharded": 0.0}[self.outputs]


@dataclass(frozen=True, kw_only=True)
class ShardOptions(Options):
    """The options of `shard`."""

    mesh: str | Mesh | None = None
    """Axes and sizes, the slowest axis first: `dp=2,tp=4`. Without it, one axis over all processes or GPUs."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """The options of `search_mesh`."""

    axes: Annotated[Sequence[str], AXES] = ("dp", "tp")
    """The axes that a mesh may have, in this order."""

    microbatches: int | Literal["auto"] | None = None

    batch: Annotated[int | str | None, BATCH] = None
    """The rows of a step's batch, dim 0 of the first tensor: a number in place of that of the inputs, a range like
    `64:1024`, or `auto`. In a range, and from that of the inputs on with `auto`, twice as many are tried as long as
    that raises tokens a second by 2 %."""

    optimizers: Annotated[Sequence[str], OPTIMIZERS] = ()
    """Optimizers that may be taken in place of `optimizer` where memory binds, in this order: `adamw-8bit,sgd`."""

    time_limit: float = 20.0
    """CPU-seconds that the solver may take for one mesh, where memory is not bounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch not in (None, AUTO):
            batch_range(self.batch)
        for one in self.optimizers:
            states_of(one)


@lru_cache
def _choices(options: type[Options]) -> dict[str, tuple[str, ...]]:
    """The options that are one of a few words, with these words."""
    hints: dict[str, Any] = get_type_hints(options)
    return {one.name: get_args(hints[one.name]) for one in fields(options) if _is_choice(hints[one.name])}


def _is_choice(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is Literal


def as_keywords(name: str, function: Callable[..., Any], options: type[Options]) -> Any:
    """`function(..., options)` as a function called `name` that takes the fields of `options` as keywords.

    Its signature shows them; for type checkers, give the result a Protocol over the ParamSpec of `options`.
    """
    names = [one.name for one in fields(options)]

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, [*known, *names], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; its options are {', '.join(names)}"
            raise TypeError(f"{name}() has no option {unknown!r}{hint}")
        if len(args) > len(placed) and not takes_any:
            raise TypeError(
                f"{name}() takes {len(placed)} arguments by position, {', '.join(placed)}, and was given {len(args)}; "
                f"options are named, as in {name}(..., memory='80GB')"
            )
        lacking = [one for one in wanted[len(args) :] if one not in kwargs]
        if lacking:
            raise TypeError(f"{name}() lacks {' and '.join(lacking)}: {name}({', '.join(wanted)}, ...)")
        return function(*args, **kwargs, options=options(**given))

    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "options"]
    known = [one.name for one in parameters]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [one.name for one in parameters if one.kind in named and one.default is one.empty]
    placed = [one.name for one in parameters if one.kind in named]
    takes_any = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    keywords = [one for one in inspect.signature(options).parameters.values()]
    called.__signature__ = inspect.signature(function).replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
    called.__name__ = called.__qualname__ = name  # pickle finds it by this name in its module
    return called
