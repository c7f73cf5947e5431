"""The frame of the tests that change files at random: how they are changed, and what must hold.

Whatever a file holds, reading it works, or a message of one line says why not; nothing hangs.
"""

import faulthandler
import json
import os
import signal
import struct
from contextlib import contextmanager

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS = 10  # for what takes a few milliseconds
SAID_IN_ONE_LINE = (ValueError, OSError, RuntimeError, ArithmeticError, IndexError)


class Hang(BaseException):
    """Reading did not end; no error, which a reader could catch."""


def try_changes(examples, change, read, after=lambda result: None):
    """So many changes, each made by `change(draw)`; some are read, others refused.

    `read` gets what `change` returned, `after` what `read` did, or None where it refused.
    """
    ended = set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def tried(data):
        changed, result = change(data.draw), None
        try:
            with in_time():
                result = read(changed)
            ended.add("read")
        except SAID_IN_ONE_LINE as error:
            ended.add("refused")
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, str(error)
        after(result)

    tried()
    assert ended == {"read", "refused"}


@contextmanager
def in_time():
    """Raise Hang after some seconds; end all where foreign code does not let Python do that."""

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def nested(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


NAMES = ["../outside/model-00001-of-00002.safetensors", "../outside", "/dev/zero", ".", "", "a\nb"]
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.5, 2.5, 1e-300, 1e308, float("nan"), float("inf"), "1", "x", "\0", "\ud800", "é\n\n"),
    *("llama3", "x" * 5000, [], [[]], {}, {"": {}}, [0], [-1], ["a", 1, None], {"rope_type": []}),
    *([10**9] * 50, nested(40), nested(400), *NAMES),
]
# Settings that the files do not have.
ADDED = ["quantization_config", "layer_types", "architectures", "llama_pro", "head_dim"]
ADDED += ["rope_scaling", "attention_dropout", "__metadata__", "padding", "added_tokens", "x\ny"]


def keys(value):
    return list(value) if isinstance(value, dict) else range(len(value))


def one_of(choices, draw):
    """By number: Hypothesis would print the whole."""
    return choices[draw(st.integers(0, len(choices) - 1))]


def changed_json(value, draw):
    """Something somewhere in it is replaced, removed or added."""
    places = [(value, key) for key in keys(value)]
    for parent, key in places:
        if isinstance(parent[key], dict | list):
            places += [(parent[key], k) for k in keys(parent[key])]
    parent, key = one_of(places, draw)
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "copy"]))
    if kind == "remove":
        del parent[key]
    elif kind == "add":
        value[draw(st.sampled_from(ADDED))] = one_of(VALUES, draw)
    elif kind == "copy":
        other, place = one_of(places, draw)
        parent[key] = json.loads(json.dumps(other[place]))
    else:
        parent[key] = one_of(VALUES, draw)
    return value


def change_json(content, draw):
    return json.dumps(changed_json(json.loads(content), draw)).encode()


def change_depth(content, draw):
    """Deeper than the parser goes."""
    key = draw(st.sampled_from([*json.loads(content), "x"]))
    levels = draw(st.sampled_from([500, 100_000]))
    return content.rstrip()[:-1] + f', "{key}": {"[" * levels}{"]" * levels}}}'.encode()


def change_header(content, draw):
    (length,) = struct.unpack("<Q", content[:8])
    header = change_json(content[8 : 8 + length], draw)
    said = draw(st.sampled_from([len(header)] * 4 + [0, len(header) - 1, 2**40, 2**64 - 1]))
    return struct.pack("<Q", said) + header + content[8 + length :]


def change_bytes(content, draw):
    start = draw(st.integers(0, max(0, len(content) - 1)))
    end = draw(st.integers(start, min(len(content), start + 8)))
    return content[:start] + draw(st.binary(max_size=8)) + content[end:]


def truncate(content, draw):
    return content[: draw(st.integers(0, len(content)))]


def change_contents(file, draw):
    ways = [change_bytes, truncate]
    if file.suffix == ".json":
        ways += [change_json] * 6 + [change_depth]
    elif file.suffix == ".safetensors":
        ways += [change_header] * 4
    file.write_bytes(draw(st.sampled_from(ways))(file.read_bytes(), draw))


def not_a_file(file, draw):
    """Something else in its place."""
    file.unlink()
    place = draw(st.sampled_from(["none", "folder", "FIFO", "link"]))
    if place == "folder":
        file.mkdir()
    elif place == "FIFO":
        os.mkfifo(file)
    elif place == "link":
        targets = [f"../outside/{file.name}", "../outside", "/dev/zero", file.name, "config.json"]
        file.symlink_to(draw(st.sampled_from(targets)))


def change_file(file, draw):
    """Another content for the file, or something else in its place."""
    draw(st.sampled_from([change_contents] * 7 + [not_a_file]))(file, draw)
