"""Evo 2's weights as a model-parallel run leaves them: one file for each rank, with its share of every tensor."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.evo2.weight_files import Unwrap, as_source, read_pickle
from cistron.models.sources import TensorSource

logger = logging.getLogger(__name__)

CutAxis: TypeAlias = Callable[[str], int | None]
"""The dimension along which ranks cut a tensor, by name; None for one that every rank holds whole."""

_RANK: Final = re.compile(r"mp_rank_(?P<rank>\d+)_model_states\.pt")


def rank_files(folder: Path) -> dict[int, Path]:
    """Return the files of a folder that hold one rank's share of every tensor, by rank."""
    if not folder.is_dir():
        return {}
    return {int(match["rank"]): path for path in folder.iterdir() if (match := _RANK.fullmatch(path.name))}


def open_ranks(folder: Path, axis_of: CutAxis, *, trust_pickle: bool, unwrap: Unwrap) -> TensorSource:
    """Open the shares of all ranks of a model-parallel run as one checkpoint.

    Args:
        folder: holds ``mp_rank_XX_model_states.pt``.
        axis_of: how tensors are cut.
        trust_pickle: allow the files to run code.
        unwrap: finds the state dict in each file.

    Raises:
        CheckpointNotFoundError: a rank's file is missing.
        CheckpointError: a file is broken, or the ranks do not fit together.
    """
    files = rank_files(folder)
    contents = {rank: read_pickle(files[rank], trust_pickle=trust_pickle) for rank in sorted(files)}
    stated = [content["mp_world_size"] for content in contents.values() if "mp_world_size" in content]
    count = max([*(int(size) for size in stated), max(files) + 1])
    for rank in range(count):
        if rank not in files:
            raise CheckpointNotFoundError(
                f"{folder / f'mp_rank_{rank:02d}_model_states.pt'} does not exist, and the run had {count} ranks"
            )
    if not stated:
        logger.info("%s: taking its %d ranks for all that there were, as no file says it", folder, count)
    shards = [as_source(unwrap(contents[rank]), files[rank]) for rank in range(count)]
    return _merged(shards, axis_of, [files[rank] for rank in range(count)])


def _merged(shards: Sequence[TensorSource], axis_of: CutAxis, files: Sequence[Path]) -> TensorSource:
    """Join tensors that are cut into shards."""
    shapes = dict(shards[0].shapes)
    for shard, path in zip(shards[1:], files[1:], strict=True):
        if odd := sorted(shapes.keys() ^ shard.shapes.keys()):
            raise CheckpointError(f"{path} and {files[0].name} disagree about tensor {odd[0]}")
        for name, shape in shard.shapes.items():
            axis = axis_of(name)
            if shape != shards[0].shapes[name]:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(shape)}, and {list(shards[0].shapes[name])} in "
                    f"{files[0].name}"
                )
            if axis is not None and axis < len(shape):
                total = shapes[name][axis] + shape[axis]
                shapes[name] = torch.Size([*shape[:axis], total, *shape[axis + 1 :]])
    return TensorSource(
        shapes=shapes,
        load=partial(_load_merged, shards, axis_of, files),
        metadata={},
        streams={name: partial(_all_streams, shards, name) for name in shards[0].streams},
    )


def _load_merged(shards: Sequence[TensorSource], axis_of: CutAxis, files: Sequence[Path], name: str) -> torch.Tensor:
    pieces = [shard.load(name) for shard in shards]
    axis = axis_of(name)
    if axis is not None:
        return torch.cat(pieces, dim=axis)
    for piece, path in zip(pieces[1:], files[1:], strict=True):
        if not torch.equal(piece, pieces[0]):
            raise CheckpointError(f"{path}: tensor {name} differs from that in {files[0].name}; every rank holds it")
    return pieces[0]


def _all_streams(shards: Sequence[TensorSource], name: str) -> list[bytes]:
    return [data for shard in shards if name in shard.streams for data in shard.streams[name]()]
