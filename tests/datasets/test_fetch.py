"""Every way a download can fail, against a real server on this machine; the cache never keeps a bad file."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import spatiaflow as sf
from spatiaflow.datasets import _fetch

GOOD = b"genes and spots\n" * 1000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind == "missing":
            self.send_error(404)
            return
        body = GOOD if kind != "wrong" else GOOD[::-1]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "truncated":
            self.wfile.write(body[:500])
        elif kind == "stalled":
            self.wfile.write(body[:500])
            self.wfile.flush()
            time.sleep(3)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Point the registry at one address; return the cache folder."""

    def point(url):
        entry = {"set": {"sub/a+b.txt": _fetch.Source(url, hashlib.sha256(GOOD).hexdigest(), len(GOOD))}}
        monkeypatch.setattr(_fetch, "registry", lambda: entry)
        return tmp_path / "cache"

    with sf.settings.override(cache_dir=tmp_path / "cache", mirror=None):
        yield point


def kept(cache):
    return [p for p in cache.rglob("*") if p.is_file()] if cache.exists() else []


def test_good_file_is_kept_and_not_fetched_again(server, registry):
    cache = registry(f"{server}/good/x")
    (path,) = _fetch.fetch("set", "sub/a+b.txt")
    assert path.read_bytes() == GOOD
    assert path == (cache / "set" / "sub" / "a+b.txt").resolve()
    registry(f"{server}/missing/x")
    assert _fetch.fetch("set") == [path]


@pytest.mark.parametrize("kind", ["wrong", "truncated", "stalled", "missing"])
def test_bad_downloads_say_what_to_do_and_leave_nothing(server, registry, monkeypatch, kind):
    monkeypatch.setattr(_fetch, "TIMEOUT", 0.5)
    monkeypatch.setattr(_fetch, "RETRIES", 0)
    cache = registry(f"{server}/{kind}/x")
    with pytest.raises(OSError, match="SPATIAFLOW_MIRROR") as error:
        _fetch.fetch("set")
    assert f"{server}/{kind}/x" in str(error.value)
    assert not kept(cache)


def test_no_network_and_no_mirror(registry, monkeypatch):
    monkeypatch.setattr(_fetch, "RETRIES", 0)
    cache = registry("http://127.0.0.1:9/x")
    with pytest.raises(OSError, match="settings.mirror"):
        _fetch.fetch("set")
    assert not kept(cache)


def test_damaged_cache_is_replaced(server, registry):
    cache = registry(f"{server}/good/x")
    path = cache / "set" / "sub" / "a+b.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(GOOD[:10])
    assert _fetch.fetch("set")[0].read_bytes() == GOOD


def test_mirror_folder_and_mirror_url_come_first(server, registry, tmp_path):
    registry("http://127.0.0.1:9/x")
    folder = tmp_path / "mirror" / "set" / "sub"
    folder.mkdir(parents=True)
    (folder / "a+b.txt").write_bytes(GOOD)
    with sf.settings.override(mirror=str(tmp_path / "mirror")):
        assert _fetch.fetch("set")[0].read_bytes() == GOOD
    with sf.settings.override(mirror=f"{server}/good", cache_dir=tmp_path / "other"):
        assert _fetch.fetch("set")[0].read_bytes() == GOOD


def test_spoiled_mirror_is_not_believed(server, registry, tmp_path, monkeypatch):
    monkeypatch.setattr(_fetch, "RETRIES", 0)
    folder = tmp_path / "mirror" / "set" / "sub"
    folder.mkdir(parents=True)
    (folder / "a+b.txt").write_bytes(GOOD[::-1])
    with sf.settings.override(mirror=str(tmp_path / "mirror")):
        registry(f"{server}/good/x")
        assert _fetch.fetch("set")[0].read_bytes() == GOOD  # falls through to the public address
    with sf.settings.override(mirror=str(tmp_path / "nowhere"), cache_dir=tmp_path / "other"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            _fetch.fetch("set")


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="her2st"):
        _fetch.fetch("her2")
    with pytest.raises(ValueError, match="C2.jpg"):
        _fetch.fetch("her2st", "Z9.jpg")


def test_registry_is_complete():
    known = _fetch.registry()
    assert sum(map(len, known.values())) == 1273
    assert all(len(s.sha256) == 64 and s.url.startswith("https://") for files in known.values() for s in files.values())
