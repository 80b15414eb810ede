import json
import multiprocessing
import resource
import signal
import time

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.augment import FlipCrop
from datamodules.base import (
    EpochSampler,
    ImageDataModule,
    ImageTable,
    TableView,
    cached_images,
    content_digest,
    random_split,
)
from diffusion.assets import cache_dir
from diffusion.errors import AntherError

pytestmark = pytest.mark.usefixtures("fresh_cache")


def make_table(n=50, side=8, channels=3):
    images = np.random.default_rng(0).integers(0, 256, (n, channels, side, side), np.uint8)
    return ImageTable(
        images=images,
        labels=torch.arange(n) % 3,
        class_names=("a", "b", "c"),
        names=tuple(f"{i:03d}" for i in range(n)),
        captions=tuple(f"a picture of {'abc'[i % 3]}" for i in range(n)),
        digest="0" * 64,
    )


class Numbers(ImageDataModule):
    def __init__(self, n=50, side=8, size=8, channels=3, **options):
        options = {"batch_size": 8, "seed": 0, "name": "numbers", "image_shape": (channels, size, size)} | options
        super().__init__(**options)
        self.n, self.side, self.loads = n, side, 0

    def load(self):
        self.loads += 1
        return make_table(self.n, self.side)


def epoch(module, number, loader=None):
    loader = module.train_dataloader() if loader is None else loader
    loader.sampler.set_epoch(number)
    return list(loader)


def rows(batches):
    return [batch["index"].tolist() for batch in batches]


def flat(lists):
    return [item for one in lists for item in one]


def equal(one, two):
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, two, strict=True)
    )


def ready(**options):
    module = Numbers(**options)
    module.setup()
    return module


def test_batch():
    module = ready(drop_last=False, split={"train": 0.8, "val": 0.2})
    batches = epoch(module, 0)
    assert [len(batch["image"]) for batch in batches] == [8] * 5
    batch = batches[0]
    assert set(batch) == {"image", "index", "label"}
    assert batch["image"].dtype == torch.float32
    assert batch["index"].dtype == batch["label"].dtype == torch.int64
    images = torch.from_numpy(module.table.images)[batch["index"]]
    assert torch.equal(batch["image"], images.float() / 127.5 - 1)
    assert torch.equal(batch["label"], batch["index"] % 3)
    assert sorted(flat(rows(batches))) == module.splits["train"].tolist()


def test_order_is_a_function_of_seed_and_epoch():
    module = ready()
    first = rows(epoch(module, 3))
    assert rows(epoch(ready(), 3)) == first
    assert rows(epoch(module, 4)) != first
    assert rows(epoch(ready(seed=1), 3)) != first
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert rows(epoch(module, 3)) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    augmented = {"side": 10, "augment": FlipCrop()}
    here, there = ready(**augmented), ready(**augmented, num_workers=workers)
    loader = there.train_dataloader()
    for number in (0, 1, 5):
        assert equal(epoch(there, number, loader), epoch(here, number))


def test_augmentation_is_a_function_of_seed_epoch_and_row():
    module = ready(side=10, augment=FlipCrop())

    def images(batches):
        return {int(i): image for batch in batches for i, image in zip(batch["index"], batch["image"], strict=True)}

    def differing(one, two):
        return sum(not torch.equal(one[i], two[i]) for i in one.keys() & two.keys())

    first = images(epoch(module, 2))
    other_batches = images(epoch(ready(side=10, augment=FlipCrop(), batch_size=5), 2))
    assert differing(first, other_batches) == 0
    assert len(first.keys() & other_batches.keys()) > 30
    assert differing(first, images(epoch(module, 3))) > 20
    assert differing(first, images(epoch(ready(side=10, augment=FlipCrop(), seed=1), 2))) > 20


def test_validation_is_in_order_and_plain():
    module = ready(side=12, augment=FlipCrop(flip=1.0), val_batch_size=2, split={"train": 0.9, "val": 0.1})
    batches = list(module.val_dataloader())
    assert flat(rows(batches)) == module.splits["val"].tolist()
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]
    centre = torch.from_numpy(module.table.images[module.splits["val"]])[:, :, 2:10, 2:10]
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), centre.float() / 127.5 - 1)
    assert torch.equal(module.pixels("val"), centre)
    assert rows(module.test_dataloader()) == rows(batches)


@pytest.mark.parametrize("n", [7, 8, 50])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_without_repeats(n, world):
    whole = EpochSampler(n, 5)
    whole.set_epoch(2)
    order = list(whole)
    shares = [EpochSampler(n, 5, rank, world) for rank in range(world)]
    for share in shares:
        share.set_epoch(2)
    assert [list(share) for share in shares] == [order[: n - n % world][rank::world] for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(share) == len(list(share)) for share in shares)
    plain = [list(EpochSampler(n, None, rank, world)) for rank in range(world)]
    assert sorted(flat(plain)) == list(range(n))


@pytest.mark.parametrize("world", [1, 2])
def test_weights_say_how_often_an_image_is_drawn(world):
    weights = torch.tensor([1.0, 1.0, 6.0, 0.0] * 500)
    whole = EpochSampler(2000, 5, weights=weights)
    whole.set_epoch(3)
    order = list(whole)
    counts = torch.bincount(torch.tensor(order) % 4, minlength=4)
    assert counts[3] == 0
    assert torch.allclose(counts / 2000, torch.tensor([0.125, 0.125, 0.75, 0.0]), atol=0.04)
    shares = [EpochSampler(2000, 5, rank, world, weights) for rank in range(world)]
    for share in shares:
        share.set_epoch(3)
    assert [list(share) for share in shares] == [order[rank::world] for rank in range(world)]
    whole.set_epoch(4)
    assert [k - 2000 for k in whole] != order


def test_splits_are_disjoint_seeded_and_whole():
    splits = random_split(1166, {"train": 0.95, "val": 0.05}, 42)
    assert {name: len(part) for name, part in splits.items()} == {"train": 1107, "val": 59}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1166))
    assert np.array_equal(random_split(1166, {"train": 0.95, "val": 0.05}, 42)["val"], splits["val"])
    assert not np.array_equal(random_split(1166, {"train": 0.95, "val": 0.05}, 43)["val"], splits["val"])
    three = random_split(100, {"train": 0.7, "val": 0.2, "test": 0.1}, 0)
    assert [len(part) for part in three.values()] == [70, 20, 10]
    without = random_split(1166, {"train": 0.95, "val": 0.05, "test": 0}, 42)
    assert list(without) == ["train", "val"]
    assert all(np.array_equal(without[name], splits[name]) for name in splits)


@pytest.mark.parametrize("fractions", [{"train": 0.9, "val": 0.05}, {"train": 1.1, "val": -0.1}])
def test_bad_fractions(fractions):
    with pytest.raises(AntherError, match=r"data\.split=.* add up to 1"):
        random_split(100, fractions, 0)


@pytest.mark.parametrize(
    ("fractions", "absent"),
    [
        ({"train": 0.9, "test": 0.1}, "no val"),
        ({"train": 0, "val": 1.0}, "no train"),
        ({"test": 1.0}, "no train and no val"),
    ],
)
def test_a_split_needs_train_and_val(fractions, absent):
    with pytest.raises(AntherError, match=rf"^data\.split=.* has {absent}: give both train and val"):
        ready(split=fractions)


def test_too_few_images_to_split():
    with pytest.raises(AntherError, match=r"1 images are too few .* train is empty"):
        random_split(1, {"train": 0.95, "val": 0.05}, 0)


def test_the_split_does_not_move_with_the_seed():
    assert np.array_equal(ready(seed=1).splits["val"], ready(seed=2).splits["val"])
    assert not np.array_equal(ready(split_seed=1).splits["val"], ready(split_seed=2).splits["val"])


def test_overlapping_splits_are_refused():
    class Leak(Numbers):
        def make_splits(self, table):
            return {"train": np.arange(10), "val": np.arange(9, 12)}

    with pytest.raises(AssertionError, match="overlap"):
        Leak().setup()


def test_split_record(tmp_path):
    module = ready()
    module.save_splits(tmp_path / "run" / "splits.json")
    record = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert record["splits"]["val"] == [f"{row:03d}" for row in module.splits["val"]]
    assert record["digest"] == module.table.digest
    assert record["split_seed"] == 42


def test_setup_is_idempotent_and_describes():
    module = Numbers()
    with pytest.raises(RuntimeError, match="setup"):
        _ = module.splits
    assert module.image_shape == (3, 8, 8)
    module.setup("fit")
    module.setup("test")
    assert module.loads == 1
    assert module.describe() == "numbers: 47 train, 3 val images, 3×8×8, 3 classes (a, b, c)"


def test_batch_larger_than_the_data():
    with pytest.raises(AntherError, match=r"data\.batch_size=48 is more than the 47 training images"):
        ready(batch_size=48).train_dataloader()
    assert len(ready(batch_size=48, drop_last=False).train_dataloader()) == 1
    with pytest.raises(AntherError, match=r"data\.batch_size=0"):
        Numbers(batch_size=0)


def test_images_that_do_not_fit():
    with pytest.raises(AntherError, match=r"holds images of shape \(3, 8, 8\).*\(1, 8, 8\)"):
        ready(channels=1)
    with pytest.raises(AntherError, match=r"\(3, 9, 9\)"):
        ready(size=9)


def test_tables_are_checked():
    good = make_table(4)
    with pytest.raises(ValueError, match="unique"):
        ImageTable(good.images, good.labels, good.class_names, ("x",) * 4, good.captions, "")
    with pytest.raises(ValueError, match="N of everything"):
        ImageTable(good.images, good.labels[:3], good.class_names, good.names, good.captions, "")


def test_original_of_arrays():
    table = make_table(2)
    assert np.array_equal(np.asarray(table.original(1)).transpose(2, 0, 1), table.images[1])
    grey = make_table(2, channels=1)
    assert grey.original(0).mode == "RGB"


def test_digest_depends_on_parameters_and_content():
    array = np.arange(4, dtype=np.uint8)
    digests = {content_digest(p, a) for p in ([1], ["1"], [1, 1]) for a in ([], [array], [array[::-1]], [b"x"])}
    assert len(digests) == 12
    assert content_digest([{"a": 1, "b": 2}], [array]) == content_digest([{"b": 2, "a": 1}], [array.tobytes()])


class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, i):
        self.seen.append((self.current_epoch, batch["index"].tolist(), batch["image"].sum().item()))
        return (self.weight - batch["image"].mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, module, ckpt_path=None, **options):
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "callbacks": [ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")],
    } | options
    model = Recorder()
    trainer = lightning.Trainer(**options)
    trainer.fit(model, module, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("steps", [3, 5, 7, 10])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path, steps, workers):
    options = {"side": 10, "augment": FlipCrop(), "num_workers": workers}
    whole = fit(tmp_path / "whole", Numbers(**options), max_epochs=3)
    assert len(whole.seen) == 15
    assert whole.seen[0][1] != whole.seen[5][1] != whole.seen[10][1]
    first = fit(tmp_path / "cut", Numbers(**options), max_steps=steps)
    rest = fit(tmp_path / "rest", Numbers(**options), tmp_path / f"cut/step={steps}.ckpt", max_epochs=3)
    assert [s[1:] for s in first.seen + rest.seen] == [s[1:] for s in whole.seen]
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches(tmp_path):
    model = fit(tmp_path, Numbers(), max_epochs=2, overfit_batches=1)
    assert model.seen[0][1] == model.seen[1][1]


def decode(row):
    return None if row in (3, 5) else np.full((1, 2, 2), row % 256, np.uint8)


def test_cache_is_decoded_once():
    calls = []

    def counted(row):
        calls.append(row)
        return decode(row)

    for _ in range(2):
        images, kept = cached_images("d" * 64, 600, (1, 2, 2), counted, "x")
        assert kept == [row for row in range(600) if row not in (3, 5)]
        assert images[:, 0, 0, 0].tolist() == [row % 256 for row in kept]
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
    # What could not be decoded is tried again.
    assert sorted(calls) == sorted([*range(600), 3, 5])
    cached_images("e" * 64, 600, (1, 2, 2), counted, "x")
    assert len(calls) == 1202


def test_a_row_that_can_be_decoded_by_now_gets_its_place():
    _, kept = cached_images("d" * 64, 10, (1, 2, 2), decode, "x")
    assert 3 not in kept
    images, kept = cached_images("d" * 64, 10, (1, 2, 2), lambda row: None if row == 5 else decode(0) + row, "x")
    assert kept == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert images[:, 0, 0, 0].tolist() == kept


@pytest.mark.parametrize("damage", ["cut", "empty", "rows", "rows missing", "other count", "dtype"])
def test_damaged_caches_are_made_again(damage):
    images, kept = cached_images("d" * 64, 10, (1, 2, 2), decode, "x")
    images = np.array(images)  # The map dies with the file below.
    pixels, record = (cache_dir() / "tables" / ("d" * 64 + suffix) for suffix in (".npy", ".json"))
    if damage == "cut":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "empty":
        pixels.write_bytes(b"")
    elif damage == "rows":
        record.write_text("{")
    elif damage == "rows missing":
        record.unlink()
    elif damage == "other count":
        record.write_text(json.dumps({"count": 9, "rows": kept}))
    else:
        np.save(pixels, np.zeros((8, 1, 2, 2), np.float32))
    calls = []
    again, kept_again = cached_images("d" * 64, 10, (1, 2, 2), lambda row: (calls.append(row), decode(row))[1], "x")
    assert len(calls) == 10
    assert np.array_equal(again, images)
    assert kept_again == kept


def test_errors_while_decoding_leave_no_cache():
    def broken(row):
        raise MemoryError

    with pytest.raises(MemoryError):
        cached_images("d" * 64, 10, (1, 2, 2), broken, "x")
    assert not list((cache_dir() / "tables").glob("*"))


def on_a_full_disk(answer):
    # A file size limit stands for the full disk: the same error from the same call.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
    try:
        cached_images("d" * 64, 10, (3, 64, 64), lambda row: np.zeros((3, 64, 64), np.uint8), "x")
    except AntherError as error:
        answer.put(str(error))


def test_no_space_for_the_cache():
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    process = fork.Process(target=on_a_full_disk, args=(answer,))
    process.start()
    process.join()
    message = answer.get()
    assert message.startswith("cannot write")
    assert "File too large" in message
    assert not list((cache_dir() / "tables").glob("*"))


def test_killed_while_decoding_leaves_no_half_cache():
    fork = multiprocessing.get_context("fork")
    decoding = fork.Event()

    def slow(row):
        decoding.set()
        time.sleep(60)

    process = fork.Process(target=cached_images, args=("d" * 64, 10, (1, 2, 2), slow, "x"))
    process.start()
    assert decoding.wait(30)
    process.kill()
    process.join()
    images, _ = cached_images("d" * 64, 10, (1, 2, 2), decode, "x")
    assert len(images) == 8


def test_one_key():
    view = TableView(make_table(), np.arange(5, 10), 8)
    assert view[7]["index"] == 7
