"""Images with a caption each, as subsets of LAION come: webdataset shards, sidecar files, or tables of addresses."""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.archives import extract
from datamodules.base import ImageTable, content_digest
from datamodules.folders import PlainFolder, image_files
from diffusion.assets import AssetError, cache_dir, download
from diffusion.errors import AntherError, install
from diffusion.files import atomic, sha256

log = logging.getLogger(__name__)

URL, CAPTION = ("url",), ("caption", "text")
"""Columns and keys that are read, in any case: LAION-400M writes URL and TEXT, img2dataset url and caption."""


class Pairs(PlainFolder):
    """Pairs of image and text (LAION: Schuhmann et al. 2021, arXiv 2111.02114).

    Args:
        path: a folder of images with their captions beside them in `name.txt`, or in `name.json` under `caption`; a
            `.tar` shard of such files (webdataset, as img2dataset writes it) or a folder of shards; or a `.parquet`
            table with the columns `url` and `caption` (or `text`), or a folder of tables, whose images are fetched
            into the cache once. Addresses that are dead by now are left out and counted.
        limit: read only so many rows of the tables.
        **settings: those of `PlainFolder`, without `captions`.
    """

    def __init__(self, *, path: str, limit: int | None = None, **settings: Any) -> None:
        super().__init__(path=path, **settings)
        self.limit = limit

    def locate(self) -> Path:
        """See `FolderImages`."""
        path = Path(str(self.path)).expanduser().absolute()
        if shards := _files(path, ".tar"):
            return _unpacked(shards)
        # img2dataset leaves tables beside what it has fetched.
        if (tables := _files(path, ".parquet")) and not (path.is_dir() and image_files(path, path)):
            return self._fetched(tables)
        return super().locate()

    def _fetched(self, tables: Sequence[Path]) -> Path:
        from rich.console import Console
        from rich.progress import track

        rows = [row for table in tables for row in read_table(table)][: self.limit]
        key = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        folder = cache_dir() / "data" / f"pairs-{key}"
        dead = folder / "dead.json"
        if not dead.exists():
            with ThreadPoolExecutor(16) as pool:
                tried = pool.map(lambda k: _fetch(rows[k], folder / f"{k:09d}.jpg"), range(len(rows)))
                console = Console(stderr=True)
                kept = list(track(tried, f"fetching {self.name}", len(rows), console=console, transient=True))
            if not any(kept):
                raise AntherError(
                    f"none of the {len(rows):,} images of {self.path} could be fetched, the first from {rows[0].url}; "
                    "fetch them elsewhere with img2dataset and give data.path its shards."
                )
            # Last, so that what was interrupted goes on.
            with atomic(dead) as temporary:
                temporary.write_text(json.dumps([row.url for row, there in zip(rows, kept, strict=True) if not there]))
        if gone := json.loads(dead.read_text()):
            log.warning("%d of the %d addresses of %s gave no image", len(gone), len(rows), self.path)
        return folder

    def load(self) -> ImageTable:
        """See `ImageDataModule`; the captions are the pairs'."""
        table = super().load()
        captions = tuple(read_caption(file) for file in table.files)
        return replace(table, captions=captions, digest=content_digest(["pairs", table.digest, captions]))


class Row(NamedTuple):
    """A line of a table."""

    url: str
    caption: str


def read_table(path: Path) -> list[Row]:
    """The rows of a parquet table that have an address and a caption.

    Raises:
        AntherError: pyarrow is not installed, or the table is damaged or has other columns.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise AntherError(f"tables of addresses need pyarrow: {install('eval')}.") from error
    try:
        names = parquet.read_schema(path).names
        url, caption = (next((n for w in words for n in names if n.lower() == w), None) for words in (URL, CAPTION))
        if url is None or caption is None:
            raise AntherError(f"{path} has the columns {', '.join(names)}, where `url` and `caption` are needed.")
        table = parquet.read_table(path, columns=[url, caption])
    except (pyarrow.ArrowException, OSError) as error:
        raise AntherError(f"{path} is no parquet table that can be read ({error}); get it again.") from error
    pairs = zip(table[url].to_pylist(), table[caption].to_pylist(), strict=True)
    return [Row(str(address), str(text)) for address, text in pairs if address and text]


def read_caption(image: Path) -> str:
    """What stands beside an image: its `.txt`, or `caption` in its `.json`.

    Raises:
        AntherError: there is neither, or the JSON has no caption.
    """
    if (text := image.with_suffix(".txt")).is_file():
        return " ".join(text.read_text("utf-8", "replace").split())
    record = image.with_suffix(".json")
    try:
        content = {str(key).lower(): value for key, value in json.loads(record.read_text("utf-8")).items()}
        return " ".join(next(str(content[key]) for key in CAPTION if content.get(key) is not None).split())
    except FileNotFoundError as error:
        raise AntherError(
            f"{image} has no caption: put {text.name} or {record.name} beside it, or use data=folder for images alone."
        ) from error
    except (ValueError, AttributeError, StopIteration) as error:
        raise AntherError(f"{record} has no `caption`; write one, or put {text.name} beside the image.") from error


def _files(path: Path, suffix: str) -> list[Path]:
    return [path] if path.is_file() and path.suffix == suffix else sorted(path.glob(f"*{suffix}"))


def _unpacked(shards: Sequence[Path]) -> Path:
    key = content_digest([[shard.name, sha256(shard)] for shard in shards])[:16]
    folder = cache_dir() / "data" / f"pairs-{key}"
    for shard in shards:
        extract(shard, folder / shard.stem)
    return folder


def _fetch(row: Row, path: Path) -> bool:
    """Whether the image is there now, its caption beside it."""
    caption = path.with_suffix(".txt")
    if not path.exists():
        if not row.url.startswith(("http://", "https://")):
            return False
        try:
            download(row.url, path)
        except AssetError:
            return False
    with atomic(caption) as temporary:
        temporary.write_text(row.caption, "utf-8")
    return True
