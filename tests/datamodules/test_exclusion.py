import json
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.exclusion import Exclusion, read_exclusions, write_exclusions
from datamodules.folders import FolderImages, PlainFolder
from diffusion.errors import AntherError

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("iris", "rose"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(10):
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(tmp_path / "photos" / name / f"{k}.png")
    return tmp_path / "photos"


def ready(photos, exclude=None, kind=FolderImages, **options):
    options = {"split": {"train": 0.7, "val": 0.3}, "batch_size": 2, "seed": 0, "size": 8} | options
    module = kind(path=str(photos), exclude=None if exclude is None else str(exclude), **options)
    module.prepare_data()
    module.setup()
    return module


def members(module):
    return {split: {module.table.names[row] for row in rows} for split, rows in module.splits.items()}


def test_round_trip(tmp_path):
    lines = (
        Exclusion("a, b/é.jpg", "near_duplicate", 'differs by "2"', "c.jpg", "train"),
        Exclusion("d.jpg", "dark"),
        Exclusion(" a.jpg", "near_duplicate", kept="b.jpg "),
    )
    write_exclusions(tmp_path / "list.csv", lines)
    assert read_exclusions(tmp_path / "list.csv") == lines


def test_a_list_made_by_hand(tmp_path):
    (tmp_path / "list.csv").write_text("\ufeffname,reason\r\na.jpg, dark \r\n\r\nb.jpg\r\n,\r\n \r\n", "utf-8")
    assert read_exclusions(tmp_path / "list.csv") == (Exclusion("a.jpg", "dark"), Exclusion("b.jpg"))


def test_what_is_no_list(tmp_path, photos):
    with pytest.raises(AntherError, match=r"nowhere\.csv cannot be read \(No such file"):
        ready(photos, tmp_path / "nowhere.csv")
    (tmp_path / "list.csv").write_text("file,why\na,b\n")
    with pytest.raises(AntherError, match="has no column `name`"):
        ready(photos, tmp_path / "list.csv")
    (tmp_path / "list.csv").write_bytes(b"name\n\xff\xfe\x00")
    with pytest.raises(AntherError, match="cannot be read"):
        ready(photos, tmp_path / "list.csv")


def test_the_rest_keeps_its_split(tmp_path, photos):
    before = members(ready(photos))
    gone = {sorted(before["train"])[0]: "dark", sorted(before["train"])[3]: "blurry", sorted(before["val"])[1]: "dark"}
    write_exclusions(tmp_path / "list.csv", [Exclusion(name, reason) for name, reason in gone.items()])
    module = ready(photos, tmp_path / "list.csv")
    assert members(module) == {split: names - set(gone) for split, names in before.items()}
    assert module.excluded == gone
    assert f"12 train, 5 val images, 3×8×8, 2 classes (iris, rose); 3 left out by {tmp_path}" in module.describe()
    module.save_splits(tmp_path / "splits.json")
    record = json.loads((tmp_path / "splits.json").read_text())
    assert record["excluded"] == gone
    assert {split: set(names) for split, names in record["splits"].items()} == members(module)
    seen = [row for batch in module.train_dataloader() for row in batch["index"].tolist()]
    assert not {module.table.names[row] for row in seen} & set(gone)
    assert len(module.pixels("val")) == 5


def test_several_reasons_for_one_image_count_once(tmp_path, photos):
    write_exclusions(tmp_path / "list.csv", [Exclusion("iris/0.png", "dark"), Exclusion("iris/0.png", "blurry")])
    module = ready(photos, tmp_path / "list.csv")
    assert module.excluded == {"iris/0.png": "dark, blurry"}
    assert "; 1 left out" in module.describe()


def test_a_name_that_the_data_do_not_have(tmp_path, photos):
    write_exclusions(tmp_path / "list.csv", [Exclusion("iris/0.png"), Exclusion("iris/77.png")])
    with pytest.raises(AntherError, match=r"names iris/77\.png, which photos does not have: correct the list"):
        ready(photos, tmp_path / "list.csv")


def test_a_name_with_spaces_around_it(tmp_path, photos):
    (photos / "iris" / "4.png").rename(photos / "iris" / " 4.png")
    (photos / "iris").rename(photos / " iris")
    write_exclusions(tmp_path / "list.csv", [Exclusion(" iris/ 4.png", "dark")])
    module = ready(photos, tmp_path / "list.csv")
    assert sum(map(len, module.splits.values())) == 19
    write_exclusions(tmp_path / "list.csv", [Exclusion("iris/ 4.png "), Exclusion("iris/5.png")])
    with pytest.raises(AntherError, match=r"names 'iris/ 4\.png ', iris/5\.png, which photos does not have"):
        ready(photos, tmp_path / "list.csv")


def test_nothing_left(tmp_path, photos):
    gone = members(ready(photos))["val"]
    write_exclusions(tmp_path / "list.csv", [Exclusion(name) for name in gone])
    with pytest.raises(AntherError, match="leaves no image in val"):
        ready(photos, tmp_path / "list.csv")


def test_a_file_that_cannot_be_decoded_may_be_on_the_list(tmp_path, photos):
    (photos / "iris" / "3.png").write_bytes(b"no picture")
    write_exclusions(tmp_path / "list.csv", [Exclusion("iris/3.png", "unreadable")])
    module = ready(photos, tmp_path / "list.csv")
    assert len(module.table) == 19
    assert [fault.name for fault in module.table.unreadable] == ["iris/3.png"]
    (photos / "rose" / "4.png").write_bytes(b"no picture either")
    with pytest.raises(AntherError, match=r"1 of the image files cannot be decoded: .*rose/4\.png"):
        ready(photos, tmp_path / "list.csv")


def test_a_folder_without_classes(photos, tmp_path):
    (photos / "rose" / "deep").mkdir()
    (photos / "rose" / "9.png").rename(photos / "rose" / "deep" / "9.png")
    Image.new("RGB", (9, 9)).save(photos / "loose.jpg")
    Image.new("RGB", (9, 9)).save(photos / ".hidden.jpg")
    module = ready(photos, kind=PlainFolder, noun="flower")
    assert len(module.table) == 21
    assert module.describe() == "photos: 14 train, 7 val images, 3×8×8, 1 class (flower)"
    assert module.table.class_names == ("flower",)
    assert set(module.table.captions) == {"A photo of a flower"}
    assert module.table.labels.tolist() == [0] * 21
    assert {"loose.jpg", "rose/deep/9.png", "iris/0.png"} <= set(module.table.names)
    shutil.rmtree(photos / "rose")
    (photos / "iris" / "deeper").mkdir()
    assert len(ready(photos, kind=PlainFolder).table) == 11  # the image at the top, beside the only folder, too
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", photos)
    assert len(ready(archive, kind=PlainFolder).table) == 11
    for file in photos.rglob("*.*"):
        file.unlink()
    with pytest.raises(AntherError, match="holds no images"):
        ready(photos, kind=PlainFolder)


def test_a_closer_crop(photos):
    whole, close = ready(photos), ready(photos, crop=6)
    expected = whole.table.original(0).resize((8, 8), Image.Resampling.BICUBIC, box=(5, 3, 11, 9))
    assert np.array_equal(close.table.images[0].transpose(1, 2, 0), np.asarray(expected))
    assert close.table.digest != whole.table.digest
    assert np.array_equal(ready(photos, crop=500).table.images, whole.table.images)
    with pytest.raises(AntherError, match=r"data\.crop=0"):
        ready(photos, crop=0)
