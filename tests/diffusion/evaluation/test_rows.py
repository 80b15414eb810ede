import os

import numpy as np
import pytest

from diffusion.errors import AntherError
from diffusion.evaluation.rows import Derived, Rows, parts

PREADV = os.preadv


@pytest.fixture
def array():
    return np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)


@pytest.fixture(params=["appended", "npy"])
def rows(request, array, tmp_path):
    if request.param == "npy":
        np.save(tmp_path / "rows.npy", array)
        return Rows.of_npy(tmp_path / "rows.npy")
    found = Rows.scratch(tmp_path, 3)
    for part in parts(11, 4):
        found.append(array[part].astype(np.float64))
    return found


def test_rows_are_read_as_those_of_an_array(rows, array):
    assert (rows.shape, len(rows)) == ((11, 3), 11)
    for index in (slice(None), slice(4, 9), slice(9, 40), slice(5, 5), [7, 0, 7], np.array([10, 3]), np.zeros(0, int)):
        np.testing.assert_array_equal(rows[index], array[index])
    np.testing.assert_array_equal(np.asarray(rows), array)
    assert rows[2:4].dtype == np.float32


def test_what_is_no_row_is_an_error(rows):
    for index in ([11], [-1]):
        with pytest.raises(IndexError, match="of 11"):
            rows[index]
    with pytest.raises(ValueError, match="one after the other"):
        rows[::2]


def test_a_scratch_file_leaves_nothing_behind(tmp_path, array):
    rows = Rows.scratch(tmp_path, 3)
    rows.append(array)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AntherError, match="cannot write into"):
        Rows.scratch(tmp_path / "none", 3)


def test_later_axes_are_flattened(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "rows.npy", array)
    np.testing.assert_array_equal(Rows.of_npy(tmp_path / "rows.npy")[:], array.reshape(2, 12))


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.asfortranarray(np.zeros((2, 3), np.float32))])
def test_other_arrays_are_refused(array, tmp_path):
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(ValueError, match="no rows of float32"):
        Rows.of_npy(tmp_path / "rows.npy")


def test_rows_come_whole_though_the_system_reads_less_at_a_time(tmp_path, array, monkeypatch):
    np.save(tmp_path / "rows.npy", array)
    monkeypatch.setattr(os, "preadv", lambda file, parts, place: PREADV(file, [parts[0][:100]], place))
    np.testing.assert_array_equal(Rows.of_npy(tmp_path / "rows.npy")[:], array)


def test_a_file_that_became_shorter_is_noticed(tmp_path, array):
    np.save(tmp_path / "rows.npy", array)
    rows = Rows.of_npy(tmp_path / "rows.npy")
    content = (tmp_path / "rows.npy").read_bytes()
    (tmp_path / "rows.npy").write_bytes(content[:-8])
    np.testing.assert_array_equal(rows[:10], array[:10])
    with pytest.raises(AntherError, match="became shorter"):
        rows[:]


def test_derived_rows_are_computed_when_they_are_read(array):
    seen = []
    rows = Derived(array, lambda part: seen.append(len(part)) or part[:, :2] * 2, 2)
    assert (rows.shape, len(rows), seen) == ((11, 2), 11, [])
    np.testing.assert_array_equal(rows[3:5], array[3:5, :2] * 2)
    np.testing.assert_array_equal(rows[[8, 1]], array[[8, 1], :2] * 2)
    assert seen == [2, 2]


def test_parts_are_all_rows_once():
    assert list(parts(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(parts(0, 3)) == []
