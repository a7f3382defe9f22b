"""Files that are complete or absent."""

import os
from pathlib import Path

import pytest

from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.files import check_writable, make_folder, write_text, written_aside


def test_text_is_replaced_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two ü")
    assert path.read_text(encoding="utf-8") == "two ü"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, folder):
    path = tmp_path / "thing"
    write_text(path, "before")

    def interrupted():
        with written_aside(path) as aside:
            if folder:
                aside.mkdir()
                (aside / "part").write_text("half")
            else:
                aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_whole_folder_is_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("")
    with written_aside(tmp_path / "set") as aside:
        aside.mkdir()
        (aside / "new").write_text("")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("")
    with pytest.raises(EnvironmentFailed, match="Is a directory"):
        write_text(tmp_path / "set", "text")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_an_interruption_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("")
    replace = os.replace

    def replace_and_stop(source, target):
        replace(source, target)
        if source == tmp_path / "set":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_stop)
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "set") as aside:
        aside.mkdir()
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_folders_made_for_a_file_that_failed_go_again(tmp_path):
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "a" / "b" / "file"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_says_so_and_devices_are_not_replaced():
    with pytest.raises(EnvironmentFailed, match="/dev/full: No space left on device; free some space"):
        write_text(Path("/dev/full"), "x" * 10000)
    assert Path("/dev/full").is_char_device()


def test_null_device_can_be_written():
    write_text(Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()


def test_a_folder_to_write_is_looked_at_and_not_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "deeper")
    with pytest.raises(InputError, match=f"file/deeper: {tmp_path}/file is a file, not a folder"):
        check_writable(tmp_path / "file" / "deeper")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(EnvironmentFailed, match=f"new: no permission to write in {tmp_path}; choose another"):
        check_writable(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is in the way"):
        make_folder(tmp_path / "file")
    with pytest.raises(InputError, match="file is in the way"):
        write_text(tmp_path / "file" / "deeper", "text")
