import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(tiny, tmp_path, monkeypatch):
    """The README's Python, as it is there, on a tiny model in the place of the named one."""
    monkeypatch.chdir(tmp_path)
    tiny(num_hidden_layers=8).save_pretrained("path/to/llama")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert names["loss"].isfinite() and (tmp_path / "path/to/new/config.json").exists()


def test_every_named_command_exists():

    cli = pytest.importorskip("llamapro.cli")
    named = set(re.findall(r"^llamapro (\w+)", README, re.M))
    assert named == set(cli.COMMANDS)
