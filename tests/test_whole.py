"""Files and folders that are whole or not there. Run: pytest tests/test_whole.py"""

import errno
import os
from pathlib import Path

import pytest

from align.whole import put_in_place, replace_file, write_file


def list_all(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_that_could_not_be_written_stays_as_it_was_and_is_named(tmp_path):
    def write_half(path):
        with replace_file(path) as partial:
            partial.write_text("ne")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    write_file(tmp_path / "results.json", "old")

    with pytest.raises(OSError, match=r"No space left on device: '.*/results\.json'"):
        write_half(tmp_path / "results.json")

    assert list_all(tmp_path) == {"results.json": "old"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((os.fstat(file).st_size, list_all(tmp_path))))

    write_file(tmp_path / "results.json", "whole")

    (size, there), *_ = flushed
    assert size == len("whole")
    assert "results.json" not in there
    assert list_all(tmp_path) == {"results.json": "whole"}


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_takes_the_place_of_another_one_and_nothing_is_beside_it(swaps, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if not swaps:
        monkeypatch.setattr("align.whole.swap_folders", refuse)
    for name in ("old", "new"):
        Path(tmp_path, name).mkdir()
        Path(tmp_path, name, "file").write_text(name)
    (tmp_path / ".old.previous").mkdir()
    (tmp_path / ".old.previous" / "file").write_text("what a kill has left")

    put_in_place(tmp_path / "new", tmp_path / "old")

    left = {".old.previous/file": "what a kill has left"} if swaps else {}
    assert list_all(tmp_path) == {"old/file": "new"} | left
