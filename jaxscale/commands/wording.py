"""Ages, sizes and counts as a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence


def age(seconds: float | None) -> str:
    """0.4 s, 75 s -> 1 min 15 s, days -> 3 d 2 h."""
    seconds = seconds or 0.0
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, below, inner in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {inner}"
    return f"{whole} s"


def count(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def size(nbytes: int) -> str:
    """950 B, 12.3 kB, 4.5 GB: powers of 1000."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Columns as wide as they need to be, the last one open; `right`: those that hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def placed(index: int, cell: str) -> str:
        if index == len(widths) - 1:
            return cell
        return cell.rjust(widths[index]) if index in right else cell.ljust(widths[index])

    return ["  ".join(placed(index, cell) for index, cell in enumerate(row)).rstrip() for row in rows]
