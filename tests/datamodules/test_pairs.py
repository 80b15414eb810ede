import io
import json
import logging
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from datamodules.pairs import Pairs, read_caption, read_table
from diffusion import assets
from diffusion.errors import AntherError


@pytest.fixture(autouse=True)
def _no_silent_hosts(fresh_cache, monkeypatch):
    monkeypatch.setattr(assets, "_silent_hosts", set())


def picture(seed):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def ready(path, **options):
    options = {"batch_size": 2, "seed": 0, "size": 8, "split": {"train": 0.5, "val": 0.5}} | options
    module = Pairs(path=str(path), **options)
    module.prepare_data()
    module.setup()
    return module


FILES = {f"{k:09d}.jpg": picture(k) for k in range(6)}
CAPTIONS = [f"a picture with the number {k}" for k in range(6)]


def sidecars(k):
    """What img2dataset writes beside image k."""
    record = {"caption": CAPTIONS[k], "url": f"https://example.org/{k}", "status": "success"}
    beside = {f"{k:09d}.txt": CAPTIONS[k].encode(), f"{k:09d}.json": json.dumps(record).encode()}
    return beside if k % 2 else {f"{k:09d}.json": beside[f"{k:09d}.json"]}  # either is enough


@pytest.mark.parametrize("how", ["one shard", "shards", "folder"])
def test_pairs_of_img2dataset(tmp_path, how):
    every = [{name: content, **sidecars(k)} for k, (name, content) in enumerate(FILES.items())]
    if how == "folder":
        for part in every:
            for name, content in part.items():
                (tmp_path / "set").mkdir(exist_ok=True)
                (tmp_path / "set" / "00000" / name).parent.mkdir(exist_ok=True)
                (tmp_path / "set" / "00000" / name).write_bytes(content)
        # A table of what was fetched lies beside it, and is not fetched again.
        parquet.write_table(
            pa.table({"url": ["http://127.0.0.1:9/x"], "caption": ["x"]}), tmp_path / "set" / "0.parquet"
        )
    else:
        (tmp_path / "set").mkdir()
        for number, members in enumerate([every] if how == "one shard" else [every[:4], every[4:]]):
            with tarfile.open(tmp_path / "set" / f"{number:05d}.tar", "w") as shard:
                for part in members:
                    for name, content in part.items():
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        shard.addfile(info, io.BytesIO(content))
    module = ready(tmp_path / "set" / "00000.tar" if how == "one shard" else tmp_path / "set")
    assert module.table.captions == tuple(CAPTIONS)
    for k, content in enumerate(FILES.values()):
        assert np.array_equal(np.asarray(module.table.original(k)), np.asarray(Image.open(io.BytesIO(content))))
    assert len(set(module.table.names)) == 6


def test_another_caption_is_another_table(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("one\n  and two ")
    first = ready(tmp_path).table
    assert set(first.captions) == {"one and two"}
    (tmp_path / "000000003.txt").write_text("three")
    second = ready(tmp_path).table
    assert second.captions[3] == "three"
    assert second.digest != first.digest


class Handler(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "page").write_text("<html>gone</html>")
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("columns", [("url", "caption"), ("URL", "TEXT")])
def test_a_table_of_addresses(served, tmp_path, columns, caplog):
    urls = [f"{served}/{name}" for name in FILES] + [f"{served}/404", f"{served}/page", "file:///etc/passwd", None]
    captions = [*CAPTIONS, "dead", "no image", "none of ours", "no address"]
    parquet.write_table(pa.table({columns[0]: urls, columns[1]: captions, "other": [1] * 10}), tmp_path / "a.parquet")
    caplog.set_level(logging.WARNING)
    module = ready(tmp_path / "a.parquet", on_corrupt="skip")
    assert module.table.captions == tuple(CAPTIONS)
    assert [np.asarray(module.table.original(k)).sum() for k in range(6)] == [
        np.asarray(Image.open(io.BytesIO(content))).sum() for content in FILES.values()
    ]
    assert "2 of the 9 addresses" in caplog.text
    assert "skipped 1 files" in caplog.text
    asked = len(Handler.asked)
    assert ready(tmp_path / "a.parquet", on_corrupt="skip").table.digest == module.table.digest
    assert len(Handler.asked) == asked
    assert len(ready(tmp_path / "a.parquet", limit=4).table) == 4


def test_faults(served, tmp_path):
    parquet.write_table(pa.table({"url": [f"{served}/no"], "caption": ["a"]}), tmp_path / "dead.parquet")
    with pytest.raises(AntherError, match=r"none of the 1 images .* could be fetched, .*img2dataset"):
        ready(tmp_path / "dead.parquet")
    parquet.write_table(pa.table({"url": ["a"], "label": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(AntherError, match="has the columns url, label, where `url` and `caption` are needed"):
        read_table(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:50])
    with pytest.raises(AntherError, match="is no parquet table that can be read"):
        read_table(tmp_path / "cut.parquet")
    (tmp_path / "a.jpg").write_bytes(FILES["000000000.jpg"])
    with pytest.raises(AntherError, match=r"a\.jpg has no caption: put a\.txt or a\.json beside it"):
        read_caption(tmp_path / "a.jpg")
    for content in ("{", "[]", "{}", '{"caption": null}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(AntherError, match=r"a\.json has no `caption`"):
            read_caption(tmp_path / "a.jpg")
    with pytest.raises(AntherError, match="the images are not there"):
        ready(tmp_path / "nowhere")
