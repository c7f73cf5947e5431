"""Who may import whom: a file imports only files above it, so there is no circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ANYWHERE = {"storage", "hardware", "markdown"}
# Top to bottom. The packages below them follow the same rule among their own files.
LAYERS = [
    *("architectures", "config", "placement", "model_files", "tokenizer", "hf", "generate"),
    *("ranks", "frozen", "model", "proof", "decoder", "expansion", "new_block_files", "new_blocks"),
    *("planner", "planner_ranks", "data", "eval", "train"),
    *("report_benchmarks", "report_pictures", "report"),
    *("chat", "command_line", "inference", "cli", "__main__", "integrations"),
]
INSIDE = {
    "data": [
        *("tokens", "packing", "mixture", "sources", "chat", "decontaminate", "shards", "prepare")
    ],
    "eval": [
        *("perplexity", "importance", "scoring", "completion", "harness", "tasks"),
        *("sandbox_init", "sandbox", "records", "code_shots", "code", "endpoint", "dialogue"),
        *("graders", "mint", "trace", "evaluate"),
    ],
    "train": [
        *("trackers", "config", "prompts", "replay", "keep", "stopping", "optimizer"),
        *("progress", "metrics", "parallel", "checkpoint", "sharded", "run", "loop", "dry_run"),
    ],
    "integrations": ["stack", "keeping", "transformers"],
}
# The kernels' package needs torch and, where there is one, Triton.
NEEDED = {"torch", "triton", "llamapro_kernels"}


def imports(file, package):
    """(first name, second name or None) of everything below `package` that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == package and rest:
                yield rest[0], rest[1] if len(rest) > 1 else None


def layers_of(file):
    """Its layer, and its name in a package below."""
    parts = file.relative_to(ROOT / "python" / "llamapro").with_suffix("").parts
    return parts[0], parts[1] if len(parts) > 1 else None


FILES = [f for f in (ROOT / "python" / "llamapro").rglob("*.py") if f.name != "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(filter(None, layers_of(file))))
def test_a_file_imports_only_what_is_above_it(file):
    layer, inner = layers_of(file)
    assert layer in LAYERS or layer in ANYWHERE, f"{file} has no place in the order"
    for first, second in imports(file, "llamapro"):
        if first == "__version__":
            continue
        if layer in ANYWHERE:
            assert first in ANYWHERE
        elif first == layer:
            assert INSIDE[layer].index(second) < INSIDE[layer].index(inner), (file, second)
        elif first not in ANYWHERE:
            assert LAYERS.index(first) < LAYERS.index(layer), (file, first)


def test_data_knows_no_model_and_only_recipes_import_the_command_line():
    for file in FILES:
        layer, _ = layers_of(file)
        names = {first for first, _ in imports(file, "llamapro")}
        assert layer != "data" or not names & {"model", "expansion"}
        assert layer == "__main__" or "cli" not in names
        assert not list(imports(file, "recipes"))


def test_the_kernels_import_torch_and_triton_alone():
    for file in (ROOT / "llamapro_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            first = {name.split(".")[0] for name in names}
            assert first <= NEEDED | set(sys.stdlib_module_names), (file, first)
