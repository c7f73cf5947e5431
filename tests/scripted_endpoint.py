"""An OpenAI-compatible endpoint on loopback that answers as a test says."""

import json
import threading
from contextlib import contextmanager
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llamapro.eval.endpoint import Endpoint

TIMEOUT = 0.5  # for an endpoint that is too slow; others have all the time they need


class Broken(Enum):
    """What it may do instead of saying a text (str) or refusing with a status (int)."""

    SLOW = auto()  # no answer within the timeout
    TRICKLE = auto()  # a byte now and then, so that no single wait is long
    CUT_OFF = auto()  # less than its header announced
    CLOSED = auto()  # not even a header
    NO_JSON = auto()
    NO_CHOICE = auto()  # JSON of another kind
    ELSEWHERE = auto()  # a redirect


@contextmanager
def scripted(reply, check="yes", **settings):
    """Yields an Endpoint and the requests that reach it; `reply` takes one and says what comes
    back. `Endpoint.check` is answered by `check`, and not among the requests."""
    requests, over = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["max_tokens"] == 1:
                return self.answer(check)
            requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            self.answer(reply(requests[-1]))

        def answer(self, what):
            content = json.dumps({"choices": [{"message": {"content": what}}]}, default=str)
            if isinstance(what, int):
                return self.send(json.dumps({"error": f"no {self.headers['Authorization']}"}), what)
            if what is Broken.SLOW:
                over.wait()
            elif what is Broken.TRICKLE:
                return self.trickle(content)
            elif what is Broken.CUT_OFF:
                return self.send(content[:-9], announced=len(content))
            elif what is Broken.CLOSED:
                return self.close_connection
            elif what is Broken.ELSEWHERE:
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/other")
                return self.end_headers()
            changed = {Broken.NO_JSON: content[:-1], Broken.NO_CHOICE: '{"error": "busy"}'}
            return self.send(changed.get(what, content))

        def trickle(self, content):
            self.send("", announced=len(content))
            for byte in content.encode():
                if over.wait(TIMEOUT / 3):
                    return
                self.wfile.write(bytes([byte]))

        def send(self, content, status=200, announced=None):
            self.send_response(status)
            self.send_header("Content-Length", str(announced or len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client went away, as it should
                self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield (
            Endpoint(url, **{"model": "j", "timeout": 30.0, "waits": (0.0,), **settings}),
            requests,
        )
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
