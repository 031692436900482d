"""Make text from elsewhere safe to print: control characters become visible escapes."""

import unicodedata

__all__ = ["safe_lines", "safe_text"]

# Control, format (these can reverse the direction of a line), half a surrogate pair, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need, and that move nothing


def safe_text(text: object) -> str:
    r"""One line that a terminal shows as it is: what could steer the terminal becomes ``\x1b``, ``\n``, ``\u202e``.

    Whatever comes from a run directory (names, settings, errors, paths) passes through here before it is printed.

        >>> safe_text("a\x1b]0;owned\x07b")
        'a\\x1b]0;owned\\x07b'
    """
    words = str(text)
    return words if words.isprintable() else "".join(map(_visible, words))


def safe_lines(text: object) -> str:
    """``safe_text`` for a text of several lines: line ends stay."""
    return "\n".join(safe_text(line) for line in str(text).split("\n"))


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
