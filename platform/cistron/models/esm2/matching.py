"""A foreign file's tensors as native ones, once it is proven that all are there, of the right shape, and no others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

from cistron.errors import CheckpointError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2, rotary_frequencies
from cistron.models.esm2.names import CONTACT_HEAD, INV_FREQ, NameMap
from cistron.models.sources import TensorSource

logger = logging.getLogger(__name__)

_NAMES_SHOWN: Final = 5


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
    return TensorSource(
        shapes={new: source.shapes[name] for new, name in originals.items()},
        load=lambda name: source.load(originals[name]),
        metadata=source.metadata,
    )


def native_tensors(
    source: TensorSource, names: NameMap, config: Esm2Config, *, path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the native tensors of `config`, each loaded when it is asked for.

    Raises:
        CheckpointError: at once for a tensor that is missing, unexpected or of another shape than `config` says;
            while iterating for two stored copies of one tensor that differ.
    """
    known = names.required | names.optional
    present = [name for name in source.shapes if name not in names.ignored]
    _refuse("missing", names.required.keys() - set(present), path)
    _refuse("unexpected", set(present) - known.keys(), path)
    copies: dict[str, list[str]] = {}
    for name in present:
        copies.setdefault(known[name], []).append(name)
    if partial := [name for name in CONTACT_HEAD if name in copies]:
        _refuse("missing", set(CONTACT_HEAD) - set(partial), path)
    expected = Esm2(config, device="meta").state_dict()
    for native, spellings in copies.items():
        for name in spellings:
            _check_shape(name, source.shapes[name], expected[native].shape, path)
    return _load(source, copies, expected, config, path=path)


def _load(
    source: TensorSource,
    copies: Mapping[str, list[str]],
    expected: Mapping[str, torch.Tensor],
    config: Esm2Config,
    *,
    path: Path,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield one tensor per native name; copies are compared and absent optional ones made."""
    for native, like in expected.items():
        if native in copies:
            yield native, _agreed(source, copies[native], path)
        elif native == INV_FREQ:
            logger.warning("%s stores no rotary frequencies; computing them in fp32", path)
            yield native, rotary_frequencies(config)
        else:
            if native == CONTACT_HEAD[0]:
                logger.warning("%s has no contact head; scores and embeddings work, predict_contacts will not", path)
            yield native, torch.zeros(like.shape)


def _agreed(source: TensorSource, spellings: list[str], path: Path) -> torch.Tensor:
    """Load a tensor that may be stored several times, and insist that the copies are equal."""
    first, *others = spellings
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
        listed = sorted(names)
        more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
        raise CheckpointError(f"{path}: {fault} tensor {', '.join(listed[:_NAMES_SHOWN])}{more}")
