"""Generation: every image is that of its seed and prompt, and no stop and no number of processes can be seen in it."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffusion.curation import records
from diffusion.errors import AntherError
from diffusion.evaluation.embeddings import Embedding, open_rows, sample_embedded
from diffusion.evaluation.generate import Plan, assemble, check, claim, generate
from diffusion.guidance import Guidance
from diffusion.images import to_uint8
from diffusion.samplers import DDIM, DDPM
from tests.callbacks.tiny_training import module

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ("a daisy", "two roses", "tulips")
PLAN = Plan(
    prompts=PROMPTS,
    labels=("daisy", "roses", None),
    num_images=10,
    first_seed=100,
    weight=2.0,
    sampler=DDPM(),
    sampler_record={"_target_": "diffusion.samplers.DDPM"},
    T=10,
    batch_size=3,
    embedding=Embedding(),
    checkpoint_sha256="ab" * 32,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the process that is killed: sums depend on how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return module().eval()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder that was made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert generate(model, PLAN, folder).images == 10
    assemble(PLAN, folder)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder, k):
    return np.asarray(Image.open(folder / f"images/{k:06d}.png")).astype(int)


class StoppedError(Exception):
    pass


class StopsAfter(DDPM):
    """A DDPM that fails after k draws."""

    def __init__(self, k):
        super().__init__()
        self.left = k

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left < 0:
            raise StoppedError
        return super().__call__(*args, **options)


def test_guidance_of_the_plan_reaches_the_images(model, whole, tmp_path):
    guidance = Guidance((0.5, 3), 0.7)
    plan = replace(PLAN, num_images=2, guidance=guidance)
    generate(model, plan, tmp_path)
    drawn = model.sample(PROMPTS[:2], [100, 101], 2.0, DDPM(), guidance=guidance)
    for k, image in enumerate(to_uint8(drawn)):
        assert np.abs(pixels(tmp_path, k) - image.permute(1, 2, 0).numpy()).max() <= 1
        assert np.abs(pixels(tmp_path, k) - pixels(whole, k)).max() > 1


# What is made --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_image_k_is_of_its_seed_and_prompt_in_any_batch_split(model, whole, batch_size, tmp_path):
    plan = replace(PLAN, batch_size=batch_size)
    generate(model, plan, tmp_path)
    assemble(plan, tmp_path)
    rows = np.load(tmp_path / "embeddings.npy")
    assert rows.dtype == np.float32
    assert rows.shape == (10, 32)
    for k in range(10):
        image, row = sample_embedded(model, Embedding(), [PROMPTS[k % 3]], [100 + k], 2.0, DDPM())
        wanted = to_uint8(image[0]).permute(1, 2, 0).numpy().astype(int)
        # Equal to rounding of the network's own arithmetic, which may depend on the batch.
        assert np.abs(pixels(tmp_path, k) - wanted).max() <= 1
        np.testing.assert_allclose(rows[k], row[0], rtol=1e-3, atol=1e-4)
    assert sorted(files(tmp_path)) == sorted(files(whole))


def test_the_records_say_how_each_image_was_made(whole):
    frame = records.read(whole)
    assert list(frame.columns) == [
        *("id", "prompt", "label", "seed", "guidance_weight", "sampler", "steps", "checkpoint", "file")
    ]
    assert frame["id"].tolist() == [f"{k:06d}" for k in range(10)]
    assert frame["prompt"].tolist() == [*PROMPTS, *PROMPTS, *PROMPTS, PROMPTS[0]]
    assert frame["label"].tolist() == [*("daisy", "roses", None) * 3, "daisy"]
    assert frame["seed"].tolist() == list(range(100, 110))
    assert frame["file"].tolist() == [f"images/{k:06d}.png" for k in range(10)]
    alike = frame[["guidance_weight", "sampler", "steps", "checkpoint"]].drop_duplicates()
    assert alike.values.tolist() == [[2.0, "DDPM", 10, "ab" * 32]]  # DDPM() takes all T = 10 steps
    assert sorted(files(whole)) == sorted([*frame["file"], "embeddings.npy", "records.parquet"])
    assert np.load(whole / "embeddings.npy").tobytes() == open_rows(whole)[:].tobytes()


@pytest.mark.parametrize("form", ["raw", "flat"])
def test_a_trace_is_kept_in_one_array_of_the_right_shape(model, form, tmp_path):
    plan = replace(PLAN, embedding=Embedding(form=form, when="trace", steps=(9, 0, 4)))
    generate(model, plan, tmp_path)
    assemble(plan, tmp_path)
    rows = np.load(tmp_path / "embeddings.npy")
    assert rows.shape == ((10, 3, 32, 2, 2) if form == "raw" else (10, 3, 128))
    alone = sample_embedded(model, plan.embedding, ["two roses"], [107], 2.0, DDPM())[1]
    np.testing.assert_allclose(rows[7], alone[0], rtol=1e-3, atol=1e-4)


def test_without_embeddings_there_are_none(model, whole, tmp_path):
    plan = replace(PLAN, embedding=None)
    generate(model, plan, tmp_path)
    assert not (tmp_path / "parts").exists()
    assemble(plan, tmp_path)
    want = files(whole)
    del want["embeddings.npy"]
    assert files(tmp_path) == want


def test_without_a_condition_there_is_no_prompt_and_no_weight(tmp_path):
    model = module(conditional=False).eval()
    plan = replace(PLAN, prompts=None, labels=None, weight=None, sampler=DDIM(4), num_images=4)
    assert generate(model, plan, tmp_path).images == 4
    frame = assemble(plan, tmp_path)
    assert frame[["prompt", "label", "guidance_weight"]].values.tolist() == [[None] * 3] * 4
    assert frame[["sampler", "steps"]].drop_duplicates().values.tolist() == [["DDIM", 4]]
    alone = model.sample(None, [102], None, DDIM(4))
    assert np.abs(pixels(tmp_path, 2) - to_uint8(alone[0]).permute(1, 2, 0).numpy().astype(int)).max() <= 1


def test_the_model_is_called_within_autocast(model, tmp_path):
    seen = []
    handle = model.denoiser.network.down2.register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    generate(model, replace(PLAN, num_images=2), tmp_path, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    handle.remove()
    assert seen
    assert all(seen)


# Any number of processes, any number of stops ------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 5])
def test_files_do_not_depend_on_the_number_of_processes(model, whole, world, tmp_path):
    # Apart, so that none sees what another has made: nothing is drawn twice, and nothing padded.
    apart = [tmp_path / f"rank{rank}" for rank in range(world)]
    made = [generate(model, PLAN, folder, rank, world).images for rank, folder in enumerate(apart)]
    assert sum(made) == sum(len(list(folder.rglob("*.png"))) for folder in apart) == 10
    together = tmp_path / "together"
    for folder in apart:
        if folder.exists():
            shutil.copytree(folder, together, dirs_exist_ok=True)
    assemble(PLAN, together)
    assert files(together) == files(whole)


def test_an_interrupted_run_makes_what_is_missing_and_ends_in_the_same_files(model, whole, tmp_path):
    with pytest.raises(StoppedError):
        generate(model, replace(PLAN, sampler=StopsAfter(2)), tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 6
    with pytest.raises(AntherError, match=r"2 of 4 batches are not in .*first: images 000006 to 000008"):
        assemble(PLAN, tmp_path)
    assert not (tmp_path / "records.parquet").exists()
    assert generate(model, PLAN, tmp_path).images == 4
    assert generate(model, PLAN, tmp_path).images == 0
    assemble(PLAN, tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("lost", ["images/000004.png", "parts/000003-000005.npz"])
def test_a_chunk_that_lost_a_file_is_made_again(model, whole, lost, tmp_path):
    generate(model, PLAN, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(AntherError, match="1 of 4"):
        assemble(PLAN, tmp_path)
    assert generate(model, PLAN, tmp_path).images == 3
    assemble(PLAN, tmp_path)
    assert files(tmp_path) == files(whole)


SLOW = """
import pickle, runpy, sys, time, torch
from pathlib import Path
from diffusion.evaluation.generate import generate
torch.set_num_threads(1)
model = runpy.run_path(sys.argv[1])["module"]().eval()
model.denoiser.network.down2.register_forward_hook(lambda *_: time.sleep(0.05))
generate(model, pickle.loads(Path(sys.argv[2]).read_bytes()), Path(sys.argv[3]))
"""


def test_a_killed_process_goes_on_with_the_same_files(whole, model, tmp_path):
    plan, folder = tmp_path / "plan", tmp_path / "run"
    plan.write_bytes(pickle.dumps(PLAN))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, ROOT / "tests/callbacks/tiny_training.py", plan, folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not (folder / "images/000004.png").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < generate(model, PLAN, folder).images < 10
    assemble(PLAN, folder)
    # A kill in the middle of a write leaves its temporary file, which no name leads to.
    assert {name: content for name, content in files(folder).items() if "/." not in name} == files(whole)


def test_an_assembled_folder_is_finished(model, whole, tmp_path):
    generate(model, PLAN, tmp_path)
    assemble(PLAN, tmp_path)
    records.with_columns(tmp_path, {"clip_score": [0.1 * k for k in range(10)]})
    scored = files(tmp_path)
    assert generate(model, PLAN, tmp_path).images == 0
    pd.testing.assert_frame_equal(assemble(PLAN, tmp_path), records.read(tmp_path))
    assert "clip_score" in assemble(PLAN, tmp_path)
    (tmp_path / "images/000009.png").unlink()
    with pytest.raises(AntherError, match="1 of 4"):
        assemble(PLAN, tmp_path)
    assert generate(model, PLAN, tmp_path).images == 1
    assemble(PLAN, tmp_path)
    assert files(tmp_path) == scored
    (tmp_path / "records.parquet").unlink()
    assert generate(model, PLAN, tmp_path).images == 0  # records follow from the plan alone
    assemble(PLAN, tmp_path)
    assert files(tmp_path) == files(whole)
    (tmp_path / "embeddings.npy").unlink()
    assert generate(model, PLAN, tmp_path).images == 10  # and embeddings do not
    assemble(PLAN, tmp_path)
    assert files(tmp_path) == files(whole)


def test_a_kill_between_the_files_of_assemble_leaves_nothing_behind(model, whole, tmp_path):
    generate(model, PLAN, tmp_path)
    parts = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assemble(PLAN, tmp_path)
    for missing in ((), ("records.parquet",), ("records.parquet", "embeddings.npy")):
        (tmp_path / "parts").mkdir()
        for name, content in parts.items():
            (tmp_path / "parts" / name).write_bytes(content)
        for name in missing:
            (tmp_path / name).unlink()
        assemble(PLAN, tmp_path)
        assert files(tmp_path) == files(whole)


def test_a_part_is_written_after_its_images(model, tmp_path):
    (tmp_path / "images/000004.png").mkdir(parents=True)  # the disk refuses this file
    with pytest.raises(AntherError, match=r"cannot write .*000004\.png"):
        generate(model, PLAN, tmp_path)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["000000-000002.npz"]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 half"])
def test_a_damaged_part_is_named(model, content, tmp_path):
    generate(model, PLAN, tmp_path)
    (tmp_path / "parts/000003-000005.npz").write_bytes(content)
    with pytest.raises(AntherError, match=r"000003-000005\.npz is damaged"):
        assemble(PLAN, tmp_path)
    assert not (tmp_path / "embeddings.npy").exists()
    assert not (tmp_path / "records.parquet").exists()


def test_a_part_of_other_images_is_named(model, tmp_path):
    generate(model, PLAN, tmp_path)
    (tmp_path / "parts/000000-000002.npz").replace(tmp_path / "parts/000003-000005.npz")
    generate(model, PLAN, tmp_path)
    with pytest.raises(AntherError, match=r"000003-000005\.npz holds embeddings of other images"):
        assemble(PLAN, tmp_path)


# What is refused -----------------------------------------------------------------------------------------------------


class Diverges(DDPM):
    """Its second draw has one pixel that is no number."""

    draws = 0

    def __call__(self, *args, **options):
        images = super().__call__(*args, **options)
        self.draws += 1
        if self.draws == 2:
            images[1, 0, 3, 3] = float("nan")
        return images


@pytest.mark.parametrize("embedding", [Embedding(), None])
def test_an_image_that_is_not_finite_is_refused_with_its_id(model, embedding, tmp_path):
    with pytest.raises(AntherError, match=r"image 000004 .*not finite"):
        generate(model, replace(PLAN, sampler=Diverges(), embedding=embedding), tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert not (tmp_path / "parts/000003-000005.npz").exists()


def test_embeddings_that_are_not_finite_are_refused(model, tmp_path):
    calls = []

    def spoil(layer, inputs, output):
        calls.append(1)
        return torch.full_like(output, float("inf")) if len(calls) == 11 else output

    handle = model.denoiser.network.down2.register_forward_hook(spoil)
    with pytest.raises(AntherError, match="embeddings of the images 000000 to 000002 are not finite"):
        generate(model, replace(PLAN, embedding=Embedding(when="clean")), tmp_path)
    handle.remove()
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_images": 0}, "num_images .* not 0"),
        ({"num_images": 2.5}, "num_images .* not 2.5"),
        ({"batch_size": 0}, "batch_size .* not 0"),
        ({"first_seed": -1}, "seed = -1"),
        ({"prompts": (), "labels": None}, "empty"),
    ],
)
def test_what_is_no_plan_is_refused(change, says):
    with pytest.raises(AntherError, match=says):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    ("conditional", "change", "says"),
    [
        (True, {"prompts": None, "labels": None}, "none were given"),
        (True, {"prompts": ("a daisy", "a steam engine"), "labels": None}, "steam engine"),
        (True, {"embedding": Embedding(layer="down9")}, "no layer 'down9'"),
        (True, {"embedding": Embedding(when="trace", steps=(9, 10))}, r"\[10\], but the 10 steps are 0 to 9"),
        (False, {}, "no condition"),
        (False, {"weight": None}, "takes no prompts"),
    ],
)
def test_what_the_model_cannot_do_is_found_before_anything_is_written(conditional, change, says, tmp_path):
    model, plan = module(conditional=conditional).eval(), replace(PLAN, **change)
    for act in (lambda: check(model, plan), lambda: generate(model, plan, tmp_path)):
        with pytest.raises(AntherError, match=says):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"T": 11}, {"weight": None}])
def test_a_plan_that_would_write_wrong_records_is_our_own_fault(model, change):
    with pytest.raises(ValueError, match="T and"):
        check(model, replace(PLAN, **change))


# Whose folder it is --------------------------------------------------------------------------------------------------

PROTOCOL = {"num_images": 10, "prompts": ["a", "b"], "sampler": {"_target_": "DDIM", "steps": 3}, "weight": None}


def test_the_same_protocol_claims_a_folder_again(tmp_path):
    claim(tmp_path / "new", PROTOCOL)
    before = files(tmp_path)
    assert list(before) == ["new/protocol.json"]
    other_order = {key: PROTOCOL[key] for key in reversed(PROTOCOL)}
    other_order |= {"prompts": ("a", "b"), "sampler": {"steps": 3, "_target_": "DDIM"}}
    claim(tmp_path / "new", other_order)
    assert files(tmp_path) == before


def test_another_protocol_is_refused_and_the_differences_named(tmp_path):
    claim(tmp_path, PROTOCOL)
    before = files(tmp_path)
    with pytest.raises(AntherError) as refused:
        claim(tmp_path, {**PROTOCOL, "num_images": 20, "sampler": {"_target_": "DDIM", "steps": 4}})
    message = str(refused.value)
    assert "num_images = 10 there and 20 here, sampler.steps = 3 there and 4 here; " in message
    assert "another hydra.run.dir" in message
    many = {f"key{k}": k for k in range(7)}
    with pytest.raises(AntherError, match="key3 = None there and 3 here and 3 more;"):
        claim(tmp_path, PROTOCOL | many)
    with pytest.raises(AntherError, match="prompts"):
        claim(tmp_path, {**PROTOCOL, "prompts": ["b", "a"]})
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "3", "[1]"])
def test_a_damaged_protocol_is_refused(tmp_path, content):
    (tmp_path / "protocol.json").write_text(content)
    with pytest.raises(AntherError, match=r"protocol\.json is damaged"):
        claim(tmp_path, PROTOCOL)
