"""Every way a download can fail, against a real server on this machine; the cache never keeps a bad file."""

import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
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
        if kind not in ("short", "endless", "drip"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "truncated":
            self.wfile.write(body[:500])
        elif kind == "short":  # the length is not stated, so only the hash tells
            self.wfile.write(body[:500])
        elif kind == "endless":
            self.server.sent = 0
            while self.server.sent < 100 * len(body):
                self.wfile.write(body)
                self.server.sent += len(body)
                time.sleep(0.001)
        elif kind == "drip":  # never long enough without a byte to count as stalled
            for i in range(100):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                time.sleep(0.05)
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
        httpd.handle_error = lambda *_: None  # a client that hangs up, as it should
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


def entry(file="sub/a+b.txt", url="http://127.0.0.1:9/x"):
    return {"set": {file: _fetch.Source(url, hashlib.sha256(GOOD).hexdigest(), len(GOOD))}}


def test_good_file_is_kept_and_not_fetched_again(server, registry):
    cache = registry(f"{server}/good/x")
    (path,) = _fetch.fetch("set", "sub/a+b.txt")
    assert path.read_bytes() == GOOD
    assert path == (cache / "set" / "sub" / "a+b.txt").resolve()
    registry(f"{server}/missing/x")
    assert _fetch.fetch("set") == [path]


@pytest.mark.parametrize("kind", ["wrong", "truncated", "short", "stalled", "missing", "endless", "drip"])
def test_bad_downloads_say_what_to_do_and_leave_nothing(server, registry, monkeypatch, kind):
    monkeypatch.setattr(_fetch, "TIMEOUT", 0.5)
    monkeypatch.setattr(_fetch, "LEAST", 0.5)
    monkeypatch.setattr(_fetch, "RETRIES", 0)
    cache, begin = registry(f"{server}/{kind}/x"), time.monotonic()
    with pytest.raises(OSError, match="SPATIAFLOW_MIRROR") as error:
        _fetch.fetch("set")
    assert f"{server}/{kind}/x" in str(error.value)
    said = {"endless": "more than the 16000 bytes", "drip": r"too slow: \d+ of 16000 bytes in 1 sec", "missing": "404"}
    if kind in ("wrong", "truncated", "short"):
        n, body = (16000, GOOD[::-1]) if kind == "wrong" else (500, GOOD[:500])
        said[kind] = (
            f"gave {n} bytes with sha256 {hashlib.sha256(body).hexdigest()}; expected are 16000 bytes with sha256 "
        )
        said[kind] += hashlib.sha256(GOOD).hexdigest()
    assert re.search(said.get(kind, ""), str(error.value))
    assert time.monotonic() - begin < 4
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


def test_a_mirror_of_short_files_says_both_hashes(registry, tmp_path):
    folder = tmp_path / "mirror" / "set" / "sub"
    folder.mkdir(parents=True)
    (folder / "a+b.txt").write_bytes(GOOD[:100])
    registry("http://127.0.0.1:9/x")
    with sf.settings.override(mirror=str(tmp_path / "mirror")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fetch, "RETRIES", 0)
        with pytest.raises(
            OSError, match=r"mirror.*gave 100 bytes with sha256 \w{64}; expected are 16000 bytes with sha256 \w"
        ):
            _fetch.fetch("set")


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "/etc/x", "a/../../x", "a/./x", "a//x", "a\\..\\x", "C:x", "a/", "a\0b"]
)
def test_names_that_leave_the_cache_are_refused(registry, tmp_path, monkeypatch, name):
    registry("http://127.0.0.1:9/x")
    monkeypatch.setattr(_fetch, "registry", lambda: entry(name))
    with pytest.raises(ValueError, match="no plain name of a file inside the cache"):
        _fetch.fetch("set")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("link", ["set", "set/sub", "set/sub/a+b.txt"])
def test_links_that_leave_the_cache_are_refused(server, registry, tmp_path, link):
    cache = registry(f"{server}/good/x")
    (tmp_path / "elsewhere").mkdir()
    (cache / link).parent.mkdir(parents=True)
    (cache / link).symlink_to(tmp_path / "elsewhere" / ("file" if link.endswith("txt") else ""))
    with pytest.raises(ValueError, match=r"a link to .*elsewhere.*outside the cache.*sf\.settings\.cache_dir"):
        _fetch.fetch("set")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_cache_itself_may_be_a_link(server, registry, tmp_path):
    cache = registry(f"{server}/good/x")
    (tmp_path / "disk").mkdir()
    cache.symlink_to(tmp_path / "disk")
    assert _fetch.fetch("set")[0].read_bytes() == GOOD
    assert cache.is_symlink() and kept(tmp_path / "disk")


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_files_of_a_shared_cache_may_be_read_as_the_umask_says(server, registry, umask):
    registry(f"{server}/good/x")
    before = os.umask(umask)
    try:
        (path,) = _fetch.fetch("set")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_is_told_and_nothing_is_left(server, registry, monkeypatch):
    cache = registry(f"{server}/good/x")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="the disk is full: 'sub/a.b.txt' of dataset 'set' .*another disk"):
        _fetch.fetch("set")
    assert not kept(cache)


SLOW = """
import sys, time, hashlib
import spatiaflow as sf
from spatiaflow.datasets import _fetch
url, cache, size = sys.argv[1], sys.argv[2], int(sys.argv[4])
source = _fetch.Source(url, sys.argv[3], size)
_fetch.registry = lambda: {"set": {"sub/a+b.txt": source}}
sf.settings.cache_dir, sf.settings.mirror, sf.settings.progress = cache, None, False
print("ready", flush=True)
input()
print(hashlib.sha256(_fetch.fetch("set")[0].read_bytes()).hexdigest())
"""


def process(url, cache):
    words = [url, str(cache), hashlib.sha256(GOOD).hexdigest(), str(len(GOOD))]
    out = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert out.stdout.readline() == "ready\n"
    return out


@pytest.mark.slow
def test_two_processes_that_fetch_one_file_both_get_it(server, registry):
    cache = registry(f"{server}/good/x")
    both = [process(f"{server}/good/x", cache) for _ in range(2)]
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.communicate()[0].strip() for one in both] == 2 * [hashlib.sha256(GOOD).hexdigest()]
    assert [path.name for path in kept(cache)] == ["a+b.txt"]


def test_what_a_killed_download_left_is_removed_by_the_next(server, registry):
    cache = registry(f"{server}/good/x")
    killed = process(f"{server}/drip/x", cache)
    killed.stdin.write("\n")
    killed.stdin.flush()
    while not list(cache.glob("set/.fetching-*/*/*")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert kept(cache), "nothing was left to remove"
    assert _fetch.fetch("set")[0].read_bytes() == GOOD
    assert [path.name for path in cache.rglob("*")] == ["set", "sub", "a+b.txt"]


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="her2st"):
        _fetch.fetch("her2")
    with pytest.raises(ValueError, match="C2.jpg"):
        _fetch.fetch("her2st", "Z9.jpg")


def test_registry_is_complete():
    known = _fetch.registry()
    assert sum(map(len, known.values())) == 1273
    assert all(len(s.sha256) == 64 and s.url.startswith("https://") for files in known.values() for s in files.values())
