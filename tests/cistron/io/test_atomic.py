from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cistron.errors import InputError
from cistron.io.atomic import new_directory, new_file, new_files


def test_a_folder_appears_when_all_of_it_is_written(tmp_path: Path):
    destination = tmp_path / "deep" / "er"
    with new_directory(destination) as staging:
        (staging / "a").write_text("1")
        assert not destination.exists()
    assert (destination / "a").read_text() == "1"
    assert list(destination.parent.iterdir()) == [destination]


def test_a_file_is_replaced_when_the_new_one_is_written(tmp_path: Path):
    destination = tmp_path / "out.json"
    destination.write_text("old")
    with new_file(destination) as staging:
        staging.write_text("new")
        assert staging.suffix == ".json"
        assert destination.read_text() == "old"
    assert destination.read_text() == "new"
    assert list(tmp_path.iterdir()) == [destination]


def write_two(path: Path):
    with new_files(path) as staging:
        staging.write_text("1")
        staging.with_name("b.pt").write_text("2")
        assert staging.name == path.name
        assert not any(other.parent.samefile(path.parent) for other in (staging, staging.with_name("b.pt")))


def test_files_that_belong_together_appear_together(tmp_path: Path):
    write_two(tmp_path / "deep" / "a.pt")
    assert {path.name: path.read_text() for path in (tmp_path / "deep").iterdir()} == {"a.pt": "1", "b.pt": "2"}


@pytest.mark.parametrize("taken", ["a.pt", "b.pt"])
def test_no_file_of_several_is_replaced(taken: str, tmp_path: Path):
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match=f"{taken} already exists"):
        write_two(tmp_path / "a.pt")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {taken: "mine"}


def write_and_fail(create: Callable[[Path], AbstractContextManager[Path]], path: Path, error: type[BaseException]):
    with create(path) as staging:
        target = staging / "a" if staging.is_dir() else staging
        target.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_things_as_they_were(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "file").write_text("old")
    for create, name in (
        (new_directory, "folder"),
        (new_file, "file"),
        (new_file, "new/deep/file"),
        (new_files, "new/files"),
    ):
        with pytest.raises(error):
            write_and_fail(create, tmp_path / name, error)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_is_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(InputError, match="full already exists"), new_directory(tmp_path / "full"):
        pass
    with pytest.raises(InputError, match="full is a folder"), new_file(tmp_path / "full"):
        pass
    assert (tmp_path / "full" / "a").read_text() == "mine"


def test_a_failure_keeps_a_new_folder_that_others_use_by_now(tmp_path: Path):
    def fail_late():
        with new_file(tmp_path / "shared" / "mine"):
            (tmp_path / "shared" / "theirs").write_text("1")
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        fail_late()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["theirs"]
