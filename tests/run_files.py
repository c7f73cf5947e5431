"""What tests read from a run directory, and how they damage it."""

import json
from pathlib import Path

import numpy as np
from llamapro.data.tokens import Tokens


def records(config, key="loss"):
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def one_document(ids):
    return Tokens(np.asarray(ids), np.array([len(ids)]))


def flip(file, place):
    """The lowest bit of a byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
