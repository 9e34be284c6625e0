"""Weights by URL, from real servers on this machine: the right file, whole, or none."""

import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from focalnet_det.checkpoint import read_checkpoint
from focalnet_det.checkpoint.zoo import resolve_weights


def saved(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.full((3000,), value)}, buffer)
    return buffer.getvalue()


@contextmanager
def site(pages: dict[str, bytes], cut: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serve pages by path; of each the last `cut` bytes are promised and not sent.

    Yields: the address, and the paths that were asked for.
    """
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = pages.get(self.path)
            if page is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page[: len(page) - cut])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOCALNET_DET_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


def value_of(url: str) -> float:
    return float(read_checkpoint(resolve_weights(url)).tensors["a"][0])


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_one_name_of_several_sites_is_several_files() -> None:
    pages = {"/v1/model.pth": saved(1), "/v2/model.pth": saved(2), "/model.pth?id=3": saved(3)}
    with site(pages) as (first, asked), site({"/v1/model.pth": saved(4)}) as (second, _):
        for _ in range(2):
            assert value_of(f"{first}/v1/model.pth") == 1
            assert value_of(f"{first}/v2/model.pth") == 2
            assert value_of(f"{first}/model.pth?id=3") == 3
            assert value_of(f"{second}/v1/model.pth") == 4
        assert asked == list(pages)
        assert resolve_weights(f"{first}/model.pth?id=3").name == "model.pth"
    # The cache needs no server.
    assert value_of(f"{first}/v1/model.pth") == 1


def test_partial_downloads_leave_nothing(folder: Path) -> None:
    with (
        site({"/a.pth": saved(1)}, cut=500) as (address, _),
        pytest.raises(ValueError, match=r"Could not download .*a\.pth: .*cut off"),
    ):
        resolve_weights(f"{address}/a.pth")
    assert files_in(folder) == []


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"<!DOCTYPE html><html>Please sign in", "not an intact checkpoint: it is an HTML page"),
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (None, "HTTP Error 404"),
    ],
)
def test_answers_that_are_no_checkpoints(page: bytes | None, message: str, folder: Path) -> None:
    with (
        site({} if page is None else {"/a.pth": page}) as (address, _),
        pytest.raises(ValueError, match=f"{message}.*Download it another way"),
    ):
        resolve_weights(f"{address}/a.pth")
    assert files_in(folder) == []


def test_pinned_hashes(folder: Path) -> None:
    content = saved(1)
    digest = hashlib.sha256(content).hexdigest()
    with site({"/a.pth": content}) as (address, asked):
        url = f"{address}/a.pth"
        with pytest.raises(ValueError, match=f"has sha256 {digest}, expected 00"):
            resolve_weights(f"{url}#sha256={'0' * 64}")
        assert files_in(folder) == []
        path = resolve_weights(f"{url}#sha256={digest.upper()}")
        assert path.read_bytes() == content
        assert resolve_weights(url) == path
        assert len(asked) == 2
        path.write_bytes(saved(2))
        with pytest.raises(ValueError, match=rf"expected {digest}; remove .*a\.pth to download"):
            resolve_weights(f"{url}#sha256={digest}")


def test_file_urls(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(saved(7))
    assert value_of((tmp_path / "a.pth").as_uri()) == 7
    with pytest.raises(ValueError, match="Could not download file:"):
        resolve_weights((tmp_path / "b.pth").as_uri())
