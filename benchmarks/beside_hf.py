"""Our model of lm-eval beside lm-eval's own `hf` backend: every answer, and the time.

python -m benchmarks.beside_hf MODEL --data-root BENCH --tasks hellaswag --limit 200
"""

import json
import subprocess
import time
from pathlib import Path

import torch
import tyro
from llamapro import Llama
from llamapro.eval.evaluate import ask
from llamapro.eval.harness import Harness
from llamapro.hardware import environment
from llamapro.storage import write_json


def main(
    model: tyro.conf.Positional[Path],
    data_root: Path,
    tasks: tuple[str, ...] = ("hellaswag",),
    limit: int = 40,
    dtype: str = "float32",
    batch_size: int = 4,
    out: Path | None = None,
) -> None:
    """Ask both the same questions, a benchmark at a time; reading them counts for both.

    Seconds are of this process, not of the clock, so that others' work counts for neither.
    """
    from lm_eval.models.huggingface import HFLM

    device = torch.device("cpu")
    ours = Harness(Llama.from_pretrained(model, getattr(torch, dtype)), model, batch_size)
    theirs = HFLM(str(model), dtype=dtype, device="cpu", batch_size=batch_size)
    rows = []
    for name in tasks:
        (mine, my_seconds), (other, their_seconds) = (
            answers(lm, name, data_root, limit) for lm in (ours, theirs)
        )
        scores = [(x, y) for x, y in zip(mine, other, strict=True) if not isinstance(x, str)]
        rows.append(
            {
                "task": name,
                "questions": limit,
                "answers": len(mine),
                "largest difference": max((abs(x[0] - y[0]) for x, y in scores), default=None),
                "greedy flags or texts that differ": sum(
                    x != y if isinstance(x, str) else x[1] != y[1]
                    for x, y in zip(mine, other, strict=True)
                ),
                "seconds": [round(my_seconds, 1), round(their_seconds, 1)],
                "ratio": round(their_seconds / my_seconds, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if out:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True)
        where = {"environment": environment(device), "commit": commit.stdout.decode().strip()}
        write_json(out, {"model": model.name, "dtype": dtype, **where, "results": rows})


def answers(lm, name: str, data_root: Path, limit: int) -> tuple[list, float]:
    """What a model answers to every request of a benchmark, and the seconds that it took."""
    begun = time.process_time()
    found = ask(lm, name, data_root, limit, samples=True)["samples"]
    seconds = time.process_time() - begun
    said = [answer for task in sorted(found) for doc in found[task] for answer in doc["resps"]]
    return [answer for (answer,) in said], seconds


if __name__ == "__main__":
    tyro.cli(main)
