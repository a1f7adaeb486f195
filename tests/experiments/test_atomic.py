"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from experiments import atomic
from experiments.errors import ExperimentError


def test_a_folder_that_another_process_makes_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with atomic.new_folder(folder) as partial:
        (partial / "ours").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    file.write_text("what was there")
    for new, path in ((atomic.new_folder, folder), (atomic.new_file, file)):
        with (
            pytest.raises(ExperimentError, match=f"{path.name}: could not be written .No space"),
            new(path),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert file.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [file]
