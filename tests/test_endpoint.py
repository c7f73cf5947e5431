"""The client of an OpenAI-compatible endpoint, against one that answers well, badly or not."""

import socket
import time

import pytest
from llamapro.eval.endpoint import Endpoint, EndpointError
from scripted_endpoint import TIMEOUT, Broken, scripted

ASKED = [{"role": "user", "content": "how?"}]
LATER = [408, 429, 500, 503, *(b for b in Broken if b is not Broken.ELSEWHERE)]


TOO_SLOW = {trouble: {"timeout": TIMEOUT} for trouble in (Broken.SLOW, Broken.TRICKLE)}


def ask(endpoint, **asked):
    return endpoint.chat(ASKED, **{"max_tokens": 9, "temperature": 0.5, **asked})


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize("key", [None, "", " secret\n"])
def test_what_is_asked(key, monkeypatch):
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with scripted(lambda _: "so é", model="the model") as (endpoint, requests):
        assert ask(endpoint) == "so é"
    body = {"model": "the model", "messages": ASKED, "max_tokens": 9, "temperature": 0.5}
    key = "Bearer secret" if key and key.strip() else None
    assert requests == [{**body, "path": "/v1/chat/completions", "key": key}]


def test_no_content_is_an_empty_answer():
    with scripted(lambda _: None) as (endpoint, _):
        assert ask(endpoint) == ""


@pytest.mark.parametrize("trouble", LATER)
def test_what_may_pass_is_tried_again(trouble):
    replies = iter([trouble, "well"])
    with scripted(lambda _: next(replies), **TOO_SLOW.get(trouble, {})) as (endpoint, requests):
        assert ask(endpoint) == "well" and len(requests) == 2


REASONS = {
    429: "HTTP 429 Too Many Requests",
    500: "HTTP 500 Internal Server Error",
    Broken.SLOW: f"no whole answer within {TIMEOUT} s",
    Broken.TRICKLE: f"no whole answer within {TIMEOUT} s",
    Broken.CUT_OFF: "cut off: IncompleteRead",
    Broken.CLOSED: "cut off: RemoteDisconnected",
    Broken.NO_JSON: r"JSON with choices\[0\].message.content expected, got ",
    Broken.NO_CHOICE: r"expected, got .*busy",
}


@pytest.mark.parametrize("trouble", REASONS)
def test_what_does_not_pass_has_a_reason(trouble):
    with scripted(lambda _: trouble, **TOO_SLOW.get(trouble, {})) as (endpoint, requests):
        with pytest.raises(EndpointError, match=f"^{endpoint.url}: .*{REASONS[trouble]}") as raised:
            ask(endpoint)
        assert len(requests) == 2 and str(raised.value).endswith("; given up after try 2")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("trouble", [400, 401, 403, 404, Broken.ELSEWHERE])
def test_a_refusal_is_final_and_never_shows_the_key(trouble, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with scripted(lambda _: trouble, check=trouble) as (endpoint, requests):
        for call in (ask, Endpoint.check):
            with pytest.raises(EndpointError, match="HTTP") as raised:
                call(endpoint)
            assert "secret" not in str(raised.value)
    assert len(requests) == 1


def test_waits_grow(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    waits = Endpoint("http://x", "").waits
    with (
        scripted(lambda _: 429, waits=waits) as (endpoint, requests),
        pytest.raises(EndpointError),
    ):
        ask(endpoint)
    assert slept == [1.0, 4.0, 16.0] and len(requests) == 4


def test_nobody_there_is_said_at_once():
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=f"^{url}: not reached: ConnectionRefusedError"):
            Endpoint(url, "j", waits=(60.0,)).check()


def test_an_address_or_key_that_is_none(monkeypatch):
    for url in ("file:///etc/hostname", "127.0.0.1:80", ""):
        with pytest.raises(ValueError, match="http:// or https:// expected, got"):
            Endpoint(url, "j")
    with pytest.raises(EndpointError, match="not reached: InvalidURL"):
        Endpoint("http://a b/v1", "j", waits=(60.0,)).check()
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(ValueError, match=r"^OPENAI_API_KEY: printable ASCII expected") as raised:
        Endpoint("http://127.0.0.1:9/v1", "j").check()
    assert "ret" not in str(raised.value)


def test_a_body_without_an_end_is_left(monkeypatch):
    monkeypatch.setattr("llamapro.eval.endpoint.MAX_BODY", 1000)
    with (
        scripted(lambda _: "x" * 2000) as (endpoint, requests),
        pytest.raises(EndpointError, match=r"at most 1\.00 kB expected, got more"),
    ):
        ask(endpoint)
    assert len(requests) == 1
