"""A writer that was given up and goes on later leaves no trace in what a later epoch makes at the same path."""

import contextlib
import os

import pytest

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.room import ROOM, OtherRoom, make_room, room


def write(here, name, data):
    with here.created(name) as file:
        os.write(file, data)


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_files_and_words_lie_where_they_are_said_to(tmp_path):
    path = tmp_path / "steps" / "7"
    make_room(path, 3)
    with room(path, 3) as here:
        for name in ("state/params.w/c/0/0", "state/params.w/c/0/1", "top"):
            write(here, name, name.encode())
        here.sync()
        here.say("process-0.json", {"a": [1]})
    assert files(path) == sorted([ROOM, "process-0.json", "state/params.w/c/0/0", "state/params.w/c/0/1", "top"])
    assert (path / "state/params.w/c/0/1").read_bytes() == b"state/params.w/c/0/1"
    assert (path / "process-0.json").read_text() == '{"a": [1]}\n'


def test_a_late_writer_finds_its_folder_gone(tmp_path):
    """Wherever it stood: amid a file, before another one, before its word."""
    path = tmp_path / "7"
    make_room(path, 1)
    with room(path, 1) as old:
        write(old, "state/w/c/0", b"old")
        stack = contextlib.ExitStack()
        amid = stack.enter_context(old.created("state/w/c/1"))
        make_room(path, 2)
        with room(path, 2) as new:
            write(new, "state/w/c/0", b"new")
        os.write(amid, b"old")
        stack.close()
        for late in (
            lambda: write(old, "state/w/c/0", b""),
            lambda: write(old, "state/w/c/2", b""),
            lambda: write(old, "state/v/c/0", b""),
            lambda: write(old, "top", b""),
            lambda: old.say("process-0.json", {}),
        ):
            with pytest.raises(FileNotFoundError):
                late()
    assert files(path) == [ROOM, "state/w/c/0"]
    assert (path / "state/w/c/0").read_bytes() == b"new"


def test_a_file_that_an_older_step_has_too_is_not_written_over(tmp_path):
    """As where the same order is obeyed twice."""
    older = tmp_path / "older"
    older.write_bytes(b"older")
    make_room(tmp_path / "7", 1)
    with room(tmp_path / "7", 1) as here:
        name, folder = here.place("state/w/c/0")
        os.link(older, name, dst_dir_fd=folder)
        write(here, "state/w/c/0", b"new")
    assert (older.read_bytes(), (tmp_path / "7/state/w/c/0").read_bytes()) == (b"older", b"new")


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"epoch": "2"}', '{"epoch": 3}', "null"])
def test_a_folder_of_another_epoch_is_left_alone(tmp_path, text):
    path = tmp_path / "7"
    make_room(path, 2)
    if text is None:
        (path / ROOM).unlink()
    else:
        (path / ROOM).write_text(text)
    with pytest.raises(OtherRoom, match=r"epoch"), room(path, 2):
        pytest.fail("it was let in")


def test_there_has_to_be_one(tmp_path):
    with pytest.raises(FileNotFoundError), room(tmp_path / "7", 2):
        pytest.fail("it was let in")


def test_a_room_is_no_step_and_is_swept(tmp_path):
    make_room(tmp_path / "7", 2)
    assert layout.list_steps(tmp_path) == []
    assert layout.sweep(tmp_path) == ["7"]
    assert not (tmp_path / "7").exists()
