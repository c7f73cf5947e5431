"""A client of an OpenAI-compatible endpoint, such as a judge, by the standard library alone."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from llamapro.storage import byte_count, one_line, shown

KEY = "OPENAI_API_KEY"
MAX_BODY = 16 * 2**20  # bytes; an answer has a few thousand
PIECE = 2**16
CUT_OFF = (http.client.IncompleteRead, http.client.BadStatusLine, ConnectionResetError)
CUT_OFF += (ConnectionAbortedError, BrokenPipeError)
PASSING = (408, 429)  # and all from 500 on: the same may be answered well later


class EndpointError(RuntimeError):
    """An endpoint did not answer, and why; `passing` where the same may be answered later."""

    def __init__(self, reason: str, passing: bool = False):
        super().__init__(reason)
        self.passing = passing


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key would be sent to wherever it leads."""

    def redirect_request(self, *_):
        return None


@dataclass(frozen=True)
class Endpoint:
    """An address, to which /chat/completions is added, and the model that is asked for there.

    A key is taken from the environment variable OPENAI_API_KEY, and sent only where it is set.
    timeout: seconds that a try waits for an answer to begin and, piece by piece, to go on; one that
        is not whole by then is left with its next piece.
    waits: seconds before each further try, after an answer that says "later" (408, 429, 5xx), that
        does not come in time, is cut off or is no JSON. Any other refusal is final.
    """

    url: str
    model: str
    timeout: float = 120.0
    waits: tuple[float, ...] = (1.0, 4.0, 16.0)

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"an endpoint at http:// or https:// expected, got {shown(self.url)}")

    def check(self) -> None:
        """Ask for one token. Raises EndpointError where the address, the key or the model is no
        good, without a second try unless the endpoint says that one may help."""
        self.chat([{"role": "user", "content": "Say yes."}], max_tokens=1, temperature=0.0)

    def chat(self, messages: list[dict], *, max_tokens: int, temperature: float) -> str:
        """The answer to a conversation; empty where the endpoint has no content to give.

        Raises EndpointError, with the last try's reason, when no try brought one.
        """
        asked = {"max_tokens": max_tokens, "temperature": temperature}
        body = json.dumps({"model": self.model, "messages": messages, **asked}).encode()
        for wait in (*self.waits, None):
            try:
                return _content(self._post(body))
            except EndpointError as error:
                reason = f"{self.url}: {error}"
                if not error.passing:
                    raise EndpointError(reason) from None
                if wait is None:
                    last = len(self.waits) + 1
                    raise EndpointError(f"{reason}; given up after try {last}") from None
            time.sleep(wait)

    def _post(self, body: bytes) -> bytes:
        """What comes back, whole. Raises EndpointError for anything else."""
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, body, self._headers(), method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        deadline = time.monotonic() + self.timeout
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                passing = error.code in PASSING or error.code >= 500
                raise EndpointError(self._said(error), passing) from None
        except (http.client.HTTPException, OSError) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> EndpointError:
        """An error of the connection; urllib wraps those that come before an answer begins."""
        error = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(error, TimeoutError):
            return self._too_late()
        if isinstance(error, CUT_OFF):
            return EndpointError(f"cut off: {_named(error)}", passing=True)
        return EndpointError(f"not reached: {_named(error)}")

    def _read(self, response, deadline: float) -> bytes:
        """A body in pieces, since a socket's own timeout starts anew with each byte."""
        body = b""
        while piece := response.read1(PIECE):
            body += piece
            if len(body) > MAX_BODY:
                raise EndpointError(f"at most {byte_count(MAX_BODY)} expected, got more")
            if time.monotonic() > deadline:
                raise self._too_late()
        if response.length:  # what the header announced and did not come
            raise http.client.IncompleteRead(body, response.length)
        return body

    def _too_late(self) -> EndpointError:
        return EndpointError(f"no whole answer within {self.timeout:g} s", passing=True)

    def _said(self, error: urllib.error.HTTPError) -> str:
        """A refusal and what the endpoint says of it, without the key, which some repeat."""
        try:
            said = error.read1(PIECE).decode("utf-8", errors="replace")
        except (http.client.HTTPException, OSError):  # the status says enough
            said = ""
        text, key = f"HTTP {error.code} {error.reason} {said}", _key()
        return one_line(text.replace(key, "***") if key else text, 300)

    def _headers(self) -> dict[str, str]:
        key = _key()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY}: printable ASCII expected, got something else")
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        return {"Content-Type": "application/json", **authorization}


def _named(error) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        content = body
    if content is not None and not isinstance(content, str):
        got = one_line(body[:200].decode("utf-8", errors="replace"), 100)
        expected = "JSON with choices[0].message.content expected"
        raise EndpointError(f"{expected}, got {shown(got)}", passing=True)
    return content or ""
