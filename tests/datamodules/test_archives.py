import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from datamodules import archives
from datamodules.archives import extract
from diffusion.errors import AntherError

TREE = {"daisy/1.jpg": b"one", "daisy/2.jpg": b"two", "roses/1.jpg": b"three"}


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rest(folder: Path, *expected: str) -> bool:
    """Nothing but the expected entries lies in the folder."""
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("prefix", ["", "top/", "a/top/", "./"])
@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
def test_same_tree_with_and_without_a_top_folder(tmp_path, prefix, kind):
    noise = {f"{prefix}.DS_Store": b"x", f"__MACOSX/{prefix}daisy/._1.jpg": b"x", f"{prefix}daisy/.hidden": b"x"}
    members = {prefix + name: content for name, content in TREE.items()} | noise
    if kind == "zip":
        archive = make_zip(tmp_path / "a.zip", members)
    else:
        archive = make_tar(tmp_path / f"a.{kind}", members, "w:gz" if kind == "tar.gz" else "w")
    target = extract(archive, tmp_path / "out")
    assert tree(target) == TREE
    assert rest(tmp_path, archive.name, "out")
    assert target.stat().st_mode & 0o055 == 0o055


def test_files_beside_the_classes_stay(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"top/LICENSE.txt": b"l"} | {f"top/{k}": v for k, v in TREE.items()})
    assert tree(extract(archive, tmp_path / "out")) == TREE | {"LICENSE.txt": b"l"}


def test_the_only_class_is_no_top_folder(tmp_path):
    for prefix in ("", "top/"):
        archive = make_zip(tmp_path / "a.zip", {f"{prefix}daisy/1.jpg": b"one"})
        assert tree(extract(archive, tmp_path / f"out{len(prefix)}")) == {"daisy/1.jpg": b"one"}


def test_a_finished_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    assert extract(tmp_path / "missing.zip", tmp_path / "out") == tmp_path / "out"


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg", ".."]
)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_nothing_outside_the_target(tmp_path, name, make):
    archive = make(tmp_path / "in.archive", TREE | {name: b"evil"})
    with pytest.raises(AntherError, match=r"in\.archive was not unpacked: its member .* leads outside"):
        extract(archive, tmp_path / "deep" / "out")
    assert rest(tmp_path, "in.archive", "deep")
    assert rest(tmp_path / "deep")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_no_links_and_devices_from_tar(tmp_path, kind):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as file:
        info = tarfile.TarInfo("daisy")
        info.type, info.linkname = kind, "/etc"
        file.addfile(info)
        info = tarfile.TarInfo("daisy/passwd")
        file.addfile(info, io.BytesIO())
    with pytest.raises(AntherError, match="member 'daisy' is a link or a device"):
        extract(archive, tmp_path / "out")
    assert rest(tmp_path, "a.tar")


def test_no_links_from_zip(tmp_path):
    info = zipfile.ZipInfo("daisy")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc")
    with pytest.raises(AntherError, match="member 'daisy' is a link or a device"):
        extract(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_bombs_are_stopped(tmp_path, make, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_BYTES", 1 << 20)
    archive = make(tmp_path / "a.bomb", {"daisy/1.jpg": bytes(50 << 20)})
    with pytest.raises(AntherError, match="more than 100 times its size"):
        extract(archive, tmp_path / "out")
    assert rest(tmp_path, "a.bomb")


def test_bomb_of_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    archive = make_zip(tmp_path / "a.zip", {f"daisy/{i}.jpg": os.urandom(100) for i in range(11)})
    with pytest.raises(AntherError, match="was not unpacked"):
        extract(archive, tmp_path / "out")
    monkeypatch.setattr(archives, "MAX_BYTES", 1100)
    extract(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_bomb_of_empty_files(tmp_path, make, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 10)
    archive = make(tmp_path / "a.bomb", {f"daisy/{i}.jpg": b"" for i in range(11)})
    with pytest.raises(AntherError, match="more than 10 files"):
        extract(archive, tmp_path / "out")
    assert rest(tmp_path, "a.bomb")
    monkeypatch.setattr(archives, "MAX_FILES", 11)
    extract(archive, tmp_path / "out")


def test_an_archive_in_an_archive_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_BYTES", 1 << 20)
    inner = make_zip(tmp_path / "inner.zip", {"daisy/1.jpg": bytes(50 << 20)}).read_bytes()
    archive = make_zip(tmp_path / "a.zip", TREE | {"daisy/inner.zip": inner})
    assert tree(extract(archive, tmp_path / "out")) == TREE | {"daisy/inner.zip": inner}


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_damaged_archives(tmp_path, make, damage):
    archive = make(tmp_path / "a.archive", {f"daisy/{i}.jpg": os.urandom(5000) for i in range(4)})
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flip":
        content[len(content) // 2] ^= 255
    archive.write_bytes({"text": b"<html>not found</html>", "empty": b""}.get(damage, bytes(content)))
    with pytest.raises(AntherError, match=r"a\.archive is .*get it again"):
        extract(archive, tmp_path / "out")
    assert rest(tmp_path, "a.archive")


def test_damaged_header_in_a_tar(tmp_path):
    archive = make_tar(tmp_path / "a.tar", TREE, "w")
    content = bytearray(archive.read_bytes())
    content[1024] ^= 1  # The second member's name.
    archive.write_bytes(content)
    with pytest.raises(AntherError, match=r"a\.tar is damaged"):
        extract(archive, tmp_path / "out")


def test_encrypted(tmp_path):
    archive = make_zip(tmp_path / "a.zip", TREE)
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 1)
    archive.write_bytes(content)
    with pytest.raises(AntherError, match=r"damaged or encrypted"):
        extract(archive, tmp_path / "out")


def test_no_files(tmp_path):
    with pytest.raises(AntherError, match="holds no files"):
        extract(make_zip(tmp_path / "a.zip", {".hidden": b"x"}), tmp_path / "out")


def test_no_space(tmp_path):
    # A file size limit stands for the full disk: the same error from the same call.
    make_zip(tmp_path / "a.zip", {"daisy/1.jpg": os.urandom(100_000)})
    code = (
        "import resource, signal, sys; from pathlib import Path; from datamodules.archives import extract\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "try: extract(Path(sys.argv[1]) / 'a.zip', Path(sys.argv[1]) / 'out')\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"AntherError cannot unpack {tmp_path / 'a.zip'} into {tmp_path}: File too large")
    assert rest(tmp_path, "a.zip")


def test_unwritable(tmp_path):
    archive = make_zip(tmp_path / "a.zip", TREE)
    with pytest.raises(AntherError, match="cannot unpack into"):
        extract(archive, archive / "out")


def test_killed_in_the_middle_leaves_no_half_data_set(tmp_path):
    make_zip(tmp_path / "a.zip", {f"daisy/{i}.jpg": b"x" for i in range(20_000)})
    code = "import sys; from pathlib import Path; from datamodules.archives import extract\n"
    code += "p = Path(sys.argv[1]); print('go', flush=True); extract(p / 'a.zip', p / 'out')"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not any(tmp_path.glob(".out-*/daisy/5.jpg")) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9
    assert not (tmp_path / "out").exists()
    assert len(tree(extract(tmp_path / "a.zip", tmp_path / "out"))) == 20_000


def test_two_at_once(tmp_path):
    make_zip(tmp_path / "a.zip", {f"daisy/{i}.jpg": b"x" for i in range(500)})
    code = "import sys; from pathlib import Path; from datamodules.archives import extract\n"
    code += "p = Path(sys.argv[1]); extract(p / 'a.zip', p / 'out')"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(tree(tmp_path / "out")) == 500
    assert rest(tmp_path, "a.zip", "out")
