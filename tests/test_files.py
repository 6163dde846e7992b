"""A file is there as a whole, or as it was before."""

import os
from pathlib import Path

import pytest

from apt_backbones.files import write_atomically


@pytest.mark.parametrize("content", ["ä\n", "ä\n".encode(), lambda path: path.write_text("ä\n")])
def test_text_bytes_and_savers_replace_a_file(tmp_path, content):
    for _ in range(2):
        assert write_atomically(str(tmp_path / "new" / "x.json"), content) == tmp_path / "new" / "x.json"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
        assert (tmp_path / "new" / "x.json").read_bytes() == "ä\n".encode()


def test_a_saver_gets_a_path_of_the_same_suffix_and_folder(tmp_path):
    given = []
    write_atomically(tmp_path / "x.mp4", lambda path: given.append(path) or path.touch())
    assert given[0].suffix == ".mp4" and given[0].parent == tmp_path and given[0].name != "x.mp4"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def fails(path: Path) -> None:
        path.write_text("half")
        raise error

    write_atomically(tmp_path / "x", "old")
    with pytest.raises(error):
        write_atomically(tmp_path / "x", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_files_have_the_permissions_of_other_new_files(tmp_path):
    (tmp_path / "other").touch()
    write_atomically(tmp_path / "x", b"")
    write_atomically(tmp_path / "saved", lambda path: path.unlink() or os.close(os.open(path, os.O_CREAT, 0o600)))
    assert {os.stat(tmp_path / name).st_mode for name in ("x", "saved")} == {os.stat(tmp_path / "other").st_mode}
