"""The manifest of a native checkpoint: which files belong to it, their sizes and sha256, and where they came from.

It is written last, so a folder with a manifest is a complete one, and a manifest that matches proves that what is read
is what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cistron.errors import CheckpointError, CheckpointNotFoundError

MANIFEST: Final = "manifest.json"
VERSION: Final = 1
"""Version of the native format; a reader refuses versions that it does not know."""


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path, provenance: Mapping[str, Any]) -> None:
    """Describe every file now in `directory` and write ``manifest.json`` there."""
    files = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }
    content = {"version": VERSION, "files": files, "provenance": dict(provenance)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a native checkpoint.

    Raises:
        CheckpointNotFoundError: there is no manifest.
        CheckpointError: it is not one that this version can read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{directory} has no {MANIFEST}, so it is not a finished Cistron checkpoint; bring other formats in with "
            "`cistron convert source=... source_format=... destination=...`"
        )
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: format version {manifest.get('version')!r}, this Cistron reads {VERSION}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(_is_entry(name, entry) for name, entry in entries.items()):
        raise CheckpointError(f"{path}: 'files' must map plain file names to their sha256 and bytes")
    return manifest


def verify_files(directory: Path, *, hashes: bool = True) -> None:
    """Compare every file with the manifest: presence and size, then (with `hashes`) the sha256.

    Raises:
        CheckpointNotFoundError: a listed file is missing.
        CheckpointError: a file has another size or content than the manifest says.
    """
    files: dict[str, dict[str, Any]] = read_manifest(directory)["files"]
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointNotFoundError(f"{path} is listed in {MANIFEST} but does not exist")
        size = path.stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "too long"
            raise CheckpointError(f"{path} is {kind}: {size:,} bytes, the manifest says {entry['bytes']:,}")
    for name, entry in files.items() if hashes else ():
        got = sha256(directory / name)
        if got != entry["sha256"]:
            raise CheckpointError(f"{directory / name}: sha256 is {got}, the manifest says {entry['sha256']}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def is_plain_name(name: object) -> bool:
    """Return whether `name` names a file inside the folder itself; anything else could reach outside."""
    return isinstance(name, str) and name == Path(name).name and name not in {"", ".", ".."}


def _is_entry(name: object, entry: object) -> bool:
    return is_plain_name(name) and isinstance(entry, dict) and {"sha256", "bytes"} <= entry.keys()
