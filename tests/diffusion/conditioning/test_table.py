import csv
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.conditioning.table import EmbeddingTable, match_rows
from diffusion.errors import AntherError

PATHS = [f"data/cropped/{'roses' if k % 2 else 'daisy'}/{k}.jpg" for k in range(6)]
ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def typical(parity):
    """The row of a class with the greatest mean cosine to its class, one pair at a time."""
    rows = ROWS[parity::2]
    cosine = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows]
    return rows[np.argmax(np.mean(cosine, 1))]


def write_csv(path, names=PATHS, rows=ROWS, key="path"):
    lines = [",".join([key, *(f"e{k}" for k in range(rows.shape[1]))])]
    lines += [",".join([f'"{name}"', *map(repr, map(float, row))]) for name, row in zip(names, rows, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_npz(path, names=PATHS, rows=ROWS, key="path"):
    np.savez(path, **{key: np.array(names), "embedding": rows.astype(np.float16)})
    return path


@pytest.mark.parametrize("write", [write_csv, write_npz])
def test_rows_belong_to_their_images_in_any_order(tmp_path, make_table, write):
    order = [3, 0, 5, 1, 4, 2]
    suffix = ".csv" if write is write_csv else ".npz"
    path = write(tmp_path / f"clip{suffix}", [PATHS[k] for k in order], ROWS[order])
    conditioner = EmbeddingTable(path)
    conditioner.prepare(make_table())
    rows = conditioner.lookup({"index": torch.tensor([5, 0, 1])})
    torch.testing.assert_close(rows, torch.from_numpy(ROWS[[5, 0, 1]]), rtol=1e-3, atol=1e-3)
    assert rows.dtype == torch.float32
    assert conditioner.dim == 4


@pytest.mark.parametrize(
    ("names", "paths", "found"),
    [
        (["daisy/1.jpg"], ["x/daisy/1.jpg"], [0]),
        (["x/daisy/1.jpg"], ["daisy/1.jpg"], [0]),
        (["images/1.jpg"], ["roses/2.jpg", "daisy/1.jpg"], [1]),
        (["daisy/1.jpg", "roses/1.jpg"], ["a/roses/1.jpg", "a/daisy/1.jpg"], [1, 0]),
        (["1.jpg"], ["roses/1.jpg", "daisy/1.jpg"], [None]),  # which one?
        (["a/1.jpg", "b/1.jpg"], ["roses/1.jpg"], [None, None]),  # one row for two images
        (["daisy/1.jpg"], ["a/daisy/1.jpg", "b/daisy/1.jpg"], [None]),
        (["a/daisy/1.jpg"], ["a/daisy/1.jpg", "b/daisy/1.jpg"], [0]),
        (["daisy/1.jpg"], ["daisy/11.jpg"], [None]),
    ],
)
def test_matching(names, paths, found):
    assert match_rows(names, paths) == found


def test_the_courses_own_file_has_no_header(tmp_path, make_table):
    path = tmp_path / "clip.csv"
    with path.open("w", newline="") as file:  # its notebook: writer.writerow([path] + embedding)
        csv.writer(file).writerows([name, *map(float, row)] for name, row in zip(PATHS, ROWS, strict=True))
    conditioner = EmbeddingTable(path)
    conditioner.prepare(make_table())
    torch.testing.assert_close(conditioner.lookup({"index": torch.arange(6)}), torch.from_numpy(ROWS))


def test_a_header_of_other_names_is_no_row(tmp_path):
    (tmp_path / "clip.csv").write_text("path,0,1,2\nroses/1.jpg,1,2,3\n")  # as pandas writes whole numbers
    with pytest.raises(AntherError, match="no columns e0, e1"):
        _ = EmbeddingTable(tmp_path / "clip.csv").dim


def test_paths_of_windows(tmp_path, make_table):
    path = write_csv(tmp_path / "clip.csv", [p.replace("/", "\\") for p in PATHS])
    conditioner = EmbeddingTable(path)
    conditioner.prepare(make_table())
    torch.testing.assert_close(conditioner.lookup({"index": torch.arange(6)}), torch.from_numpy(ROWS))
    assert conditioner.encode(["a rose"]).shape == (1, 4)


def test_images_without_a_row_are_counted_and_named(tmp_path, make_table):
    table = make_table(n=8)
    with pytest.raises(AntherError, match=r"2 of 8 images \(first: daisy/6.jpg, roses/7.jpg\)"):
        EmbeddingTable(write_csv(tmp_path / "clip.csv")).prepare(table)


def test_a_class_in_the_prompt_is_its_most_typical_row_without_prepare(tmp_path):
    conditioner = EmbeddingTable(write_csv(tmp_path / "clip.csv"))
    rows = conditioner.encode(["a red rose", "daisies"])
    torch.testing.assert_close(rows, torch.from_numpy(np.stack([typical(1), typical(0)])))
    with pytest.raises(AntherError, match=r"no text encoder.*daisy, roses"):
        conditioner.encode(["a tulip"])


@pytest.mark.parametrize("write", [write_csv, write_npz])
def test_prompts_with_their_own_embedding(tmp_path, write):
    suffix = ".csv" if write is write_csv else ".npz"
    prompts = write(tmp_path / f"prompts{suffix}", ["a tulip, yellow", "a rose"], ROWS[:2] + 1, key="prompt")
    conditioner = EmbeddingTable(write_csv(tmp_path / "clip.csv"), prompts=prompts)
    rows = conditioner.encode(["a rose", "a tulip, yellow", "roses"])
    expected = np.stack([ROWS[1] + 1, ROWS[0] + 1, typical(1)])
    torch.testing.assert_close(rows, torch.from_numpy(expected), rtol=2e-3, atol=2e-3)


def test_prompts_mapped_to_classes(tmp_path):
    path = write_csv(tmp_path / "clip.csv")
    rows = EmbeddingTable(path, prompts={"la vie en rose et marguerite": "daisy"}).encode(
        ["la vie en rose et marguerite"]
    )
    torch.testing.assert_close(rows[0], torch.from_numpy(typical(0)))
    with pytest.raises(AntherError, match=r"tulips.*daisy, roses"):
        EmbeddingTable(path, prompts={"x": "tulips"}).encode(["x"])


def test_prompts_of_another_width(tmp_path):
    prompts = write_csv(tmp_path / "prompts.csv", ["a"], ROWS[:1, :3], key="prompt")
    with pytest.raises(AntherError, match="3 numbers"):
        EmbeddingTable(write_csv(tmp_path / "clip.csv"), prompts=prompts).encode(["a"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "path,label\na,b\n",
        "file,e0\na,1\n",
        "path,e0,e1\na,1\n",
        "path,e0\na,one\n",
        "path,e0\n",
        "path,e0\na,nan\n",
    ],
)
def test_malformed_files_are_one_sentence(tmp_path, content):
    path = tmp_path / "clip.csv"
    path.write_text(content)
    with pytest.raises(AntherError) as error:
        _ = EmbeddingTable(path).dim
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_archives(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    np.savez(tmp_path / "pickled.npz", path=np.array([object()]), embedding=ROWS[:1])
    for name in ("nowhere.csv", "x.npz", "pickled.npz"):
        with pytest.raises(AntherError, match=name):
            _ = EmbeddingTable(tmp_path / name).dim


@pytest.mark.skipif(not os.environ.get("ANTHER_TEST_DATA"), reason="needs ANTHER_TEST_DATA")
def test_the_real_table_conditions_photos_on_their_species(make_table):
    path = Path(os.environ["ANTHER_TEST_DATA"]) / "cropped_flowers_clip_vitb16.npz"
    conditioner = EmbeddingTable(path)
    assert conditioner.dim == 512
    with np.load(path) as file:
        names, rows = file["path"], file["embedding"].astype(np.float32)
    chosen = [1500, 3, 700, 1972]
    tails = tuple(str(names[k]).split("/", 1)[1] for k in chosen)  # daisy/100.jpg
    table = dataclasses.replace(make_table(n=4), names=tails)
    conditioner.prepare(table)
    assert torch.equal(conditioner.lookup({"index": torch.arange(4)}), torch.from_numpy(rows[chosen]))
    means = torch.nn.functional.normalize(conditioner.encode(["a daisy", "a photo of a rose", "sunflowers"]))
    nearest = (torch.nn.functional.normalize(torch.from_numpy(rows)) @ means.T).argmax(1)
    species = torch.tensor([("daisy", "roses", "sunflowers").index(str(n).split("/")[1]) for n in names])
    assert (nearest == species).float().mean() > 0.95
