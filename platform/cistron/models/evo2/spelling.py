"""How another format writes the tensors of an Evo 2, and the translation of streams of them in both directions.

A format says which name each native tensor has there, and which layout. One table serves both directions, so what is
written is what is read. Two cases are not one to one: rows of several native tensors in one foreign tensor, and the FP8
scales of a layer in one pickled state.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from cistron.errors import CheckpointError
from cistron.models.evo2 import fp8_state
from cistron.models.evo2.config import ATTENTION, Evo2Config
from cistron.models.evo2.forms import NamedTensors, TensorStream
from cistron.models.evo2.model import Evo2
from cistron.models.sources import TensorSource

logger = logging.getLogger(__name__)

_NAMES_SHOWN: Final = 5
_KEPT_LEAVES: Final = frozenset({"skip", "inv_freq"})
"""Tensors that the model uses in fp32, but that lose nothing by staying in the narrower dtype they are stored in."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """A format's names and layouts for the tensors of one configuration.

    Attributes:
        name: maps a native name to the format's, or to None where it has no place; several native names may share one,
            whose rows then are theirs in order. FP8 scales share the name of their layer's state.
        encode: lays a native tensor out as the format does, by its native name.
        decode: undoes `encode`.
        dropped: names that hold no weights; they are left out.
        copies: names under which the format may repeat a tensor, and the name of that tensor.
    """

    name: Callable[[str], str | None]
    encode: Callable[[str, torch.Tensor], torch.Tensor]
    decode: Callable[[str, torch.Tensor], torch.Tensor]
    dropped: re.Pattern[str]
    copies: Mapping[str, str] = field(default_factory=dict)


def stored_scales(
    config: Evo2Config, spelling: Spelling, source: TensorSource, path: Path
) -> dict[int, tuple[float, float]] | None:
    """Return the FP8 scales in a checkpoint by layer, or None; see :func:`fp8_state.read_scales`."""
    states = {}
    for index, symbol in enumerate(config.layer_pattern):
        if symbol != ATTENTION:
            name = _state_name(spelling, index)
            # Distributed checkpoints append the number of the shard.
            found = [source.streams[key] for key in source.streams if key == name or key.startswith(f"{name}/")]
            states[index] = [data for read in found for data in read()]
    return fp8_state.read_scales(states, path=path)


def read_native(
    config: Evo2Config,
    spelling: Spelling,
    source: TensorSource,
    *,
    path: Path,
    scales: Mapping[int, tuple[float, float]] | None = None,
) -> TensorStream:
    """Return the native tensors of a checkpoint, each loaded when it is asked for.

    Names and shapes are checked before the first one is. Factors of filters are fp32 whatever they are stored in.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
    """
    model = Evo2(config, device="meta", dtype=torch.bfloat16)
    like = {name: tensor for name, tensor in model.state_dict().items() if not _is_scale(name)}
    foreign = _by_foreign_name(spelling, like)
    states = {_state_name(spelling, index) for index in scales or ()}
    _check_names(source, foreign.keys(), states, spelling, path)
    for name, natives in foreign.items():
        expected = _assembled([spelling.encode(native, like[native]) for native in natives]).shape
        if source.shapes[name] != expected:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(source.shapes[name])}, the configuration says {list(expected)}"
            )
    widened = frozenset(name for name in model.fp32_names if name.rpartition(".")[2] not in _KEPT_LEAVES)
    return _loaded(spelling, source, foreign, like, scales or {}, widened, path)


def write_foreign(config: Evo2Config, spelling: Spelling, tensors: NamedTensors) -> TensorStream:
    """Turn a stream of native tensors into the format's, holding back only what shares a name.

    FP8 states come last: they have any number of bytes, and would misalign what follows them in a file.
    """
    groups = _by_foreign_name(spelling, Evo2(config, device="meta").state_dict())
    waiting: dict[str, torch.Tensor] = {}
    states: dict[str, torch.Tensor] = {}
    for native, tensor in tensors:
        name = spelling.name(native)
        assert name is not None, f"{native} has no place in the format"
        waiting[native] = tensor if _is_scale(native) else spelling.encode(native, tensor)
        if all(member in waiting for member in groups[name]):
            pieces = {member: waiting.pop(member) for member in groups[name]}
            if _is_scale(native):
                states[name] = _state(pieces)
            else:
                yield name, _assembled(list(pieces.values()))
    yield from states.items()


def foreign_names(config: Evo2Config, spelling: Spelling) -> list[str]:
    """Return the names that :func:`write_foreign` yields."""
    return list(_by_foreign_name(spelling, Evo2(config, device="meta").state_dict()))


def rows_by_head(config: Evo2Config, tensor: torch.Tensor) -> torch.Tensor:
    """Reorder attention's rows from (q|k|v, head, channel), the native order, to (head, q|k|v, channel)."""
    return tensor.unflatten(0, (3, config.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)  # type: ignore[no-untyped-call]


def rows_by_kind(config: Evo2Config, tensor: torch.Tensor) -> torch.Tensor:
    """Undo :func:`rows_by_head`."""
    return tensor.unflatten(0, (config.num_attention_heads, 3, -1)).transpose(0, 1).flatten(0, 2)  # type: ignore[no-untyped-call]


def _loaded(
    spelling: Spelling,
    source: TensorSource,
    foreign: Mapping[str, list[str]],
    like: Mapping[str, torch.Tensor],
    scales: Mapping[int, tuple[float, float]],
    widened: frozenset[str],
    path: Path,
) -> TensorStream:
    for name, natives in foreign.items():
        tensor = source.load(name)
        _check_copies(spelling, source, name, tensor, path)
        rows = [spelling.encode(native, like[native]).shape[0] for native in natives]
        for native, piece in zip(natives, torch.split(tensor, rows) if len(rows) > 1 else [tensor], strict=True):
            decoded = spelling.decode(native, piece)
            yield native, decoded.float() if native in widened else decoded
    for index, pair in scales.items():
        for leaf, value in zip(fp8_state.STATE_NAMES, pair, strict=True):
            yield f"blocks.{index}.{leaf}", torch.tensor(value, dtype=torch.float32)


def _by_foreign_name(spelling: Spelling, natives: Collection[str]) -> dict[str, list[str]]:
    """Return the native names that make up each foreign tensor, in order."""
    groups: dict[str, list[str]] = {}
    for native in natives:
        if (name := spelling.name(native)) is not None:
            groups.setdefault(name, []).append(native)
    return groups


def _assembled(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _state_name(spelling: Spelling, index: int) -> str:
    """Return the name of a Hyena layer's FP8 state."""
    name = spelling.name(f"blocks.{index}.{fp8_state.INPUT_SCALE}")
    assert name is not None, "a format that has no FP8 states still names them, to read them"
    return name


def _state(scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
    by_leaf = {name.rpartition(".")[2]: scale for name, scale in scales.items()}
    return fp8_state.make_state(by_leaf["input_scale"], by_leaf["weight_scale"])


def _is_scale(native: str) -> bool:
    return native.endswith(fp8_state.STATE_NAMES)


def _check_names(
    source: TensorSource, expected: Collection[str], states: Collection[str], spelling: Spelling, path: Path
) -> None:
    """Refuse missing and unexpected tensors; say which known extras are dropped."""
    present = set(source.shapes)
    others = {name for name in {*present, *source.streams} - {*expected} if name.partition("/")[0] not in states}
    dropped = sorted(name for name in others if spelling.dropped.fullmatch(name))
    if dropped:
        logger.info("%s: dropping %d entries that are no weights, such as %s", path, len(dropped), dropped[0])
    for fault, names in (
        ("missing", set(expected) - present),
        ("unexpected", others - {*dropped, *spelling.copies}),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
            raise CheckpointError(f"{path}: {fault} tensor {', '.join(listed[:_NAMES_SHOWN])}{more}")


def _check_copies(spelling: Spelling, source: TensorSource, name: str, tensor: torch.Tensor, path: Path) -> None:
    """Compare what the format repeats."""
    for copy, original in spelling.copies.items():
        if original == name and copy in source.shapes and not torch.equal(tensor, source.load(copy)):
            raise CheckpointError(f"{path}: {copy} differs from {name}, but tie_embeddings says that they are one")
