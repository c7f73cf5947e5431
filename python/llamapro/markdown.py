"""Markdown, to be read as it is too."""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose columns are aligned."""
    widths = [max(len(cells[i]) for cells in (head, *rows)) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return [
        f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"
        for cells in (head, rule, *rows)
    ]
