"""Results as Markdown: on the terminal, and between the marks of a page."""

from collections import Counter
from pathlib import Path
from typing import Any

from ulysses_jax.check_gpu.errors import NAMES, TOLERANCES

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
KNOWN = {
    "errors": "Errors at small shapes",
    "spots": "Errors at some queries of a long row",
    "rates": "The card's matrix products",
    "timings": "Time",
    "steps": "A train step, planned beside measured",
}
NAMELESS = ("table", "status", "why", "took")


def markdown(results: dict[str, Any]) -> str:
    """Everything that was measured, and of what was not, why."""
    machine = results["machine"]
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items() if v)
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    parts = [
        f"{machine['card']}, {results['started'][:10]}{driver}; Python "
        f"{machine['python']}, {versions}."
        + (" Tiny shapes: nothing here is a card's speed." if results["quick"] else "")
    ]
    for table, title in KNOWN.items():
        rows = [row for row in results["rows"] if row["table"] == table]
        if rows:
            parts += [f"### {title}", _note(table), *_table(table, rows, results)]
            parts += [_skipped(rows)]
    failed = sum(row.get("status") == "FAIL" for row in results["rows"])
    parts.append(
        f"**{failed} rows FAIL.**" if failed else "No row that was measured fails."
    )
    return "\n\n".join(part for part in parts if part)


def _note(table: str) -> str:
    if table in ("errors", "spots"):
        most = "; ".join(
            f"{dtype}: {', '.join(f'{name} {each[name]}' for name in NAMES)}"
            for dtype, each in TOLERANCES.items()
        )
        return (
            "Root mean square of the error over that of float64's result; tolerances "
            f"in {most}."
        )
    if table == "timings":
        return "FLOPs of visible pairs alone: 2 products forward, 5 backward."
    return ""


def _table(
    table: str, rows: list[dict[str, Any]], results: dict[str, Any]
) -> list[str]:
    lines = [row for row in rows if row.get("status") != "skipped"]
    if table == "steps":
        lines = [line for row in lines for line in _step_lines(row)]
    if table == "timings":
        rate = _rate(results)
        lines = [
            row | {"of the rate": f"{row['TFLOP/s'] / rate:.0%}"}
            if rate and "TFLOP/s" in row
            else row
            for row in lines
        ]
    if not lines:
        return []
    columns = list(dict.fromkeys(n for row in lines for n in row if n not in NAMELESS))
    result = [_result(row) for row in lines]
    cells = [[_text(row.get(name, "")) for name in columns] for row in lines]
    head = [*columns, "result"]
    align = ["---:" if name in _numbers(lines) else "---" for name in head]
    return [
        "\n".join(
            f"| {' | '.join(line)} |"
            for line in [
                head,
                align,
                *([*row, each] for row, each in zip(cells, result, strict=True)),
            ]
        )
    ]


def _result(row: dict[str, Any]) -> str:
    status = row.get("status", "not yet")
    return f"**FAIL** {row.get('why', '')}".strip() if status == "FAIL" else status


def _numbers(rows: list[dict[str, Any]]) -> set[str]:
    return {n for row in rows for n, x in row.items() if isinstance(x, int | float)}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}" if value < 0.1 else f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _step_lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each of what `plan.check` compares; those that are apart FAIL."""
    lines = []
    for each in row.get("rows", [{}]):
        line = {"documents": row["documents"]}
        if each:
            line |= {"status": "FAIL", "why": each["why"]} if "why" in each else {}
            line.setdefault("status", "ok")
            is_bytes = each["unit"] == "bytes"
            scale, unit = (1e6, "MB") if is_bytes else (1, "s")
            line["what"] = f"{each['what']} ({unit})"
            for name in ("planned", "measured"):
                known = each[name] is not None
                line[name] = f"{each[name] / scale:,.3f}" if known else ""
            ratio = each["planned"] and each["measured"] / each["planned"]
            line["measured / planned"] = f"{ratio:.3f}" if ratio else ""
        else:
            line |= {name: row[name] for name in ("status", "why") if name in row}
        lines.append(line)
    return lines


def _rate(results: dict[str, Any]) -> float | None:
    rates = [row for row in results["rows"] if row["table"] == "rates"]
    return next((row["TFLOP/s"] for row in rates if "TFLOP/s" in row), None)


def _skipped(rows: list[dict[str, Any]]) -> str:
    """Rows that were not measured, those for one reason in one line."""
    whys = Counter(
        (row.get("kernel", row["table"]), row["why"])
        for row in rows
        if row.get("status") == "skipped"
    )
    return "\n".join(
        f"- {name}, {count} row{'s' * (count > 1)} skipped: {why}"
        for (name, why), count in whys.items()
    )


def page_with(path: Path, text: str) -> str:
    """The page with the text between its marks.

    Raises:
      ValueError: it has not one of each.
    """
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} has not the lines {BEGIN} and {END}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
