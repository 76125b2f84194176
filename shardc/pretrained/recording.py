"""What a model's construction does to its tensors, noted while nothing is allocated and nothing is drawn.

with deferred_init():
    layer = nn.Linear(4, 4)        # 1: empty 0    2: empty 1    3: uniform_ 0    4: uniform_ 1

Tensors are told apart by their storage, so that views need no note: what is written into `weight[0]` is written into
storage 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardc.errors import ShardcError

RECORDING = "_shardc_recording"
"""The attribute of a module that holds the `Recording` of its construction."""

META = torch.device("meta")

OVERWRITING = {
    *("zero_", "fill_", "copy_", "uniform_", "normal_", "random_", "bernoulli_"),
    *("exponential_", "geometric_", "log_normal_", "cauchy_", "eye_"),
}
"""Operators that write all of a tensor and read nothing of it."""

UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
"""Operators that make a tensor without values."""


@dataclass(frozen=True)
class Ref:
    """A tensor that has no values: a view of a storage."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    """Bytes of the storage."""

    @property
    def whole(self) -> bool:
        """Whether it covers the storage."""
        return torch.Size(self.size).numel() * self.dtype.itemsize == self.nbytes


@dataclass(frozen=True)
class NotedStep:
    """One operator. Arguments are `Ref`s where they have no values; `written` are the storages that it writes, of which
    it writes those in `whole` without reading them."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: Any
    read: frozenset[int]
    written: frozenset[int]
    whole: frozenset[int]
    random: bool
    dtype: torch.dtype
    """The default dtype when it ran."""

    @property
    def name(self) -> str:
        """The operator or initialiser, like `uniform_`."""
        schema = getattr(self.function, "_schema", None)
        return self.function.__name__ if schema is None else schema.name.partition("::")[2]


@dataclass
class Recording:
    """The steps of a construction, in order. It keeps the storages, so that each has a number of its own."""

    steps: list[NotedStep] = field(default_factory=list[NotedStep])
    storages: dict[int, Any] = field(default_factory=dict[int, Any])
    shadows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])
    """For a tensor that has values, by its id: the tensor, and one without values that is written in its place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Recording, ()

    def ref(self, tensor: Tensor) -> Ref:
        """The note of a tensor on the meta device."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        place = int(tensor.storage_offset()), storage.nbytes()
        return Ref(storage._cdata, tensor.dtype, tuple(tensor.shape), tensor.stride(), *place)


@contextmanager
def deferred_init() -> Generator[None]:
    """Build models without allocating them: like `torch.device("meta")`, but how each value is made is remembered.

        with shardc.deferred_init():
            model = GPT(config)
        model = shardc.shard(model, mesh="dp=2,tp=2")
        torch.manual_seed(0)
        shardc.materialize(model)

    Code that is run in it sees tensors of the CPU, so it draws and computes what it would there; devices that it names
    are taken for the CPU. A value that it looks at (`.item()`, `.tolist()`) is computed, unless it depends on random
    numbers: that raises ShardcError.
    """
    recording = Recording()

    def note(module: nn.Module, name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            vars(module)[RECORDING] = recording

    hooks = [
        torch.nn.modules.module.register_module_parameter_registration_hook(note),
        torch.nn.modules.module.register_module_buffer_registration_hook(note),
    ]
    try:
        with recorded(recording):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded(recording: Recording, protect: bool = False) -> Generator[None]:
    """Note what is done in here. With `protect`, tensors that have values keep them: others are written instead."""
    recorder = _Recorder(recording, protect)
    with _SeesCPU(recorder), recorder, _as_one_step(recorder):
        yield


@contextmanager
def _as_one_step(recorder: _Recorder) -> Generator[None]:
    """Initialisers that look at what they drew, and draw again, are one step."""
    init, name = torch.nn.init, "_no_grad_trunc_normal_"
    plain = getattr(init, name)

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor.device != torch.device("cpu"):
            return plain(tensor, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            return recorder.initialise(plain, tensor, args, kwargs)

    setattr(init, name, noted)
    try:
        yield
    finally:
        setattr(init, name, plain)


class _SeesCPU(TorchFunctionMode):
    """Tensors without values say that they are on the CPU: initialisers skip what is on the meta device."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _IS_META:
            return False
        if func == _DEVICE and args[0].device == META:
            return torch.device("cpu")
        if func in (Tensor.tolist, Tensor.numpy) and args[0].device == META:
            with self._recorder.off():
                return func(self._recorder.value(args[0]))
        return func(*args, **(kwargs or {}))


_IS_META: Any = Tensor.is_meta.__get__  # pyright: ignore[reportAttributeAccessIssue]
_DEVICE: Any = Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording, protect: bool) -> None:
        super().__init__()
        self._recording, self._protect = recording, protect

    @contextmanager
    def off(self) -> Generator[None]:
        """In here nothing is noted."""
        with torch._C._DisableTorchDispatch():
            yield

    def value(self, tensor: Tensor) -> Tensor:
        """The values that a tensor would have now. Raises ShardcError where they depend on random numbers."""
        from shardc.pretrained.replay import Replay

        replay = Replay(self._recording)
        chain = replay.chain(self._recording.ref(tensor))
        if any(self._recording.steps[at].random for at in chain):
            raise ShardcError(
                "deferred_init: the construction of the model looks at a value that is drawn, and nothing is drawn in "
                "here. Build the model on the CPU, or under torch.device('meta') with materialize(model, init=...)"
            )
        return replay.run(chain, self._recording.ref(tensor), {})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        makes = any(one.name == "device" for one in func._schema.arguments)
        writes_real = self._protect and func._schema.is_mutable and any(one.device != META for one in given)
        if not writes_real and not any(one.device == META for one in given) and (given or not makes):
            return func(*args, **kwargs)
        if any(not isinstance(one.type, (torch.TensorType, torch.ListType)) for one in func._schema.returns):
            real = [self.value(one) if isinstance(one, Tensor) and one.device == META else one for one in leaves]
            args, kwargs = pytree.tree_unflatten(real, spec)
            return func(*args, **kwargs)
        shadowed = [self._shadow(one) if isinstance(one, Tensor) and one.device != META else one for one in leaves]
        args, kwargs = pytree.tree_unflatten(shadowed, spec)
        asked = {**kwargs, "device": META} if makes else kwargs
        result = func(*args, **{k: v for k, v in asked.items() if k not in ("generator", "pin_memory")})
        self._note(func, args, {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}, result)
        return _as_given(result, shadowed, leaves) if writes_real else result

    def initialise(self, function: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Note a function that draws all values of a tensor."""
        if tensor.device != META and not self._protect:
            return function(tensor, *args, **kwargs)
        note = self._recording.ref(tensor if tensor.device == META else self._shadow(tensor))
        own = frozenset((note.storage,))
        whole = own if note.whole else frozenset[int]()
        self._recording.steps.append(
            NotedStep(function, (note, *args), kwargs, note, own, own, whole, True, torch.get_default_dtype())
        )
        return tensor

    def _shadow(self, tensor: Tensor) -> Tensor:
        """A tensor without values in place of one that has them; its own values are its first."""
        if id(tensor) not in self._recording.shadows:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
            self._recording.shadows[id(tensor)] = tensor, made
            if not isinstance(tensor, DTensor):  # whose values are on several ranks: an initialiser writes all of them
                note = self._recording.ref(made)
                held = frozenset((note.storage,))
                copied, dtype = torch.ops.aten.copy_.default, torch.get_default_dtype()
                self._recording.steps.append(
                    NotedStep(copied, (note, tensor), {}, note, frozenset(), held, held, False, dtype)
                )
        return self._recording.shadows[id(tensor)][1]

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        def noted(leaf: Any) -> Any:
            return self._recording.ref(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs, results = pytree.tree_map(noted, (args, kwargs, result))
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Ref)]
        outputs = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Ref)]
        schema = func._schema.arguments
        named = itertools.chain(zip((one.name for one in schema), args, strict=False), kwargs.items())
        mutable = {one.name for one in schema if one.alias_info is not None and one.alias_info.is_write}
        into = [r for name, value in named if name in mutable for r in pytree.tree_leaves(value) if isinstance(r, Ref)]
        read = {one.storage for one in inputs}
        made = {one.storage for one in outputs} - read
        written = made | {one.storage for one in into}
        if not written:
            return  # a view
        whole = made
        if func._schema.name.partition("::")[2] in OVERWRITING:
            others = {one.storage for one in inputs[1:]}
            whole = {into[0].storage} if into[0].whole and into[0].storage not in others else whole
        storages = frozenset(read), frozenset(written), frozenset(whole)
        self._recording.steps.append(
            NotedStep(func, args, kwargs, results, *storages, _random(func), torch.get_default_dtype())
        )


def _random(func: Callable[..., Any]) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags  # type: ignore[attr-defined]


def _as_given(result: Any, shadowed: list[Any], leaves: list[Any]) -> Any:
    """An operator that writes into its argument returns that argument, and not what was written in its place."""
    back = {id(one): leaf for one, leaf in zip(shadowed, leaves, strict=True) if isinstance(leaf, Tensor)}
    return pytree.tree_map(lambda one: back.get(id(one), one), result)
