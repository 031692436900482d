"""Show Python source as HTML, coloured and with line numbers."""

import html
import io
import keyword
import tokenize

from steploop.runs.safe_text import safe_text

__all__ = ["highlighted"]

_MOST_COLOURED = 200_000  # characters: Python's tokenizer takes a second for them


def _kind(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        return "tc"
    if token.type == tokenize.STRING or tokenize.tok_name[token.type].startswith("FSTRING"):
        return "ts"
    if token.type == tokenize.NUMBER:
        return "tn"
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return "tk"
    return "td" if token.type == tokenize.OP and token.string == "@" else ""


def _spans(source: str) -> dict[int, list[tuple[int, int, str]]]:
    """Line number -> (from, to, class) of its coloured parts; empty where the source is no Python."""
    found: dict[int, list[tuple[int, int, str]]] = {}
    lines = source.split("\n")
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind = _kind(token)
            if not kind:
                continue
            (first, start), (last, end) = token.start, token.end
            for number in range(first, last + 1):
                begin = start if number == first else 0
                stop = end if number == last else len(lines[number - 1])
                found.setdefault(number, []).append((begin, stop, kind))
    except (tokenize.TokenError, SyntaxError, IndexError):
        return {}
    return found


def _visible(source: str) -> str:
    """The source with its line ends and tabs, and each other control character as its escape."""
    lines = source.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return "\n".join("\t".join(map(safe_text, line.split("\t"))) for line in lines)


def highlighted(source: str) -> str:
    """The source as an HTML ``pre``; a text that is no Python, or a very long one, comes out uncoloured."""
    source = _visible(source)
    spans = _spans(source) if len(source) <= _MOST_COLOURED else {}
    lines = []
    for number, line in enumerate(source.split("\n"), 1):
        parts, at = [], 0
        for begin, stop, kind in spans.get(number, ()):
            parts.append(html.escape(line[at:begin]))
            parts.append(f'<span class="{kind}">{html.escape(line[begin:stop])}</span>')
            at = stop
        parts.append(html.escape(line[at:]))
        lines.append(f'<span class="line">{"".join(parts)}</span>')
    text = "\n".join(lines)
    return f'<pre class="source" tabindex="0" role="region" aria-label="Source of the recipe"><code>{text}</code></pre>'
