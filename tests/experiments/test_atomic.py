"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

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


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (SafetensorError("I/O error: Permission denied (os error 13)"), False),
    ],
    ids=str,
)
def test_each_error_has_its_own_remedy(tmp_path: Path, error: Exception, is_full: bool) -> None:
    """Who might not write was told to make room; and in another folder nothing goes on."""
    with pytest.raises(ExperimentError) as raised, atomic.new_file(tmp_path / "file"):
        raise error
    message = str(raised.value)
    assert ("free some space" in message) is is_full
    assert ("choose another folder" in message) is not is_full
    assert ("starts from scratch" in message) is not is_full
