"""Checkpoints of a run: ``checkpoints/step=N/{dcp|deepspeed}/`` and a manifest that is written last.

A folder without a manifest is a torn one and does not exist for anybody. The manifest holds what continuing needs
beside the sharded state: the data cursor, every rank's random state, how many ranks there were, which corpus, and the
settings; and it lists the files with their sizes, so that damage is found before a worker starts.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from pyarrow import fs

from cistron.errors import CheckpointError
from cistron.io import storage

MANIFEST: Final = "manifest.json"
VERSION: Final = 1
_STEP: Final = re.compile(r"step=(\d+)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` of a checkpoint says.

    Attributes:
        step: optimiser steps done.
        cursor: samples consumed over all ranks.
        tokens: tokens trained on over all ranks.
        world_size: ranks that wrote the checkpoint.
        folder: ``dcp`` or ``deepspeed``.
        rng: each rank's random state, in rank order.
        config: the resolved settings.
        corpus: fingerprint of the corpus.
        files: size in bytes of each file, by its path below the checkpoint; filled in when the manifest is written.
        version: of this layout.
    """

    step: int
    cursor: int
    tokens: int
    world_size: int
    folder: str
    rng: tuple[Mapping[str, str], ...]
    config: Mapping[str, Any]
    corpus: str
    files: Mapping[str, int] = field(default_factory=dict)
    version: int = VERSION


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_dir: str) -> None:
        self._root = storage.join(run_dir, "checkpoints")

    @staticmethod
    def name(step: int) -> str:
        """Return the checkpoint's path inside the run folder."""
        return f"checkpoints/step={step}"

    def directory(self, step: int) -> str:
        """Return the folder of the checkpoint of `step`."""
        return storage.join(self._root, f"step={step}")

    def latest(self) -> Manifest | None:
        """Return the manifest of the newest complete checkpoint, or None.

        Raises:
            CheckpointError: its manifest cannot be read.
        """
        complete = [step for step in self._steps() if self._is_complete(step)]
        return self.read(max(complete)) if complete else None

    def read(self, step: int) -> Manifest:
        """Return the manifest of one checkpoint.

        Raises:
            CheckpointError: it is not one that this version can read.
        """
        path = storage.join(self.directory(step), MANIFEST)
        try:
            content = json.loads(storage.read_text(path))
            if content.get("version") != VERSION:
                raise CheckpointError(f"{path}: version {content.get('version')!r}, this Cistron reads {VERSION}")
            return Manifest(**{**content, "rng": tuple(content["rng"])})
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); {self._way_out(step)}") from error

    def write(self, manifest: Manifest) -> None:
        """Declare the checkpoint of ``manifest.step`` complete, with the files that are there."""
        manifest = replace(manifest, files=self._sizes(manifest.step))
        path = storage.join(self.directory(manifest.step), MANIFEST)
        storage.write_text(path, json.dumps(asdict(manifest), indent=1) + "\n")

    def verify(self, manifest: Manifest) -> None:
        """Check that every file of a checkpoint is there in its full size.

        Raises:
            CheckpointError: one is not; names it.
        """
        found = self._sizes(manifest.step)
        for file, size in manifest.files.items():
            if found.get(file) != size:
                path = storage.join(self.directory(manifest.step), file)
                state = f"{found[file]:,} bytes instead of {size:,}" if file in found else "missing"
                raise CheckpointError(f"{path}: {state}; {self._way_out(manifest.step)}")

    def prune(self, keep: int) -> None:
        """Delete all complete checkpoints but the newest `keep`; the manifest goes first."""
        for step in [step for step in self._steps() if self._is_complete(step)][:-keep]:
            storage.remove_tree(storage.join(self.directory(step), MANIFEST))
            storage.remove_tree(self.directory(step))

    def discard_torn(self) -> None:
        """Delete checkpoints whose writing was cut short."""
        for step in self._steps():
            if not self._is_complete(step):
                storage.remove_tree(self.directory(step))

    def _is_complete(self, step: int) -> bool:
        return storage.exists(storage.join(self.directory(step), MANIFEST))

    def _way_out(self, step: int) -> str:
        return f"remove {self.directory(step)} to resume from the checkpoint before it"

    def _sizes(self, step: int) -> dict[str, int]:
        filesystem, path = storage.resolve(self.directory(step))
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        sizes = {info.path[len(path) + 1 :]: info.size for info in found if info.type == fs.FileType.File}
        return {file: sizes[file] for file in sorted(sizes) if file != MANIFEST}

    def _steps(self) -> list[int]:
        filesystem, path = storage.resolve(self._root)
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        matches = (_STEP.fullmatch(info.base_name) for info in found if info.type == fs.FileType.Directory)
        return sorted(int(match.group(1)) for match in matches if match)


def random_state(device: torch.device) -> dict[str, str]:
    """Return this process's random state as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """Undo what happened to the random state since :func:`random_state`; devices not in `states` are left alone."""
    decoded = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)
