"""Text of the page: escaped, and numbers as people read them."""

import time
from collections.abc import Iterable, Sequence
from html import escape

from ulysses_jax.runs.read import Run


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def seen(text: str) -> str:
    """Names of files may hold any bytes; a page is UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def escaped(text: str) -> str:
    return text if isinstance(text, Html) else escape(seen(text))


def swatch(name: str) -> str:
    return f'<span class="swatch" style="background:var(--{name})"></span>'


def named(number: int, run: Run) -> Html:
    return Html(f"{swatch(f'run-{number % 7}')} {escaped(run.name)}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    first = ("td", "td") if kind else ("th", "td")
    body = "".join(
        "<tr>"
        + "".join(
            f"<{first[at > 0]}>{escaped(cell)}</{first[at > 0]}>"
            for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def clock(unix_seconds: float) -> str:
    return time.strftime("%F %T", time.localtime(unix_seconds))


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
