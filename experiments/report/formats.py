"""Formats numbers with their units, and rows of text as Markdown, LaTeX or terminal output."""

from __future__ import annotations

from collections.abc import Sequence


def size(num_bytes: float, spread: float | None = None) -> str:
    """``91.2 MiB`` or ``5.87 GiB``; with a spread ``5.87 ± 0.12 GiB``."""
    if num_bytes >= 2**30:
        return _with_unit(num_bytes, spread, 2**30, 2, "GiB")
    return _with_unit(num_bytes, spread, 2**20, 1, "MiB")


def duration(seconds: float, spread: float | None = None) -> str:
    """``48 s``, ``5.2 min`` or ``3.1 h``; with a spread ``5.2 ± 0.3 min``."""
    if seconds < 90:
        return _with_unit(seconds, spread, 1, 0, "s")
    if seconds < 5400:
        return _with_unit(seconds, spread, 60, 1, "min")
    return _with_unit(seconds, spread, 3600, 1, "h")


def number(value: float, spread: float | None = None) -> str:
    """``0.876`` or ``0.876 ± 0.005``."""
    return _with_unit(value, spread, 1, 3, "")


def percent(share: float, spread: float | None = None) -> str:
    """``61.0`` or ``61.0 ± 1.4``, without the sign."""
    return _with_unit(share, spread, 0.01, 1, "")


def _with_unit(
    value: float, spread: float | None, unit: float, num_decimals: int, name: str
) -> str:
    """A spread that would read 0 is left out."""
    text = f"{value / unit:.{num_decimals}f}"
    spread_text = f"{(spread or 0.0) / unit:.{num_decimals}f}"
    if float(spread_text) > 0:
        text += f" ± {spread_text}"
    return f"{text} {name}".rstrip()


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
