"""Tables as text: aligned for terminals, and harmless for spreadsheets."""

from collections.abc import Collection, Iterable


def aligned(rows: Iterable[tuple[str, ...]], right: Collection[int] = ()) -> list[str]:
    """Rows of a table as lines of text, the columns numbered in ``right`` to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{text:>{width}}" if number in right else f"{text:<{width}}"
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def defused(text: str) -> str:
    """Spreadsheets take a cell that begins like this for a formula, and run it."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
