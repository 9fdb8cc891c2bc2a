"""How another format stores the tensors of an ESM-2, and the translation of streams of them in both directions.

A format is a table: each tensor of a file, and the native tensors that it is made of. Formats repeat some tensors under
several names (the tied embedding, one copy of the rotary frequencies per layer), and one packs three into one. Reading
is strict before anything is loaded: names and shapes must be those that the configuration asks for. Values are passed
on as stored, the rotary frequencies included, which published files hold rounded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import torch

from cistron.errors import CheckpointError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2, rotary_frequencies
from cistron.models.sources import TensorSource

logger = logging.getLogger(__name__)

NamedTensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]
TensorStream: TypeAlias = Iterator[tuple[str, torch.Tensor]]

EMBEDDING: Final = "esm.embeddings.word_embeddings.weight"
INV_FREQ: Final = "esm.rotary_embeddings.inv_freq"
CONTACT_HEAD: Final = ("esm.contact_head.regression.weight", "esm.contact_head.regression.bias")

_NAMES_SHOWN: Final = 5


def _only(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0]


def _alone(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return [tensor]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        natives: native names of what it holds.
        required: a file without it is refused.
        written: it is part of the files that we write, not only of some that we read.
        pack: makes it of the native tensors.
        unpack: undoes `pack`.
    """

    natives: tuple[str, ...]
    required: bool = True
    written: bool = True
    pack: Callable[[Sequence[torch.Tensor]], torch.Tensor] = _only
    unpack: Callable[[torch.Tensor], Sequence[torch.Tensor]] = _alone


@dataclass(frozen=True, slots=True)
class Spelling:
    """A format's tensors for one configuration.

    Attributes:
        entries: every tensor that a file must or may hold, by its name there. Entries of the same natives are copies.
        unused: names that a file may hold and that ESM-2 does not read.
    """

    entries: Mapping[str, Entry]
    unused: re.Pattern[str] = re.compile(r"(?!)")

    def written_groups(self) -> dict[tuple[str, ...], list[str]]:
        """Return the names to write, copies together, by the native tensors that they hold."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, entry in self.entries.items():
            if entry.written:
                groups.setdefault(entry.natives, []).append(name)
        return groups


def weight_names(config: Esm2Config) -> list[str]:
    """Return the native names of what every format holds: all but the rotary frequencies and the contact head."""
    return [name for name in Esm2(config, device="meta").state_dict() if name not in (INV_FREQ, *CONTACT_HEAD)]


def renamed(source: TensorSource, rename: Callable[[str], str], *, path: Path) -> TensorSource:
    """Return `source` under other names.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    originals: dict[str, str] = {}
    for name in source.shapes:
        if (new := rename(name)) in originals:
            raise CheckpointError(f"{path}: {name} and {originals[new]} are two spellings of one tensor")
        originals[new] = name
    shapes = {new: source.shapes[name] for new, name in originals.items()}
    return replace(source, shapes=shapes, load=lambda name: source.load(originals[name]))


def joined(first: TensorSource, second: TensorSource) -> TensorSource:
    """Return the tensors of two files as one source, with the notes of the first."""
    shapes = {**second.shapes, **first.shapes}
    return replace(first, shapes=shapes, load=lambda name: (first if name in first.shapes else second).load(name))


def read_native(source: TensorSource, spelling: Spelling, config: Esm2Config, *, path: Path) -> TensorStream:
    """Return the native tensors of `config`, each loaded when it is asked for.

    The contact head and the rotary frequencies may be absent where the format says so: the head becomes zeros, which
    :meth:`Esm2.predict_contacts` refuses by name, and the frequencies are computed.

    Raises:
        CheckpointError: at once for a tensor that is missing, unexpected or of another shape than `config` says;
            while iterating for two stored copies of one tensor that differ.
    """
    unused = sorted(name for name in source.shapes if name not in spelling.entries and spelling.unused.fullmatch(name))
    if unused:
        logger.info("%s: dropping what ESM-2 does not read: %s", path, _listed(unused))
    present = source.shapes.keys() - set(unused)
    _refuse("missing", {name for name, entry in spelling.entries.items() if entry.required} - present, path)
    _refuse("unexpected", present - spelling.entries.keys(), path)
    like = Esm2(config, device="meta").state_dict()
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, entry in spelling.entries.items():
        if name in present:
            _check_shape(name, source.shapes[name], entry.pack([like[native] for native in entry.natives]).shape, path)
            groups.setdefault(entry.natives, []).append(name)
    found = {native for natives in groups for native in natives}
    if found & set(CONTACT_HEAD):
        _refuse("missing", set(CONTACT_HEAD) - found, path)
    return _loaded(source, spelling, groups, config, path)


def write_foreign(spelling: Spelling, tensors: NamedTensors, *, copies: bool = True) -> TensorStream:
    """Turn a stream of native tensors into the format's, holding back only what goes into one tensor.

    Args:
        spelling: the format's; native tensors that it has no place for are left out.
        tensors: native names and tensors.
        copies: repeat a tensor under each of its names, and not under the first only.
    """
    groups = spelling.written_groups()
    group_of = {native: natives for natives in groups for native in natives}
    waiting: dict[str, torch.Tensor] = {}
    for native, tensor in tensors:
        if (natives := group_of.get(native)) is None:
            continue
        waiting[native] = tensor
        if all(member in waiting for member in natives):
            names = groups[natives]
            packed = spelling.entries[names[0]].pack([waiting.pop(member) for member in natives])
            for name in names if copies else names[:1]:
                yield name, packed


def _loaded(
    source: TensorSource,
    spelling: Spelling,
    groups: Mapping[tuple[str, ...], list[str]],
    config: Esm2Config,
    path: Path,
) -> TensorStream:
    """Yield the tensors in the model's order, whatever the format's."""
    group_of = {native: natives for natives in groups for native in natives}
    ready: dict[str, torch.Tensor] = {}
    for native, like in Esm2(config, device="meta").state_dict().items():
        if native not in group_of:
            yield native, _made(native, like, config, path)
            continue
        if native not in ready:
            names = groups[group_of[native]]
            tensor = _agreed(source, names, path)
            ready |= zip(group_of[native], spelling.entries[names[0]].unpack(tensor), strict=True)
            del tensor
        yield native, ready.pop(native)


def _made(native: str, like: torch.Tensor, config: Esm2Config, path: Path) -> torch.Tensor:
    """Return a tensor that a file may do without."""
    if native == INV_FREQ:
        logger.warning("%s stores no rotary frequencies; computing them in fp32", path)
        return rotary_frequencies(config)
    if native == CONTACT_HEAD[0]:
        logger.warning("%s has no contact head; scores and embeddings work, predict_contacts will not", path)
    return torch.zeros(like.shape)


def _agreed(source: TensorSource, names: Sequence[str], path: Path) -> torch.Tensor:
    """Load a tensor that may be stored several times, and insist that the copies are equal."""
    first, *others = names
    tensor = source.load(first)
    for other in others:
        if not torch.equal(tensor, source.load(other)):
            raise CheckpointError(f"{path}: {other} must equal {first}, but differs; ESM-2 shares this tensor")
    return tensor


def _check_shape(name: str, got: torch.Size, expected: torch.Size, path: Path) -> None:
    if got != expected:
        raise CheckpointError(f"{path}: tensor {name} has shape {list(got)}, the configuration says {list(expected)}")


def _refuse(fault: str, names: Collection[str], path: Path) -> None:
    """Raise when there are `names`, and list the first of them."""
    if names:
        raise CheckpointError(f"{path}: {fault} tensor {_listed(sorted(names))}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{', '.join(names[:_NAMES_SHOWN])}{more}"
