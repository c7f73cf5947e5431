"""What a user has after `pip install`: the README's example, the command line, the compiled ops.

Run with the interpreter of an environment in which the wheel is all there is, from a folder that
is not the repository's.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from llamapro import Llama, LlamaConfig

import llamapro_kernels as lk
from llamapro_kernels import cpu

README = Path(__file__).parent.parent / "README.md"
PACKAGE = Path(lk.__file__).parent


def main():
    assert "site-packages" in PACKAGE.parts, f"the wheel's own package expected, got {PACKAGE}"
    assert not list(PACKAGE.parent.glob("recipes")), "recipes are not installed"
    assert (PACKAGE / "py.typed").exists()
    if cpu.WHY_NO_BUILD is None:
        assert set(lk.backends("cpu").values()) == {"cpp"}
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
        Llama(config).save_pretrained("path/to/llama")
        names = {}
        exec(code, names)
        assert names["loss"].isfinite()
        command = [sys.executable, "-m", "llamapro", "plan", "path/to/new", "--new-blocks", "2"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "interleaved" in said and "top_half" in said, said
    print(f"the wheel runs the README's example, torch {torch.__version__}, {PACKAGE}")


if __name__ == "__main__":
    main()
