"""Records: whole or absent, in the order of the ids, and readable as they were written."""

import errno
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffusion.curation import records
from diffusion.errors import AntherError

N = 4


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(N):
        Image.new("RGB", (2, 2)).save(tmp_path / f"images/{k:06d}.png")
    return tmp_path


def frame():
    return pd.DataFrame(
        {
            "id": [f"{k:06d}" for k in range(N)],
            "prompt": ["a rose", "two", "a rose", "two"],
            "label": ["roses", None, "roses", None],
            "seed": range(N),
            "guidance_weight": None,
            "file": [f"images/{k:06d}.png" for k in range(N)],
        }
    )


def test_what_is_written_is_read_and_sorted_by_id(folder):
    records.write(folder, frame().iloc[[2, 0, 3, 1]])
    got = records.read(folder)
    assert got["id"].tolist() == ["000000", "000001", "000002", "000003"]
    assert got["prompt"].tolist() == ["a rose", "two", "a rose", "two"]
    assert got["label"].tolist() == ["roses", None, "roses", None]  # not NaN, which is what pandas reads
    assert got["seed"].tolist() == [0, 1, 2, 3]
    assert got["guidance_weight"].tolist() == [None] * N
    assert list(pd.read_parquet(folder / "records.parquet").index) == list(range(N))


def test_columns_are_added_and_replaced_in_the_order_of_the_ids(folder):
    records.write(folder, frame())
    # An index that runs the other way, by which pandas would align.
    backwards = pd.Series([0.1, 0.2, 0.3, 0.4], index=range(N)[::-1])
    columns = {"clip_score": backwards, "uniqueness": np.array([1, 0.5, 0.25, 0], np.float32)}
    got = records.with_columns(folder, columns)
    assert got["clip_score"].tolist() == [0.1, 0.2, 0.3, 0.4]
    got = records.with_columns(folder, {"clip_score": (4, 3, 2, 1), "nearest_real": ["a", "b", None, "c"]})
    assert got.equals(records.read(folder))
    assert got["clip_score"].tolist() == [4, 3, 2, 1]
    assert got["uniqueness"].tolist() == [1, 0.5, 0.25, 0]
    assert got["nearest_real"].tolist() == ["a", "b", None, "c"]
    assert got["label"].tolist() == ["roses", None, "roses", None]
    assert got["id"].tolist() == frame()["id"].tolist()


def test_metrics_go_with_the_records_that_they_were_of(folder, monkeypatch):
    records.write(folder, frame())
    metrics = folder / "metrics.json"
    metrics.write_text("{}")
    records.with_columns(folder, {"umap": [1, 2, 3, 4]})
    assert metrics.exists()

    def full(self, path, **settings):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(AntherError, match="free some space"):
            records.write(folder, frame())
    assert metrics.exists()
    records.write(folder, frame())
    assert not metrics.exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: f.assign(id="000000"), "3 records have the id of another one"),
        (lambda f: f.assign(file="images/000001.png"), "3 records have the file of another one"),
        (lambda f: f.assign(file=["images/000000.png", "images/000001.png", "x.png", "y.png"]), "2 of 4 .*x.png"),
        (lambda f: pd.concat([f, f]), "4 records have the id"),
    ],
)
def test_what_is_no_record_is_refused_and_the_old_file_stays(folder, spoil, says):
    records.write(folder, frame())
    before = (folder / "records.parquet").read_bytes()
    with pytest.raises(AntherError, match=says):
        records.write(folder, spoil(frame()))
    assert (folder / "records.parquet").read_bytes() == before


def test_a_column_of_another_length_changes_nothing(folder):
    records.write(folder, frame())
    with pytest.raises(ValueError, match="Length"):
        records.with_columns(folder, {"clip_score": [1.0, 2.0]})
    assert "clip_score" not in records.read(folder)


def test_missing_and_damaged_records_are_one_sentence(folder):
    with pytest.raises(AntherError, match=r"no records at .*records\.parquet"):
        records.read(folder)
    records.write(folder, frame())
    whole = (folder / "records.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"nonsense" * 100):
        (folder / "records.parquet").write_bytes(content)
        with pytest.raises(AntherError, match=r"records\.parquet is damaged"):
            records.read(folder)
    frame().drop(columns="file").to_parquet(folder / "records.parquet")
    with pytest.raises(AntherError, match="no column file"):
        records.read(folder)


@pytest.mark.parametrize("package", ["pandas", "pyarrow"])
def test_without_the_extra_the_message_says_what_to_install(folder, package, monkeypatch):
    table = frame()
    records.write(folder, table)
    monkeypatch.setitem(sys.modules, package, None)
    for act in (lambda: records.read(folder), lambda: records.write(folder, table)):
        with pytest.raises(AntherError, match=rf"{package}.*run pip install -e '\.\[eval\]' in the clone"):
            act()
