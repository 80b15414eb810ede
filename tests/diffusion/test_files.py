import errno
import hashlib
import os
import stat

import pytest

from diffusion.errors import AntherError
from diffusion.files import atomic, sha256


def test_a_finished_file_takes_its_name(tmp_path):
    path = tmp_path / "deep" / "er" / "table.csv"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".csv"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def fail(temporary, error):
    temporary.write_text("half of the new")
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "model.pt"
    path.write_text("old")
    kind = AntherError if isinstance(error, OSError) else error
    with pytest.raises(kind), atomic(str(path)) as temporary:
        fail(temporary, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        pytest.raises(AntherError, match=r"cannot write .*a\.png: No space left on device; free some space"),
        atomic(tmp_path / "a.png"),
    ):
        raise OSError(errno.ENOSPC, "full")


def test_an_error_without_a_number_is_no_disk_error(tmp_path):
    # PIL raises plain OSErrors, e.g. for a mode that PNG cannot hold.
    with pytest.raises(OSError, match="cannot write mode"), atomic(tmp_path / "a.png"):
        raise OSError("cannot write mode F as PNG")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AntherError, match=r"cannot write .*choose another folder"), atomic(tmp_path / "file" / "a.png"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(AntherError, match="Permission denied"), atomic(tmp_path / "a.png"):
            pytest.fail("the block must not run")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_of_that_name(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(AntherError, match="cannot write"), atomic(tmp_path / "a.png") as temporary:
        temporary.write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_results_are_as_readable_as_other_files(tmp_path):
    with atomic(tmp_path / "ours") as temporary:
        temporary.write_text("x")
    (tmp_path / "plain").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert len(modes) == 1


def test_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
