"""`materialize`: a model on the meta device gets the values that a single device draws."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.pretrained.hf_names import of_transformers
from shardc.pretrained.meshes import mesh_of
from shardc.pretrained.places import Destination, put
from shardc.pretrained.recording import RECORDING, Recording, recorded
from shardc.pretrained.replay import Replay
from shardc.runtime import DistributedMesh
from shardc.runtime.mesh.agreement import Note, agree
from shardc.runtime.mesh.parameters import from_rank_0

Initialiser = Callable[[nn.Module], object]
"""Initialises a model in place."""


def materialize(model: nn.Module, init: Initialiser | None = None, *, mesh: str | Mesh | None = None) -> nn.Module:
    """Give a model on the meta device its values, one tensor at a time; returns the model.

    The values are those of a single device, on every mesh, drawn from where torch's default CPU generator stands:

    - built in `shardc.deferred_init()`: what building it on the CPU gives, from here, bit for bit.
    - built under `torch.device("meta")`: what `init(model)` gives on the CPU, as after `model.to_empty(device="cpu")`.
      Without `init`: what constructors call, that is `reset_parameters()` of every module, children first, in the
      order in which they are registered, and then the model's own `init_weights()`, if it has one (of transformers:
      `initialize_weights()`, also of the models in it). A tied weight has the values that are written last.

    The generator moves as it would on a single device. What has values keeps them.

    Under torch.distributed every rank must call it. Rank 0's generator counts. Every rank draws all numbers, a tensor
    at a time, and stores its part: a parameter becomes a DTensor, split over dim 0 until the first plan moves it. So a
    rank holds at most what it stores, and one tensor with what its initialiser allocates. An optimizer that was made
    before holds the new parameters. `mesh` is for a model that is not sharded yet.

    Raises ShardcError for a tensor that nothing initialises; the model then stays as it was.
    """
    real = mesh_of(model, mesh)
    names: dict[int, str] = {}
    lacking: list[Tensor] = []
    for name, one in (*model.named_parameters(), *model.named_buffers()):
        if one.is_meta and id(one) not in names:
            names[id(one)] = name
            lacking.append(one)
    if real is not None:
        agree(Note(f"materializing {type(model).__name__}", {"what has no values": ", ".join(names.values())}))
    places: list[Destination] = []

    def take(tensor: Tensor, value: Tensor) -> None:
        places.append(Destination(tensor, real))
        places[-1].fill(lambda where: value[where])

    with same_draws(real):
        draw(model, lacking, take, init, advance=True)
    put(names, places)
    forget(model)
    return model


def forget(model: nn.Module) -> None:
    """Let go of how a model was constructed: it has its values."""
    for part in model.modules():
        vars(part).pop(RECORDING, None)


def draw(
    model: nn.Module,
    lacking: Sequence[Tensor],
    take: Callable[[Tensor, Tensor], None],
    init: Initialiser | None = None,
    *,
    advance: bool,
) -> None:
    """Call `take` with each tensor of a model that has no values and the values that it gets, one at a time. With
    `advance` all numbers are drawn that the whole model takes; else only those of these tensors.

    Raises ShardcError, before the first, for one that nothing initialises."""
    for one in lacking:
        if not one.numel():
            take(one, torch.empty_like(one, device="cpu"))
    left, plans = [one for one in lacking if one.numel()], list[tuple[Recording, Replay, list[Tensor]]]()
    recordings = [] if init is not None else _recordings(model)
    if left and not all(any(_written(one, Replay(r), r) for r in recordings) for one in left):
        recordings.append(_initialised(model, init or default_init))
    for recording in recordings:
        replay = Replay(recording)
        own = [one for one in left if _written(one, replay, recording)]
        left = [one for one in left if not _written(one, replay, recording)]
        plans.append((recording, replay, own))
    if left:
        names = {id(one): name for name, one in (*model.named_parameters(), *model.named_buffers())}
        lost = ", ".join(names[id(one)] for one in left[:8])
        raise ShardcError(
            f"nothing gives {lost} a value: no reset_parameters() or init_weights() writes it. Build the model in "
            "shardc.deferred_init(), which remembers how its constructor does; or name a function that does, like "
            "materialize(model, init=my_init)"
        )
    for recording, replay, own in plans:
        replay.values(
            [recording.ref(one) for one in own], advance, lambda number, value, own=own: take(own[number], value)
        )


def default_init(model: nn.Module) -> None:
    """What constructors call, in their order: `reset_parameters()` of every module, children first; the initialisation
    of a model of transformers, and of the models in it; and at last the model's own `init_weights()`."""
    for part in _children_first(model):
        names = ["reset_parameters", "_reset_parameters"]
        if of_transformers(part):
            names.append("initialize_weights")
        elif part is model:
            names.append("init_weights")
        for name in names:
            own = getattr(part, name, None)
            if callable(own):
                own()


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Every module once, after its children."""
    met: set[int] = set()

    def walk(part: nn.Module) -> Iterator[nn.Module]:
        if id(part) not in met:
            met.add(id(part))
            for child in part.children():
                yield from walk(child)
            yield part

    return walk(module)


def _recordings(model: nn.Module) -> list[Recording]:
    found: dict[int, Recording] = {}
    for part in model.modules():
        recording = vars(part).get(RECORDING)
        if recording is not None:
            found.setdefault(id(recording), recording)
    return list(found.values())


def _initialised(model: nn.Module, init: Initialiser) -> Recording:
    recording = Recording()
    with recorded(recording, protect=True), torch.no_grad():
        init(model)
    return recording


def _written(tensor: Tensor, replay: Replay, recording: Recording) -> bool:
    return replay.written(recording.ref(tensor))


@contextmanager
def same_draws(mesh: DistributedMesh | None) -> Generator[None]:
    """In here, and after it, the default generator is that of rank 0. Every rank must enter it."""
    if mesh is not None:
        torch.set_rng_state(from_rank_0(torch.get_rng_state(), mesh).cpu())
    yield
