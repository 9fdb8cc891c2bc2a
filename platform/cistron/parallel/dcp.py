"""Torch's distributed checkpoints on any storage that Cistron can name: local folders and object stores alike."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter

from cistron.io import storage


class _ArrowFiles(FileSystemBase):
    """A pyarrow file system as DCP wants to see one."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem) -> None:
        self._filesystem = filesystem

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if "w" in mode:
            with self._filesystem.open_output_stream(os.fspath(path)) as stream:
                yield stream
        else:
            with self._filesystem.open_input_file(os.fspath(path)) as stream:
                yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._filesystem.move(os.fspath(path), os.fspath(new_path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._filesystem.create_dir(os.fspath(path), recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        del checkpoint_id
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._filesystem.get_file_info(os.fspath(path)).type != pyarrow.fs.FileType.NotFound

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._filesystem.delete_file(os.fspath(path))

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [info.path for info in self._filesystem.get_file_info(pyarrow.fs.FileSelector(os.fspath(path)))]


class StorageWriter(FileSystemWriter):
    """Writes one file per rank and the metadata below `directory`, a path or URL."""

    def __init__(self, directory: str) -> None:
        filesystem, path = storage.resolve(directory)
        super().__init__(path, sync_files=False)
        self.fs: Any = _ArrowFiles(filesystem)
        self.path = path


class StorageReader(FileSystemReader):
    """Reads what :class:`StorageWriter` wrote; each rank fetches only its shards."""

    def __init__(self, directory: str) -> None:
        filesystem, path = storage.resolve(directory)
        super().__init__(path)
        self.fs: Any = _ArrowFiles(filesystem)
        self.path = path
