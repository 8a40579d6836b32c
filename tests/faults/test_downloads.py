"""A server that sends, but hardly."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from faceadv.store import datasets

BODY = b"x" * 200_000


@pytest.fixture
def server():
    """Sends BODY at /slow in ten parts in two seconds, and drips: at /body the body, at /head its head."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                return self.drip()
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            if self.path == "/body":
                return self.drip()
            for start in range(0, len(BODY), len(BODY) // 10):
                self.wfile.write(BODY[start : start + len(BODY) // 10])
                self.wfile.flush()
                time.sleep(0.2)

        def drip(self):
            while not ended.wait(0.1):
                self.wfile.write(b"x")
                self.wfile.flush()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("where", ["body", "head"])
def test_a_server_that_drips_is_not_followed(where, server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "PATIENCE", 1)
    (tmp_path / "old").write_text("what was there")
    with pytest.raises(RuntimeError, match="bytes a second") as caught:
        datasets.download(f"{server}/{where}", tmp_path / "old")
    assert str(caught.value).startswith(f"{server}/{where} sends less than 10,000 bytes a second, ")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "what was there")]


def test_what_comes_slowly_but_comes_is_waited_for(server, tmp_path, monkeypatch):
    """The time grows with what has come."""
    monkeypatch.setattr(datasets, "PATIENCE", 1)
    datasets.download(f"{server}/slow", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == BODY
