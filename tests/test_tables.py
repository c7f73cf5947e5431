"""The tables of the README and of docs/ are those that the results make."""

import re
import subprocess
import sys

import pytest

from benchmarks import tables
from benchmarks.gpu.report import step_markdown

README, BENCHMARKS, PAPER, EVALUATION = tables.DOCUMENTS
ROW = {
    **{"model": "M", "placement": "all", "batch": 1, "side": "ours", "tokens/s": 10.0},
    **{"TFLOP/s": 50.0, "roof TFLOP/s": 200.0, "peak GB": 1.25},
}
REPORT = {"device": "GPU", **dict.fromkeys(("commit", "torch", "triton", "transformers"), "1")}
REPORT["liger-kernel"] = "1"


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_up_to_date(document):
    """`python -m benchmarks.tables` writes them."""
    text = document.read_text(encoding="utf-8")
    assert tables.fill(text, document.name) == text


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_no_table_is_typed(document):
    around = tables.TABLE.sub("", document.read_text(encoding="utf-8"))
    assert "<!--" not in around and not re.search(r"^\|", around, re.M)


def test_every_result_has_its_table():
    pages = (BENCHMARKS, PAPER, EVALUATION)
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    names = [path.name for path in (tables.ROOT / "benchmarks" / "results").glob("*.json")]
    assert names and [name for name in names if name not in text] == []


def test_a_changed_figure_is_put_right():
    text = README.read_text(encoding="utf-8")
    changed = text.replace("| 14580 |", "| 15580 |")
    assert changed != text == tables.fill(changed, "README.md")


def test_a_table_that_is_not_there():
    with pytest.raises(ValueError, match=r"page\.md: a table of \[.*\] expected, got 'stpes'"):
        tables.fill("<!-- table: stpes -->\n<!-- end -->", "page.md")


def test_no_torch_is_needed():
    code = "import sys, benchmarks.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tables.ROOT).returncode == 0


def test_a_step_that_failed_says_why():
    """The roof is the median of the others, and the fastest comes first."""
    failed = {**{key: ROW[key] for key in ("model", "placement", "batch")}, "side": "transformers"}
    slower = {**ROW, "side": "composition", "tokens/s": 5.0, "roof TFLOP/s": 100.0}
    rows = [{**failed, "failed": "out of memory"}, slower, ROW]
    _, _, _, _, *lines = step_markdown({**REPORT, "rows": rows}).splitlines()
    assert lines == [
        "| M | full fine-tuning | 1 x 4096 | this library | 10 | 0.33 | 1.2 |",
        "| M | full fine-tuning | 1 x 4096 | our model in plain PyTorch, SDPA | 5 | 0.33 | 1.2 |",
        "| M | full fine-tuning | 1 x 4096 | transformers | out of memory |  |  |",
    ]
    assert "roof" not in step_markdown({**REPORT, "rows": rows[:1]}).splitlines()[0]
