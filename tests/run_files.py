"""What tests read from a run directory, and how they damage it."""

import json
from pathlib import Path


def records(config, key="loss"):
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def flip(file, place):
    """The lowest bit of a byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
