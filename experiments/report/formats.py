"""Formats numbers with their units, and rows of text as Markdown, LaTeX or terminal output."""

from __future__ import annotations

from collections.abc import Sequence


def size(num_bytes: float) -> str:
    """``91.2 MiB`` or ``5.87 GiB``."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """``48 s``, ``5.2 min`` or ``3.1 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def rate(learning_rate: float) -> str:
    """``2e-4``."""
    mantissa, exponent = f"{learning_rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# Below, the first two columns of every line are names; the others are numbers, aligned to the
# right. For a terminal there may be more names.


def markdown(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    rules = ["---", "---", *["---:"] * (len(head) - 2)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in [head, rules, *lines])
    return f"# {title}\n\n{body}\n\n{caption}\n"


def latex(
    label: str, title: str, head: Sequence[str], lines: Sequence[Sequence[str]], caption: str
) -> str:
    """A ``table`` environment; needs the package booktabs."""
    parts = [
        r"\begin{table}",
        rf"\caption{{{_escaped(f'{title}. {caption}')}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
        r"\toprule",
        _latex_line(head),
    ]
    previous_name = None
    for line in lines:
        if line[0] != previous_name:
            parts.append(r"\midrule")
        previous_name = line[0]
        parts.append(_latex_line(line))
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    escaped = "".join("\\" + char if char in "%&_#$" else char for char in text)
    return escaped.replace("±", r"$\pm$")


def terminal(head: Sequence[str], lines: Sequence[Sequence[str]], num_names: int = 2) -> str:
    """Columns as wide as their widest cell; those after the first ``num_names`` are numbers."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if i < num_names else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, ["-" * width for width in widths], *lines]
    )
