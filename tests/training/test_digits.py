"""Digit images: every source, and every way in which a file can be missing or damaged."""

import gzip
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from tiny import idx_bytes

from training import digits
from training.config import DataConfig
from training.errors import InputError


def test_embedded_digits_need_no_files():
    found = digits.load(DataConfig())
    assert found.name == "digits" and "not MNIST" in found.description
    for split in (found.train, found.validation, found.test):
        assert split.shape[1:] == (28, 28) and split.dtype == np.uint8
    assert len(found.train) + len(found.validation) + len(found.test) == 1797
    assert not found.train[:, :4].any() and not found.train[:, :, -4:].any(), "the digit fills 20x20 of 28x28"


def test_idx_plain_and_compressed(mnist: Path):
    found = digits.load(DataConfig(root=str(mnist)))
    assert found.name == "mnist" and str(mnist) in found.description
    whole = np.frombuffer(idx_bytes(24), np.uint8, offset=16).reshape(24, 28, 28)
    np.testing.assert_array_equal(np.concatenate([found.train, found.validation]), whole)
    assert (len(found.train), len(found.validation), len(found.test)) == (22, 2, 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (idx_bytes(3)[:9], "has 9 bytes"),
        (idx_bytes(3)[:-1], "has 2367 bytes, its header promises 2368"),
        (idx_bytes(3) + b"x", "header promises 2368"),
        (idx_bytes(3, promised=4), "promises 3152 .4 images"),
        (idx_bytes(3, magic=2049), "magic number is 2049, not 2051"),
        (idx_bytes(3, size=27), "images of 27x27"),
        (idx_bytes(0), "holds 0 images"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_idx(tmp_path: Path, content: bytes, message: str, compressed: bool):
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(InputError, match=f"{path.name} .*{message}.*replace the file"):
        digits.read_idx(path)


# A name for each: those made of the bytes would hold the time at which they were compressed.
@pytest.mark.parametrize(
    "content",
    [gzip.compress(idx_bytes(9))[:-2000], idx_bytes(9), gzip.compress(b"1" * 99)[:-9]],
    ids=["cut_images", "not_compressed", "cut_checksum"],
)
def test_damaged_gzip(tmp_path: Path, content: bytes):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"images.gz cannot be read"):
        digits.read_idx(path)


def test_missing_files(mnist: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere does not exist: set data.root"):
        digits.load(DataConfig(root=str(tmp_path / "nowhere")))
    (mnist / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(InputError, match=r"neither t10k-images-idx3-ubyte nor .*data.download=true"):
        digits.load(DataConfig(root=str(mnist)))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local mirror that serves this directory; the first one of the list is down."""
    served = tmp_path / "served"
    served.mkdir()
    for name in digits.MD5:
        (served / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(12), mtime=0))
    checksum = hashlib.md5(gzip.compress(idx_bytes(12), mtime=0)).hexdigest()
    handler = partial(_QuietHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        monkeypatch.setattr(digits, "MD5", dict.fromkeys(digits.MD5, checksum))
        monkeypatch.setattr(digits, "MIRRORS", ("http://127.0.0.1:1/", f"http://127.0.0.1:{port}/"))
        yield served
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_download(mirror: Path, tmp_path: Path):
    config = DataConfig(root=str(tmp_path / "new"), download=True)
    assert len(digits.load(config).test) == 12
    for file in mirror.iterdir():
        file.unlink()
    assert len(digits.load(config).test) == 12, "files that are there are not fetched again"


def test_download_of_a_wrong_file(mirror: Path, tmp_path: Path):
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(13)))
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz could not be fetched.*hash.*set data.root"):
        digits.load(DataConfig(root=str(tmp_path / "new"), download=True))
    assert not list((tmp_path / "new").glob("train*"))


def test_real_mnist(real_data: Path):
    found = digits.load(DataConfig(root=str(real_data / "mnist")))
    assert (len(found.train), len(found.validation), len(found.test)) == (55_000, 5_000, 10_000)
    whole = np.concatenate([found.train, found.validation])
    assert (
        hashlib.md5(idx_bytes(0, promised=60_000) + whole.tobytes()).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
    )
