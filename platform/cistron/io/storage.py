"""One set of verbs for local paths and object stores.

A path is a ``str`` or ``Path``: a local path, or a URL such as ``s3://bucket/key`` or ``file:///data``, understood by
:mod:`pyarrow.fs`. What a missing file means is decided here once: an ``InputError`` that names it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
from pyarrow import fs

from cistron.errors import InputError
from cistron.io.atomic import new_directory, new_file

PathLike: TypeAlias = str | Path

_HASH_CHUNK_BYTES = 8 << 20
_S3_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def resolve(path: PathLike) -> tuple[fs.FileSystem, str]:
    """Return the file system of `path` and the path inside it; a local path becomes absolute.

    Raises:
        InputError: an empty path, or a URL whose scheme is unknown or that lacks a part.
    """
    text = str(path)
    if not text:
        raise InputError("the path is empty")
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return _local(), str(Path(text).expanduser().absolute())
    host, slash, inner = rest.partition("/")
    file_system, root = _from_url(f"{scheme}://{host}{'/' if not host else ''}")
    return file_system, f"{root.rstrip('/')}{slash}{inner}".rstrip("/") or "/"


def absolute(path: PathLike) -> str:
    """Return a spelling of `path` that means the same in another process: a URL, or an absolute local path."""
    return str(path) if "://" in str(path) else resolve(path)[1]


def is_local(path: PathLike) -> bool:
    """Return whether `path` lies on this machine's file system."""
    return isinstance(resolve(path)[0], fs.LocalFileSystem)


def join(path: PathLike, *parts: str) -> str:
    """Return `path` with `parts` below it, a URL or a local path as `path` is."""
    return "/".join([str(path).rstrip("/"), *parts])


def name_of(path: PathLike) -> str:
    """Return the last part of `path`."""
    return str(path).rstrip("/").rpartition("/")[2]


def exists(path: PathLike) -> bool:
    """Return whether a file or folder is at `path`."""
    return _info(path).type != fs.FileType.NotFound


def is_directory(path: PathLike) -> bool:
    """Return whether a folder (for object stores: a prefix with objects below it) is at `path`."""
    return _info(path).type == fs.FileType.Directory


def file_size(path: PathLike) -> int:
    """Return the size of the file at `path` in bytes.

    Raises:
        InputError: there is no file.
    """
    info = _info(path)
    if info.type != fs.FileType.File:
        raise _no_file(path, info.type)
    return int(info.size)


def list_files(path: PathLike, *, recursive: bool = False) -> list[str]:
    """Return the paths of the files below the folder `path`, sorted, in the spelling of `path`.

    Raises:
        InputError: there is no such folder.
    """
    file_system, root = resolve(path)
    try:
        found = file_system.get_file_info(fs.FileSelector(root, recursive=recursive))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such folder") from error
    files = (info.path for info in found if info.type == fs.FileType.File)
    return sorted(join(path, file[len(root) :].lstrip("/")) for file in files)


def make_dirs(path: PathLike) -> None:
    """Create the folder `path` and those above it; existing ones are left alone."""
    file_system, inner = resolve(path)
    # Object stores have no folders; creating one leaves an empty marker object, or asks for bucket rights.
    if isinstance(file_system, fs.LocalFileSystem):
        file_system.create_dir(inner, recursive=True)


def remove_tree(path: PathLike) -> None:
    """Delete the file or folder at `path`; nothing there is not an error."""
    file_system, inner = resolve(path)
    kind = file_system.get_file_info(inner).type
    if kind == fs.FileType.Directory:
        file_system.delete_dir(inner)
    elif kind == fs.FileType.File:
        file_system.delete_file(inner)


def move(source: PathLike, destination: PathLike) -> None:
    """Rename a file or folder within one file system; a file at `destination` is replaced."""
    file_system, inner = resolve(source)
    file_system.move(inner, resolve(destination)[1])


def open_input(path: PathLike) -> pa.NativeFile:
    """Open the file at `path` for random access.

    Raises:
        InputError: there is no file.
    """
    file_system, inner = resolve(path)
    try:
        return file_system.open_input_file(inner)
    except OSError as error:
        kind = _info(path).type
        if kind == fs.FileType.File:
            raise
        raise _no_file(path, kind) from error


@contextlib.contextmanager
def open_output(path: PathLike) -> Iterator[pa.NativeFile]:
    """Write a file that appears at `path` whole or not at all; folders above it are made."""
    file_system, inner = resolve(path)
    if not isinstance(file_system, fs.LocalFileSystem):
        # An object appears when its stream is closed, so a failed upload is dropped by not closing it.
        stream = file_system.open_output_stream(inner, compression=None)
        yield stream
        stream.close()
        return
    with new_file(inner) as partial, file_system.open_output_stream(str(partial), compression=None) as stream:
        yield stream


@contextlib.contextmanager
def new_folder(path: PathLike) -> Iterator[str]:
    """Yield a folder to fill, which is at `path` when the block ends well and gone when it does not.

    On a local disk that is a hidden sibling, renamed at the end. An object store cannot rename: there it is `path`
    itself, so write last what makes the folder valid.

    Raises:
        InputError: `path` exists and is not an empty folder.
    """
    if is_local(path):
        with new_directory(resolve(path)[1]) as staging:
            yield str(staging)
        return
    if exists(path):
        raise InputError(f"destination {path} already exists; remove it or choose another")
    try:
        yield str(path)
    except BaseException:
        remove_tree(path)
        raise


def read_bytes(path: PathLike) -> bytes:
    """Return the content of the file at `path`."""
    with open_input(path) as stream:
        return bytes(stream.read())


def read_text(path: PathLike) -> str:
    """Return the content of the UTF-8 file at `path`."""
    return read_bytes(path).decode("utf-8")


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with open_output(path) as stream:
        stream.write(content)


def write_text(path: PathLike, content: str) -> None:
    """Write `content` to `path` as UTF-8, atomically."""
    write_bytes(path, content.encode("utf-8"))


def sha256(path: PathLike) -> str:
    """Return the SHA-256 of the file at `path`, in hexadecimal."""
    digest = hashlib.sha256()
    with open_input(path) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _local() -> fs.LocalFileSystem:
    return fs.LocalFileSystem(use_mmap=True)


@lru_cache(maxsize=32)
def _from_url(url: str) -> tuple[fs.FileSystem, str]:
    """Make the file system of a scheme and host once: a new S3 client costs tens of milliseconds."""
    if url == "file:///":
        return _local(), "/"
    scheme, _, host = url.partition("://")
    if scheme == "s3" and any(os.environ.get(name) for name in _S3_VARIABLES):
        # Where to go is known, so do not ask Amazon for the bucket's region: a private store is not there.
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return fs.S3FileSystem(region=region), host
    try:
        file_system, root = fs.FileSystem.from_uri(url)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: not a place that can be opened ({error})") from error
    return file_system, str(root)


def _info(path: PathLike) -> fs.FileInfo:
    file_system, inner = resolve(path)
    try:
        return file_system.get_file_info(inner)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return fs.FileInfo(inner, fs.FileType.NotFound)


def _no_file(path: PathLike, kind: fs.FileType) -> InputError:
    reason = "is a folder; a file is needed" if kind == fs.FileType.Directory else "no such file"
    return InputError(f"{path}: {reason}")
