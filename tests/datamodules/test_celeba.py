import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CelebA as Reference

from datamodules.celeba import CelebA, read_attributes, read_partition
from diffusion.errors import AntherError

N = 12
NAMES = ("5_o_Clock_Shadow", "Male", "Smiling", "Young")


pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def write_files(tmp_path):
    """The files of the authors, in their formats, for twelve images of 178 x 218."""
    folder = tmp_path / "data" / "celeba"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{k:06d}.jpg" for k in range(1, N + 1)]
    parts = [0, 0, 2, 0, 1, 0, 2, 0, 0, 1, 0, 2]
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, parts, strict=True)))
    lines = [f"{name}  {' '.join(f'{sign:2d}' for sign in rng.choice([-1, 1], len(NAMES)))}" for name in names]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(N), " ".join(NAMES) + " ", *lines]) + "\n")
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for name in names:
            small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
            small.resize((178, 218)).save(tmp_path / name)
            archive.write(tmp_path / name, f"img_align_celeba/{name}")
    return folder


def ready(path, **options):
    module = CelebA(path=str(path), **{"batch_size": 2, "seed": 0, "size": 16} | options)
    module.prepare_data()
    module.setup()
    return module


def test_partition_and_attributes_as_torchvision_reads_them(files, monkeypatch):
    for name, columns in (("identity_CelebA", 1), ("list_bbox_celeba", 4), ("list_landmarks_align_celeba", 10)):
        head = "" if columns == 1 else f"{N}\nnames\n"
        lines = [f"{k:06d}.jpg " + " ".join(["1"] * columns) for k in range(1, N + 1)]
        (files / f"{name}.txt").write_text(head + "\n".join(lines) + "\n")
    monkeypatch.setattr(Reference, "_check_integrity", lambda self: True)
    module = ready(files.parent)
    for split in ("train", "val", "test"):
        reference = Reference(files.parent, "valid" if split == "val" else split)
        rows = module.splits[split]
        assert [module.table.names[row] for row in rows] == list(reference.filename)
        assert np.array_equal(module.table.attributes[rows].numpy(), reference.attr.numpy().astype(bool))
        assert module.table.attribute_names == tuple(filter(None, reference.attr_names))
    assert module.table.class_names == ("face",)


def test_the_square_in_the_middle(files):
    table = ready(files).table
    original = Image.open(files.parents[1] / "000001.jpg")
    assert original.size == (178, 218)
    square = original.resize((16, 16), Image.Resampling.BICUBIC, box=(0, 20, 178, 198))
    assert np.array_equal(table.images[0].transpose(1, 2, 0), np.asarray(square))
    closer = original.resize((16, 16), Image.Resampling.BICUBIC, box=(19, 39, 159, 179))
    assert np.array_equal(ready(files, crop=140).table.images[0].transpose(1, 2, 0), np.asarray(closer))
    # Each has its own cache.
    between = original.resize((16, 16), Image.Resampling.BICUBIC, box=(29, 49, 149, 169))
    assert np.array_equal(ready(files, crop=120).table.images[0].transpose(1, 2, 0), np.asarray(between))


def test_an_unpacked_folder_gives_the_same_table(files):
    packed = ready(files)
    with zipfile.ZipFile(files / "img_align_celeba.zip") as archive:
        archive.extractall(files)
    (files / "img_align_celeba.zip").unlink()
    assert ready(files).table.digest == packed.table.digest
    (files / "img_align_celeba").rename(files / "inner")
    (files / "img_align_celeba").mkdir()
    (files / "inner").rename(files / "img_align_celeba" / "img_align_celeba")
    assert ready(files).table.digest == packed.table.digest


def test_attributes_stay_with_their_images_when_one_cannot_be_decoded(files):
    whole = ready(files)
    with zipfile.ZipFile(files / "img_align_celeba.zip") as archive:
        archive.extractall(files)
    (files / "img_align_celeba" / "000002.jpg").write_bytes(b"")
    module = ready(files, on_corrupt="skip")
    assert [fault.name for fault in module.table.unreadable] == ["000002.jpg"]
    assert module.table.attributes.tolist() == [row for k, row in enumerate(whole.table.attributes.tolist()) if k != 1]
    names = {split: [module.table.names[row] for row in rows] for split, rows in module.splits.items()}
    assert names["val"] == ["000005.jpg", "000010.jpg"]
    assert names["test"] == ["000003.jpg", "000007.jpg", "000012.jpg"]


def test_an_attribute_as_two_classes(files):
    module = ready(files, attribute="5_o_Clock_Shadow")
    assert module.class_names == ("not 5 o clock shadow", "5 o clock shadow")
    assert module.table.labels.tolist() == module.table.attributes[:, 0].long().tolist()
    assert module.table.captions == tuple(module.class_names[label] for label in module.table.labels)
    with pytest.raises(
        AntherError, match=r"data\.attribute=Happy is none of CelebA's: choose from 5_o_Clock_Shadow, Male"
    ):
        ready(files, attribute="Happy")


@pytest.mark.parametrize("name", ["img_align_celeba.zip", "list_eval_partition.txt", "list_attr_celeba.txt"])
def test_what_is_missing_is_named_with_its_checksum(files, name):
    (files / name).unlink()
    with pytest.raises(
        AntherError, match=f"CelebA's {name} is not in {files}: download it from https.* sha256 [0-9a-f]{{64}}"
    ):
        ready(files)


def test_damaged_lists(files):
    partition, attributes = files / "list_eval_partition.txt", files / "list_attr_celeba.txt"
    whole = attributes.read_text()
    for damage, said in (
        (whole[: len(whole) // 2].rsplit("\n", 1)[0] + "\n", "is cut off"),
        (whole.replace(" 1", " 7", 1), "has no 4 values of 1 or -1"),
        ("", "is cut off"),
    ):
        attributes.write_text(damage)
        with pytest.raises(AntherError, match=said):
            read_attributes(attributes)
    attributes.write_text(whole.replace("000003.jpg", "900003.jpg"))
    with pytest.raises(AntherError, match=r"has no line for 000003\.jpg"):
        ready(files)
    partition.write_text("000001.jpg 0\n000002.jpg 3\n")
    with pytest.raises(AntherError, match=r"line 2 of .* is '000002.jpg 3' and not like"):
        read_partition(partition)
    partition.write_text("000001.jpg 0\n000099.jpg 1\n")
    with pytest.raises(AntherError, match=r"1 of the 2 images .*such as 000099\.jpg"):
        ready(Path(files))
    partition.write_text("000001.jpg 0\n000002.jpg 1\n000001.jpg 2\n")
    with pytest.raises(AntherError, match=r"line 3 of .* names 000001\.jpg a second time"):
        read_partition(partition)


def test_a_partition_that_is_cut_at_the_end_of_a_line(files):
    partition = files / "list_eval_partition.txt"
    lines = partition.read_text().splitlines(keepends=True)
    partition.write_text("".join(lines[:7]))
    said = (
        r"list_eval_partition\.txt has no line for 5 of the 12 images in .*, such as 000008\.jpg: get it again "
        r"\(the authors' has 2,836,386 bytes, this one 91\)"
    )
    with pytest.raises(AntherError, match=said):
        ready(files)
    # A part of the images on purpose: the list and the folder agree.
    with zipfile.ZipFile(files / "img_align_celeba.zip") as archive:
        archive.extractall(files, [f"img_align_celeba/{line.split()[0]}" for line in lines[:7]])
    (files / "img_align_celeba" / ".000008.jpg").write_bytes(b"")  # hidden files do not count
    assert {split: len(rows) for split, rows in ready(files).splits.items()} == {"train": 4, "val": 1, "test": 2}


def test_an_archive_of_other_images(files):
    with zipfile.ZipFile(files / "img_align_celeba.zip", "a") as archive:
        archive.writestr("img_align_celeba/photo.jpg", b"")
    with pytest.raises(AntherError, match=r"no line for 1 of the 13 images in .*, such as photo\.jpg: "):
        ready(files)


@pytest.mark.parametrize("moved", [0, 1])
def test_the_whole_of_celeba_has_the_parts_of_the_authors(tmp_path, moved):
    parts = np.repeat([0, 1, 2], [162_770 - moved, 19_867 + moved, 19_962])
    path = tmp_path / "list_eval_partition.txt"
    path.write_text("".join(f"{k:06d}.jpg {part}\n" for k, part in enumerate(parts, 1)))
    if not moved:
        assert path.stat().st_size >= 202_599 * 13
        assert len(read_partition(path)) == 202_599
        return
    said = r"is damaged, since its parts have 162,769 / 19,868 / 19,962 images and not 162,770 / 19,867 / 19,962 as"
    with pytest.raises(AntherError, match=said):
        read_partition(path)
