"""What comes from elsewhere is data: no loader of the project executes anything, and nothing in the source could."""

import ast
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.base import MAX_PIXELS, UndecodableError, cached_images, open_rgb
from diffusion.assets import cache_dir
from diffusion.checkpoint import load_model, read
from diffusion.conditioning.cache import cache_path, cached
from diffusion.conditioning.table import read_embeddings
from diffusion.curation import records
from diffusion.errors import AntherError
from diffusion.evaluation import embeddings, inception
from diffusion.evaluation.classifier import load_classifier
from diffusion.evaluation.report import read_metrics
from diffusion.evaluation.subject import described
from diffusion.networks.upstream import load_upstream

ROOT = Path(__file__).parents[1]
PRODUCT = [*(path for name in ("diffusion", "datamodules", "callbacks") for path in (ROOT / name).rglob("*.py"))]
PRODUCT += ROOT.glob("*.py")


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write(kind: str, path: Path, marker: Path) -> None:
    match kind:
        case "torch":
            torch.save({"config": {}, "state_dict": {}, "x": Evil(marker)}, path)
        case "torch, legacy":
            torch.save({"state_dict": Evil(marker)}, path, _use_new_zipfile_serialization=False)
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(marker)))
        case "npy":
            with path.open("wb") as file:
                np.save(file, np.array([Evil(marker)], dtype=object), allow_pickle=True)
        case "npz":
            objects = np.array([Evil(marker)], dtype=object)
            with path.open("wb") as file:
                np.savez(file, path=objects, embedding=objects, ids=objects, embeddings=objects)


# CLIP's is in tests/diffusion/conditioning/test_openclip.py, where small models are at hand.
LOADERS: dict[str, Callable[[Path], object]] = {
    "checkpoint.read": read,
    "checkpoint.load_model": load_model,
    "upstream": lambda path: load_upstream(path, 10, 32),
    "classifier": lambda path: load_classifier(path),
    "inception": lambda path: inception.load_network(path),
    "table": lambda path: read_embeddings(path, "path"),
    "embeddings": lambda path: embeddings.open_rows(path.parent),
    "records": lambda path: records.read(path.parent),
    "metrics": lambda path: read_metrics(path.parent),
    "config": lambda path: described(str(path)),
}
NAMES = {"embeddings": "embeddings.npy", "records": "records.parquet", "metrics": "metrics.json", "config": "x.yaml"}
SUFFIXES = {"table": ".npz"}


@pytest.mark.parametrize("kind", ["torch", "torch, legacy", "pickle", "npy", "npz"])
@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_executes_what_it_reads(loader: str, kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / NAMES.get(loader, f"evil{SUFFIXES.get(loader, '.pth')}")
    write(kind, path, marker)
    with pytest.raises(AntherError) as error:
        LOADERS[loader](path)
    assert path.name in str(error.value)
    assert not marker.exists()
    # And it would have been: the file is what it is meant to be.
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize("kind", ["npy", "npz", "pickle", "torch"])
def test_no_cache_executes_what_it_reads(kind: str, tmp_path: Path) -> None:
    """A damaged entry is computed anew."""
    marker = tmp_path / "executed"
    for path in (cache_dir() / "tables" / f"{kind}.npy", cache_path({"kind": kind})):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(kind, path, marker)
    rows_path = cache_dir() / "tables" / f"{kind}.json"
    rows_path.write_text('{"count": 1, "rows": [0]}')
    images, _ = cached_images(kind, 1, (1, 2, 2), lambda _: np.full((1, 2, 2), 7, np.uint8), "x")
    assert images.tolist() == [[[[7, 7], [7, 7]]]]
    assert cached({"kind": kind}, (1, 2), lambda: torch.ones(1, 2)).tolist() == [[1, 1]]
    assert not marker.exists()


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "extractall",
    "unpack_archive",
    "unsafe_load",
    "full_load",
    "system",
}


def faults(source: str) -> list[str]:
    """Calls that execute what they read, or that are not told not to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        plain = isinstance(node.func, ast.Name)
        if name == "torch.load" and told.get("weights_only") != "True":
            found.append(f"{node.lineno}: {name} without weights_only=True")
        if name in ("np.load", "numpy.load") and told.get("allow_pickle") != "False":
            found.append(f"{node.lineno}: {name} without allow_pickle=False")
        if name in ("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "torch.hub.load", "shelve.open"):
            found.append(f"{node.lineno}: {name}")
        last = name.rpartition(".")[2]
        if last in FORBIDDEN and (plain or last not in ("eval", "compile")):  # module.eval() is another thing
            found.append(f"{node.lineno}: {name}")
        if told.get("shell") == "True" or told.get("trust_remote_code") == "True":
            found.append(f"{node.lineno}: {name}")
        if last == "fit" and "ckpt_path" in told and told.get("weights_only") != "True":
            found.append(f"{node.lineno}: {name} without weights_only=True")
    return found


def test_nothing_in_the_source_executes_what_it_reads() -> None:
    assert len(PRODUCT) > 80
    bad = {str(path.relative_to(ROOT)): found for path in PRODUCT if (found := faults(path.read_text("utf-8")))}
    assert bad == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(b)",
        "eval(text)",
        "archive.extractall(folder)",
        "subprocess.run(x, shell=True)",
        "trainer.fit(module, ckpt_path=p)",
        "yaml.load(text)",
        "os.system(text)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert faults(line)
    assert not faults("network.eval(); network.compile(); torch.load(p, weights_only=True)")


def test_torchscript_is_loaded_in_one_place_alone() -> None:
    """`inception`, for the file that the package index has; the resolver checks its sum."""
    assert [path.name for path in PRODUCT if "torch.jit.load" in path.read_text()] == ["inception.py"]


# Bombs ----------------------------------------------------------------------------------------------------------------


def header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(2**50,), (2**30, 2**30), (10**6, 512)])
def test_an_array_that_declares_more_than_it_holds(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "embeddings.npy").write_bytes(header(shape) + bytes(64))
    with pytest.raises(AntherError, match=r"embeddings\.npy is damaged"):
        embeddings.open_rows(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("path.npy", header(shape) + bytes(64))
        archive.writestr("embedding.npy", header(shape) + bytes(64))
    with pytest.raises(AntherError, match=r"x\.npz is not a table"):
        read_embeddings(tmp_path / "x.npz", "path")


def test_a_table_that_grows(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        content = header((2**26,)) + bytes(2**28 + 1)
        archive.writestr("embedding.npy", content)
    assert (tmp_path / "x.npz").stat().st_size < 2**20
    with pytest.raises(AntherError, match="more than 100 times its size"):
        read_embeddings(tmp_path / "x.npz", "path")


@pytest.mark.parametrize("side", [8193, 50_000, 2**31 - 1])
def test_an_image_that_declares_more_than_a_photograph(side: int, tmp_path: Path) -> None:
    """Between Pillow's warning and its refusal as well; nothing is decoded."""
    import zlib

    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    assert side**2 > MAX_PIXELS
    with pytest.raises(UndecodableError, match=r"declares .* pixels, more than 67,108,864: make the image smaller"):
        open_rgb(tmp_path / "bomb.png")
