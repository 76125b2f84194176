"""How torch.distributed.checkpoint writes and reads here: complete or not at all, with nothing foreign unpickled.

The files are its own, so `torch.distributed.checkpoint.load` reads a checkpoint without shardc.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardc.runtime.checkpoint.blocks import Blocks
from shardc.runtime.checkpoint.files import File, Manifest, commit


class CheckpointWriter(FileSystemWriter):
    """Writes into a folder aside, and makes it a complete checkpoint when all ranks have written theirs."""

    def __init__(self, aside: Path, step: int, ranks: int, keep: int | None) -> None:
        super().__init__(aside)
        self.step = step
        self.ranks = ranks
        self.keep = keep
        self.place: Path | None = None
        """The complete checkpoint, on rank 0."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What is saved is a copy already (see `collected`)."""
        return state_dict

    def storage_meta(self) -> StorageMeta:
        """Without the path, which changes."""
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Adds to the results what the rank's files are, for the manifest."""
        results = super().write_data(plan, planner).value()
        names = {str(result.storage_data.relative_path) for result in results}
        files = [WriteResult(MetadataIndex(name), 0, File.of(Path(self.path, name))) for name in sorted(names)]
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, *files])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written."""
        written = {
            result.index.fqn: result.storage_data
            for rank in results
            for result in rank
            if isinstance(result.storage_data, File)
        }
        tensors = [[result for result in rank if not isinstance(result.storage_data, File)] for rank in results]
        super().finish(metadata, tensors)
        self.place = commit(Path(self.path), self.step, self.ranks, written, self.keep)


class SavePlanning(DefaultSavePlanner):
    """Knows the blocks of DTensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """A block, a tensor, or any other value."""
        value = self.state_dict[index.fqn]
        return value.block(index.offset) if isinstance(value, Blocks) else value


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint whose files were found as its manifest says."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder)
        self.manifest = manifest

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Where every tensor lies. ValueError where the file says what no checkpoint says."""
        try:
            with Path(self.path, ".metadata").open("rb") as stream:
                read = _MetadataUnpickler(stream).load()
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f".metadata cannot be read: {error}") from error
        if not isinstance(read, Metadata):
            raise ValueError(f".metadata holds a {type(read).__name__}")
        if not (isinstance(read.planner_data, Mapping) and isinstance(read.storage_data, Mapping)):
            raise ValueError(".metadata does not say where everything lies")
        named = {getattr(place, "relative_path", None) for place in read.storage_data.values()}
        foreign = named - self.manifest.files.keys()
        if foreign:
            raise ValueError(f".metadata names {foreign.pop()}, which the manifest does not")
        return read


class LoadPlanning(DefaultLoadPlanner):
    """Loads into a flat dict of blocks, tensors, and other values, by their keys in the checkpoint."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The dict is flat as it is."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.flatten_state_dict = False

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Reads what `torch.load(weights_only=True)` reads, and raises what that raises."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The block, or the tensor."""
        value = self.state_dict[index.fqn]
        return value.block(index.offset) if isinstance(value, Blocks) else value


_PLAIN = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,  # pyright: ignore[reportPrivateUsage]
            filesystem._StorageInfo,  # pyright: ignore[reportPrivateUsage]
            torch.Size,
        )
    },
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # pyright: ignore
}
"""All that the metadata of a checkpoint is made of, beside dtypes: plain records."""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the records of `_PLAIN` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """UnpicklingError for any other class or function."""
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint holds")
