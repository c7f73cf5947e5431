"""The Markdown of the reports of `benchmarks.gpu` and `benchmarks.gpu.step`, and a row's line."""

import statistics

UNITS = {"flops": (1e12, "TFLOP/s"), "bytes": (1e9, "GB/s")}
SIDES = {  # of a step, as a reader knows them
    "ours": "this library",
    "8bit": "this library, frozen in 8 bits",
    "8bit-compact": "this library, frozen in 8 bits, compact",
    "composition": "our model in plain PyTorch, SDPA",
    "transformers": "transformers",
    "transformers apply": "transformers after `apply`",
    "transformers checkpointing": "transformers, gradient checkpointing",
    "transformers Liger": "transformers, Liger",
    "transformers Liger checkpointing": "transformers, Liger, gradient checkpointing",
}


def markdown(report: dict) -> str:
    """Everything a reader needs, from the JSON alone."""
    parts = [
        f"# {report['device']}, {report['date']}",
        versions(report),
        correctness(report),
        speed(report["rows"]),
        failures(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def versions(report):
    keys = ("commit", "torch", "triton", "python", "driver", "liger-kernel")
    facts = [f"{key} {report[key] or 'unknown'}" for key in keys]
    facts += [f"measured {rate(kind, r)} ({what})" for kind, what, r in roof_lines(report)]
    ended = "" if report["finished"] else ", cut off"
    return f"{', '.join(facts)}; {report['seconds']:.0f} s{ended}."


def roof_lines(report):
    names = {"bytes": "copy, read plus written", "flops": "bf16 product"}
    return [(kind, names[kind], value) for kind, value in report["roofs"].items()]


def rate(unit, per_second):
    scale, name = UNITS[unit]
    return f"{per_second / scale:.4g} {name}"


def correctness(report):
    tests, checks = report["tests"], report["checks"]
    lines = []
    if tests:
        counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "error", "skipped"))
        lines.append(f"Op tests: {counts}, exit code {tests['exit_code']} ({tests['log']}).")
        lines += [f"- {name}" for name in tests["failing"]]
    passed = [c for c in checks if c["status"] == "ok"]
    if checks:
        lines += ["", f"Checks at large shapes: {len(passed)} of {len(checks)} pass.", ""]
        lines += table(("op", "shape", "dtype", "gradients", "largest error / bound"))
        lines += [
            cells(c["op"], c["shape"], c["dtype"], wanted(c), f"{closest(c['errors']):.2f}")
            for c in passed
        ]
    return "\n".join(lines)


def closest(errors):
    """How near the worst result comes to its bound."""
    return max(e["error"] / e["bound"] if e["bound"] else 0.0 for e in errors.values())


def speed(rows):
    lines = [cells(*timed_cells(row)) for row in rows if row["status"] == "ok"]
    if not lines:
        return ""
    note = (
        "Medians, with the 10th and 90th percentile. A peer's factor is its time over ours: above"
        " 1 it is slower. Memory is the peak above what was there before."
    )
    head = ("op", "shape", "gradients", "pass", "ms", "rate", "of the roof", "peers", "memory")
    return "\n".join([note, "", *table(head), *lines])


def timed_cells(row):
    low, high = row["ms_10_90"]
    return (
        *(row["op"], row["shape"], wanted(row), row["pass"]),
        f"{row['ms']:.3f} ({low:.3f} to {high:.3f})",
        rate(row["unit"], row["per_second"]),
        f"{row['share_of_roof']:.0%}",
        ratios(row),
        memory(row),
    )


def ratios(row):
    timed = {name: p for name, p in row["peers"].items() if "ratio" in p}
    return ", ".join(f"{name} {p['ratio']:.2f}x" for name, p in timed.items()) or "-"


def memory(row):
    if row["peak_bytes"] is None:
        return "-"
    peers = {n: p["peak_bytes"] for n, p in row["peers"].items() if "peak_bytes" in p}
    others = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in peers.items())
    return f"{row['peak_bytes'] / 1e6:.0f} MB" + (f" ({others})" if others else "")


def failures(report):
    """Rows without a result, peers without a time, and what was not started."""
    lines = [f"- {describe(r)}" for r in report["checks"] + report["rows"] if r["status"] != "ok"]
    for row in report["rows"]:
        for name, peer in row.get("peers", {}).items():
            if "error" in peer:
                lines.append(f"- {title(row)}, {name}: {peer['error']}")
    if report["not_started"]:
        lines.append(f"- {len(report['not_started'])} rows not started: the time was spent")
    return "\n".join(["Without a result:", "", *lines]) if lines else ""


def wanted(row):
    return ", ".join(row["wanted"]) or "none"


def title(row):
    return f"{row['op']} {row['shape']}, {row['dtype']}, {row.get('pass', 'check')} ({wanted(row)})"


def describe(row: dict) -> str:
    """One line about a check or a timed row."""
    if row["status"] != "ok":
        return f"{title(row)}: {row['status']}" + (f", {row['why']}" if row["why"] else "")
    if "ms" not in row:
        return f"{title(row)}: ok, {closest(row['errors']):.2f} of the bound"
    share = f"{rate(row['unit'], row['per_second'])}, {row['share_of_roof']:.0%} of the roof"
    return f"{title(row)}: {row['ms']:.3f} ms, {share}; {ratios(row)}"


def step_markdown(report: dict) -> str:
    """Every row of a report of `benchmarks.gpu.step`, and where the time of our steps goes."""
    rows = in_groups(report["rows"])
    head = ("model", "trained", "tokens a step", "side", "tokens/s", "of the roof", "peak GB")
    lines = [step_facts(report), "", *table(head)]
    lines += [cells(*step_about(row), *step_results(row, roof(report))) for row in rows]
    profiled = [row for row in rows if "GPU ms" in row]
    if profiled:
        kinds = list(profiled[0]["GPU ms"])
        lines += ["", *table((*head[:4], "planned GB", "step ms", *(f"{k}, ms" for k in kinds)))]
    for row in profiled:
        spent = [f"{row['GPU ms'][kind]:.1f}" for kind in kinds]
        lines.append(cells(*step_about(row), row["planned GB"], row["step ms"], *spent))
    return "\n".join(lines)


def step_facts(report):
    keys = ("commit", "torch", "triton", "transformers", "liger-kernel")
    facts = [f"{key} {report[key]}" for key in keys]
    rates = [row["roof TFLOP/s"] for row in report["rows"] if "failed" not in row]
    if rates:
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        facts.append(f"the roof {roof(report):.0f} TFLOP/s, the median of the rows ({spread})")
    return f"{report['device']}: {', '.join(facts)}."


def roof(report):
    """TFLOP/s of a large product, the median of the rows."""
    rates = [row["roof TFLOP/s"] for row in report["rows"] if "failed" not in row]
    return statistics.median(rates) if rates else None


def in_groups(rows):
    """By what is trained; there the fastest side first, and last what failed."""
    return sorted(rows, key=lambda r: (r["model"], r["placement"], -r.get("tokens/s", 0)))


def step_about(row):
    trained = "full fine-tuning" if row["placement"] == "all" else f"new blocks, {row['placement']}"
    size = f"{row['batch']} x {row.get('length', 4096)}"  # older files do not say
    return row["model"], trained, size, SIDES[row["side"]]


def step_results(row, roof):
    if "failed" in row:
        return row["failed"], "", ""
    return f"{row['tokens/s']:.0f}", f"{row['TFLOP/s'] / roof:.2f}", f"{row['peak GB']:.1f}"


def table(names):
    return [cells(*names), cells(*["---"] * len(names))]


def cells(*values):
    return f"| {' | '.join(map(str, values))} |"
