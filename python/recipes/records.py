"""What every experiment notes of itself."""

import json
import subprocess
from pathlib import Path

from llamapro.storage import read_json, shown, write_json


def commit() -> str:
    """Of the working tree, as git describes it."""
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def settle(file: Path, setting: dict) -> dict:
    """Write a setting, or compare it with the one that is there, and return it as JSON has it.

    Raises ValueError for a value that differs.
    """
    setting = json.loads(json.dumps(setting, default=str))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, setting)
    before = read_json(file)
    for name, value in setting.items():
        if before.get(name) != value:
            got = shown(before.get(name))
            raise ValueError(f"{file}: {name} {shown(value)} expected, got {got}; name another out")
    return setting
