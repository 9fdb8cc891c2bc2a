from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs

from cistron.errors import InputError
from cistron.io import storage


@pytest.fixture
def bucket(monkeypatch):
    """Pretend that every s3:// URL leads to one object store in memory, which has no renaming of folders."""
    memory = fs._MockFileSystem()
    monkeypatch.setattr(storage, "_from_url", lambda url: (memory, url.partition("://")[2].rstrip("/")))
    memory.create_dir("bucket")
    return memory


@pytest.fixture(params=["path", "file url", "s3"])
def root(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return "s3://bucket/run"
    return tmp_path if request.param == "path" else tmp_path.as_uri()


def test_bytes_and_text_round_trip(root):
    file = storage.join(root, "a", "b.txt")
    if str(root).startswith("s3"):
        storage.resolve(root)[0].create_dir("bucket/run/a")
    assert not storage.exists(file)
    storage.write_text(file, "Grüße")
    assert storage.read_text(file) == "Grüße"
    storage.write_bytes(file, b"new")
    assert storage.read_bytes(file) == b"new"
    assert storage.file_size(file) == 3
    assert storage.sha256(file) == hashlib.sha256(b"new").hexdigest()
    assert storage.is_directory(storage.join(root, "a"))
    assert not storage.is_directory(file)
    assert storage.list_files(root) == []
    assert storage.list_files(root, recursive=True) == [file]
    storage.move(file, storage.join(root, "c.txt"))
    assert storage.list_files(root) == [storage.join(root, "c.txt")]
    storage.remove_tree(storage.join(root, "c.txt"))
    storage.remove_tree(root)
    storage.remove_tree(root)
    assert not storage.exists(root)


def test_missing_things_are_named(root):
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        storage.read_bytes(storage.join(root, "none.txt"))
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        storage.file_size(storage.join(root, "none.txt"))
    with pytest.raises(InputError, match="none: no such folder"):
        storage.list_files(storage.join(root, "none"))


def test_a_folder_is_not_a_file(tmp_path):
    for read in (storage.read_bytes, storage.file_size):
        with pytest.raises(InputError, match="is a folder; a file is needed"):
            read(tmp_path)


def test_resolve_and_join(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("x/y")[1] == str(tmp_path / "x" / "y")
    assert storage.resolve(f"file://{tmp_path}/x")[1] == str(tmp_path / "x")
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
    assert storage.join("s3://bucket/x/", "y", "z") == "s3://bucket/x/y/z"
    assert storage.join(Path("a"), "b") == "a/b"
    assert storage.name_of("s3://bucket/x/y.fa") == "y.fa"
    assert storage.is_local("x")


def test_s3_urls_reach_the_s3_file_system(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    file_system, path = storage.resolve("s3://bucket/folder/key.parquet")
    assert isinstance(file_system, fs.S3FileSystem)
    assert file_system.region == "eu-west-1"
    assert path == "bucket/folder/key.parquet"
    assert storage.resolve("s3://bucket/other")[0] is file_system


@pytest.mark.parametrize("path", ["", "gopher://host/x"])
def test_paths_that_cannot_be_opened(path):
    with pytest.raises(InputError):
        storage.resolve(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"old")

    def write():
        with storage.open_output(file) as stream:
            stream.write(b"new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert file.read_bytes() == b"old"


def test_new_folder_appears_whole_or_not_at_all(root):
    if str(root).startswith("s3"):
        storage.resolve(root)[0].create_dir("bucket")
    target = storage.join(root, "out")

    def fill(fail):
        with storage.new_folder(target) as folder:
            file_system, inner = storage.resolve(folder)
            file_system.create_dir(inner)
            storage.write_text(storage.join(folder, "x"), "1")
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill(True)
    assert not storage.exists(target)
    fill(False)
    assert storage.read_text(storage.join(target, "x")) == "1"
    with pytest.raises(InputError, match="out already exists"):
        fill(False)
    assert storage.list_files(root, recursive=True) == [storage.join(target, "x")]


def test_native_file_is_random_access(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    with storage.open_input(tmp_path / "x") as stream:
        assert isinstance(stream, pa.NativeFile)
        stream.seek(4)
        assert stream.read(2) == b"45"


def test_a_name_that_no_file_can_have_does_not_exist(tmp_path):
    assert not storage.exists(tmp_path / ("ACGT" * 200))
