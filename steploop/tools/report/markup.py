"""Make small pieces of HTML; all text is escaped unless it is Markup."""

import html
from collections.abc import Mapping, Sequence

__all__ = ["Markup", "definitions", "folded", "section", "table", "text"]

_OPEN_ROWS = 10


class Markup(str):
    """Text that is HTML already and is put into a page as it is."""

    __slots__ = ()


def text(value: object) -> str:
    """A value as it may stand in a page."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = (), label: str
) -> Markup:
    """A table. In a narrow window each row becomes lines of "head value", so that nothing is cut off or scrolled away.

    Args:
        head: the heads of the columns.
        rows: the cells.
        numbers: columns of numbers, set to the right.
        label: what a screen reader calls it.
    """

    def line(tag: str, cells: Sequence[object]) -> str:
        parts = (
            f"<{tag}{_about(tag, head[i])}{' class=n' if i in numbers else ''}>{text(c)}</{tag}>"
            for i, c in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    def _about(tag: str, name: str) -> str:
        return ' scope="col"' if tag == "th" else f' data-head="{text(name)}"' if name else ""

    body = "".join(line("td", row) for row in rows)
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead>{line('th', head)}</thead><tbody>{body}</tbody></table></div>"
    )


def folded(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Sequence[int] = (),
    label: str,
    what: str,
    last: bool,
) -> Markup:
    """A table of which ten rows are open and the others fold away behind a line that says how many there are.

    Args:
        head: the heads of the columns.
        rows: the cells.
        numbers: columns of numbers, set to the right.
        label: what a screen reader calls it.
        what: what a row is, in the plural.
        last: whether the last rows are open; else the first.
    """
    if len(rows) <= _OPEN_ROWS + 5:  # folding away a handful saves no room
        return table(head, rows, numbers=numbers, label=label)
    cut = len(rows) - _OPEN_ROWS if last else _OPEN_ROWS
    before, after = (table(head, some, numbers=numbers, label=label) for some in (rows[:cut], rows[cut:]))
    hidden, others = (before, "earlier") if last else (after, "further")
    fold = f"<details><summary>{len(rows) - _OPEN_ROWS} {others} {text(what)}</summary>{hidden}</details>"
    return Markup(fold + after if last else before + fold)


def definitions(pairs: Mapping[str, object]) -> Markup:
    """A list of names and values; names without a value are left out."""
    shown = ((k, v) for k, v in pairs.items() if v not in (None, ""))
    # a digest or a list of versions gets a line of its own
    rows = (
        f"<div{' class=wide' if len(str(v)) > 32 else ''}><dt>{text(k)}</dt><dd>{text(v)}</dd></div>"
        for k, v in shown
    )
    return Markup(f"<dl>{''.join(rows)}</dl>")


def section(title: str, *parts: str, identity: str = "") -> Markup:
    """A section under its heading; nothing where it has no part."""
    body = "".join(part for part in parts if part)
    at = f' id="{text(identity)}"' if identity else ""
    return Markup(f"<section{at}><h2>{text(title)}</h2>{body}</section>" if body else "")
