"""``steploop docs``: list, search, print or open the pages in ``steploop/docs``, without a network."""

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import attrs
import typer

from steploop.errors import ConfigError
from steploop.tools.commands.terminals import definitions, window_width

__all__ = ["Section", "docs", "find_sections", "read_pages"]

WORD = typer.Argument(
    help="A page (steploop docs lists them), or words to look for in headings and text.",
    show_default=False,
)
OPEN = typer.Option("--open", help="Open the page in the browser, as HTML.")

_MOST_SHOWN = 3  # more sections than these are listed instead of printed
_STYLE = (
    "body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}"
    "pre{overflow-x:auto;padding:.8rem;background:#8881}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{padding:.2rem .6rem;border:1px solid #8885;text-align:left}:root{color-scheme:light dark}"
)


@attrs.frozen
class Section:
    """A heading of a page and the text up to the next one.

    Attributes:
        page: the page's name, such as ``speed``.
        heading: without the number signs.
        text: the Markdown, heading included.
    """

    page: str
    heading: str
    text: str


def docs(word: Annotated[list[str] | None, WORD] = None, *, open_page: Annotated[bool, OPEN] = False) -> None:
    """Find and print documentation. A list of pages, a page, or the sections about WORD; works offline."""
    pages = read_pages()
    if not word:
        _open("steploop", "\n\n".join(pages.values())) if open_page else _list_pages(pages)
        return
    words = " ".join(word)
    name = words.lower().removesuffix(".md")
    found = [Section(name, name, pages[name])] if name in pages else find_sections(pages, name)
    if not found:
        raise ConfigError(f"No page mentions {words!r}. There are the pages: {', '.join(pages)}.")
    if open_page:
        _open(found[0].page, pages[found[0].page])
    elif len(found) <= _MOST_SHOWN:
        pages_of = dict.fromkeys(section.page for section in found)
        # an example of a section may need what its page begins with
        whole = (
            ""
            if name in pages
            else f"\nThe whole page: {', '.join(f'steploop docs {p}' for p in pages_of)}\n"
        )
        _print("\n".join(section.text for section in found) + whole)
    else:
        lines = definitions([(section.page, section.heading) for section in found])
        sys.stdout.write("".join(f"{line}\n" for line in lines) + "\nPrint a page with: steploop docs PAGE\n")


def read_pages() -> dict[str, str]:
    """Read the pages that ship with the package: name -> Markdown, sorted by name."""
    folder = files("steploop") / "docs"
    found = (item for item in folder.iterdir() if item.name.endswith(".md"))
    return {
        item.name.removesuffix(".md"): item.read_text(encoding="utf-8")
        for item in sorted(found, key=lambda item: item.name)
    }


def find_sections(pages: dict[str, str], word: str) -> list[Section]:
    """Find the sections about ``word``: those whose heading has it, else those whose text has it.

    Capitals do not matter. A heading with the word hides sections that only mention it. Several words are looked for as they
    stand, and where no section has them so, one by one.
    """
    sections = [section for page, text in pages.items() for section in _sections(page, text)]
    for words in ([word.lower()], word.lower().split()):
        for texts in ([s.heading.lower() for s in sections], [s.text.lower() for s in sections]):
            pairs = zip(sections, texts, strict=True)
            if found := [section for section, text in pairs if all(w in text for w in words)]:
                return found
    return []


def _sections(page: str, text: str) -> list[Section]:
    """Cut a page at its headings; a number sign in a code block is not a heading."""
    blocks: list[list[str]] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not blocks or (not fenced and re.match(r"#{1,4} ", line)):
            blocks.append([])
        blocks[-1].append(line)
    return [Section(page, lines[0].lstrip("# "), "\n".join(lines) + "\n") for lines in blocks]


def _list_pages(pages: dict[str, str]) -> None:
    # the first paragraph after the title
    subjects = [(name, " ".join(text.split("\n\n", 2)[1].split())) for name, text in pages.items()]
    sys.stdout.write("".join(f"{line}\n" for line in definitions(subjects)))
    sys.stdout.write("\nPrint one with: steploop docs PAGE\nLook for a word with: steploop docs WORD\n")


def _print(text: str) -> None:
    """Write Markdown as it is into a pipe or a file, and rendered into a terminal."""
    if not sys.stdout.isatty():
        sys.stdout.write(text.rstrip() + "\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console(file=sys.stdout, width=min(window_width(), 110)).print(Markdown(text))


def _open(name: str, text: str) -> None:
    """Write the page as HTML into a temporary file and open that; say where it is."""
    from markdown_it import MarkdownIt  # rich renders Markdown with it

    body = MarkdownIt("commonmark").enable("table").render(text)
    target = Path(tempfile.mkdtemp(prefix="steploop-docs-")) / f"{name}.html"
    target.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>steploop: {name}</title><style>{_STYLE}</style>{body}\n",
        encoding="utf-8",
    )
    sys.stdout.write(f"{target}\n")
    typer.launch(target.as_uri())
