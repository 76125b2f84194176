"""A training step of a model of transformers, from its config alone: on the meta device, without weights.

config.json of Llama, batch 256, seq 4096   ->   LlamaForCausalLM, input_ids i64[256, 4096], labels i64[256, 4096]
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardc.errors import ShardcError
from shardc.ir.model_call import ModelCall


@dataclass(frozen=True)
class Task:
    """What a model is trained for: the class of transformers that knows its models, and the names of its inputs, the
    labels last. Labels are one a row (`per_row`), or one a token."""

    auto: str
    inputs: tuple[str, ...]
    per_row: bool = False


TASKS = (
    Task("AutoModelForSeq2SeqLM", ("input_ids", "decoder_input_ids", "labels")),
    Task("AutoModelForMaskedLM", ("input_ids", "labels")),
    Task("AutoModelForCausalLM", ("input_ids", "labels")),
    Task("AutoModelForImageClassification", ("pixel_values", "labels"), per_row=True),
    Task("AutoModelForSequenceClassification", ("input_ids", "labels"), per_row=True),
    Task("AutoModelForTokenClassification", ("input_ids", "labels")),
)
"""In the order in which they are tried for a config that names no architecture, or one of no task here."""

LENGTHS = ("max_position_embeddings", "n_positions")
"""Where a config says how many positions its model knows."""


def is_config(path: Path) -> bool:
    """Whether a path is that of a config: a `.json` file, or a folder that holds a `config.json`."""
    return path.suffix == ".json" or path.is_dir()


def step_from_config(path: Path, batch: int | None, seq: int | None) -> ModelCall:
    """The call of one training step with `batch` rows of `seq` tokens, or of `batch` pictures: it returns the loss.

    The model has the dtype that the config names, else float32, and its dropout. Raises ShardcError for a file that is
    no config, for a model that no task here is known for, for sizes that are missing or do not fit the model, and where
    transformers is not installed.
    """
    file = path / "config.json" if path.is_dir() else path
    settings = _read(file)
    config = _config(file, settings)
    task, kind = _task(file, config)
    _check_sizes(file, config, task, batch, seq)
    assert batch is not None
    model = _built(file, kind, config)
    inputs = {name: _input(name, task, config, batch, seq or 1, _dtype(model)) for name in task.inputs}
    return ModelCall(model, (), inputs, function=_loss_of(model))


def _loss_of(model: nn.Module) -> Callable[..., Tensor]:
    """The model as a function that returns the loss alone: nobody asks for the logits of a long batch."""

    def loss(**inputs: Tensor) -> Tensor:
        with _quiet():
            return model(**inputs).loss

    return loss


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ShardcError("a model is built from its config by transformers: pip install transformers") from error


def _read(file: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except OSError as error:
        raise ShardcError(
            f"cannot read {file}: {error.strerror}; name a config.json, or a folder that has one"
        ) from error
    except ValueError as error:
        raise ShardcError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ShardcError(f"{file} holds a {type(settings).__name__}; a config of transformers is an object")
    return settings


def _config(file: Path, settings: Mapping[str, Any]) -> Any:
    transformers = _transformers()
    known = list(transformers.CONFIG_MAPPING.keys())
    kind = settings.get("model_type")
    if kind is None:
        raise ShardcError(f"{file} has no model_type, which says what model it is: a config of transformers names one")
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        own = ", and code that comes with a config is not run" if "auto_map" in settings else ""
        raise ShardcError(f"{file}: transformers {transformers.__version__} knows no model_type {kind!r}{own}{hint}")
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(dict(settings))
    except Exception as error:
        raise ShardcError(f"{file} is no config of {kind}: {_first_line(error)}") from error
    config.use_cache = False
    return config


def _task(file: Path, config: Any) -> tuple[Task, type[nn.Module]]:
    """The task of a model and its class: of the architecture that the config names, else of its type."""
    named = (config.architectures or [""])[0]
    offered = list(_offered(config))
    for task, kind in offered:
        if kind.__name__ == named:
            return task, kind
    if not offered:
        tasks = ", ".join(task.auto for task in TASKS)
        raise ShardcError(
            f"{file}: {config.model_type} is no model that a step is known for ({tasks}); write a Python file with "
            "model() and inputs()"
        )
    return offered[0]


def _offered(config: Any) -> Iterator[tuple[Task, type[nn.Module]]]:
    transformers = _transformers()
    for task in TASKS:
        mapping = getattr(transformers, task.auto)._model_mapping
        if type(config) in mapping:
            kinds = mapping[type(config)]
            yield from ((task, kind) for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def _check_sizes(file: Path, config: Any, task: Task, batch: int | None, seq: int | None) -> None:
    pictures = "pixel_values" in task.inputs
    if batch is None or (seq is None and not pictures):
        wanted = "--batch 256" if pictures else "--batch 256 --seq 4096"
        raise ShardcError(f"{file} does not say how large a step is; add, for example, {wanted}")
    if batch < 1 or (seq is not None and seq < 1):
        raise ShardcError(f"--batch {batch}{'' if seq is None else f' --seq {seq}'}: both must be 1 or more")
    if pictures and seq is not None:
        raise ShardcError(f"{file}: {config.model_type} reads pictures, which have no --seq; leave it out")
    most = next((most for name in LENGTHS if (most := getattr(config, name, None))), None)
    if seq is not None and most is not None and seq > most:
        raise ShardcError(f"{file}: {config.model_type} knows {most} positions, and --seq {seq} is more")


def _built(file: Path, kind: type[nn.Module], config: Any) -> nn.Module:
    build: Any = kind
    try:
        with _quiet(), torch.device("meta"):
            return build._from_config(config).train()
    except Exception as error:
        raise ShardcError(f"{file}: transformers cannot build {kind.__name__} of it: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without what transformers logs of defaults that are nothing to whoever plans."""
    logging = _transformers().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _input(name: str, task: Task, config: Any, batch: int, seq: int, dtype: torch.dtype) -> Tensor:
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.empty(batch, config.num_channels, height, width, dtype=dtype, device="meta")
    shape = (batch,) if name == "labels" and task.per_row else (batch, seq)
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
