import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusion import images
from diffusion.images import PngFiles, from_uint8, grid, read_pngs, save_gif, save_png, sheet, to_pil, to_uint8

LEVELS = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_levels_survive_the_round_trip(dtype):
    floats = from_uint8(LEVELS)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[-1]) == (-1, 1)
    assert torch.equal(to_uint8(floats.to(dtype)), LEVELS)


def test_levels_are_evenly_spaced():
    torch.testing.assert_close(from_uint8(LEVELS).diff(), torch.full((255,), 2 / 255), rtol=0, atol=1e-6)


def test_rounds_to_the_nearest_level():
    for shift in (-0.49, 0.49):
        shifted = ((LEVELS.double() + shift) / 127.5 - 1).clamp(-1, 1)
        assert torch.equal(to_uint8(shifted), LEVELS)


def test_clamps_instead_of_wrapping():
    assert to_uint8(torch.tensor([-5.0, -1.01, 1.01, 3.0])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    pixels = torch.randint(0, 256, (channels, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_png(from_uint8(pixels), tmp_path / "new" / "image.png")
    with Image.open(tmp_path / "new" / "image.png") as picture:
        assert picture.format == "PNG"
        assert picture.mode == ("L" if channels == 1 else "RGB")
        assert picture.size == (24, 16)
        back = np.asarray(picture).reshape(16, 24, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(back, pixels.numpy())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["image.png"]


def test_to_pil_leaves_its_input_alone():
    image = torch.full((3, 4, 4), 1.5, requires_grad=True)
    assert to_pil(image).getpixel((0, 0)) == (255, 255, 255)
    assert (image == 1.5).all()


def test_grid_is_row_major_with_white_between():
    n, h, w, pad = 5, 4, 6, 3
    cells = torch.linspace(-1, 0.9, n).view(n, 1, 1, 1).expand(n, 3, h, w)
    sheet = grid(cells, columns=2, padding=pad)
    assert sheet.shape == (3, 3 * (h + pad) + pad, 2 * (w + pad) + pad)
    seen = torch.zeros(sheet.shape[1:], dtype=torch.bool)
    for k in range(n):
        row, column = divmod(k, 2)
        area = (
            slice(pad + row * (h + pad), (row + 1) * (h + pad)),
            slice(pad + column * (w + pad), (column + 1) * (w + pad)),
        )
        assert torch.equal(sheet[(slice(None), *area)], cells[k])
        seen[area] = True
    assert (sheet[:, ~seen] == 1).all()


def test_grid_repeats_pixels():
    image = torch.tensor([[[[-1.0, 0.0], [0.5, 1.0]]]])
    sheet = grid(image, columns=1, padding=0, scale=3)
    assert torch.equal(sheet, torch.kron(image[0], torch.ones(1, 3, 3)))


def test_captions_are_not_broken_at_an_equals_sign(monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda self, place, text, **how: drawn.append(text))
    sheet(torch.zeros(3, 3, 24, 24), ["a red rose, w = 0", "two white daisies, w = 7.5", "a daisy"], 3)
    assert drawn == ["a red rose,\nw = 0", "two white\ndaisies,\nw = 7.5", "a daisy"]


def test_gif_frames_and_durations(tmp_path):
    frames = [torch.full((3, 8, 8), value) for value in (-1.0, -0.3, 0.4, 1.0)]
    save_gif(frames, tmp_path / "walk.gif", ms=50, last_ms=1000)
    with Image.open(tmp_path / "walk.gif") as movie:
        assert movie.n_frames == 4
        assert movie.info["loop"] == 0
        for k, frame in enumerate(frames):
            movie.seek(k)
            assert movie.info["duration"] == (1000 if k == 3 else 50)
            assert movie.convert("RGB").getpixel((4, 4))[0] == pytest.approx(to_uint8(frame)[0, 0, 0].item(), abs=2)


def test_a_failing_writer_leaves_nothing(tmp_path, monkeypatch):
    def fail(image):
        raise RuntimeError("no picture")

    monkeypatch.setattr(images, "to_pil", fail)
    with pytest.raises(RuntimeError):
        save_png(torch.zeros(3, 4, 4), tmp_path / "image.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_to_their_reader_what_a_tensor_is(tmp_path, channels, monkeypatch):
    pixels = torch.randint(0, 256, (5, channels, 6, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        save_png(from_uint8(image), path)
    read = []
    monkeypatch.setattr(images, "read_pngs", lambda some: read.extend(some) or read_pngs(some))
    files = PngFiles(paths)
    assert (files.shape, len(files)) == (pixels.shape, 5)
    del read[:]
    assert torch.equal(files[1:3], pixels[1:3])
    assert torch.equal(files[4], pixels[4])
    assert torch.equal(files[-1], pixels[4])
    chosen = files[np.array([3, 0, 3])]
    assert len(read) == 2 + 1 + 1 + 1  # of a choice only the first file, for its size
    assert torch.equal(chosen[:], pixels[[3, 0, 3]])
