"""Tables in HTML for notebooks: what ``_repr_html_`` of a value shows."""

from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["html_table"]


def html_table(title: str, rows: Mapping[str, Any], *, below: str = "") -> str:
    """A title and a table of two columns.

    Args:
        title: text above the table.
        rows: name -> value; a value that is None or empty is left out.
        below: HTML that follows the table.
    """
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
        if value is not None and str(value)
    )
    return f"<div><strong>{escape(title)}</strong><table>{cells}</table>{below}</div>"
