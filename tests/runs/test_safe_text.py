"""Text that is safe to print: nothing in it steers a terminal, and what is harmless stays as it is."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploop.runs.safe_text import safe_lines, safe_text


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
def test_nothing_that_steers_a_terminal_is_left(text):
    left = {c for c in safe_text(text) if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert left <= {"\u200c", "\u200d"}
    safe_text(text).encode()  # half a surrogate pair has no UTF-8


@given(st.text(alphabet=st.characters(categories=("L", "M", "N", "P", "S", "Zs")), max_size=60))
def test_letters_digits_and_signs_of_every_script_stay_as_they_are(text):
    assert safe_text(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07x", r"\x1b]0;owned\x07x"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("abc\u202etxt.exe", r"abc\u202etxt.exe"),
        ("\ud800", r"\ud800"),
        ("accuracy ✓ é 精度", "accuracy ✓ é 精度"),
    ],
)
def test_a_control_character_is_shown_as_its_escape(text, shown):
    assert safe_text(text) == shown


def test_the_lines_of_a_message_stay_apart():
    assert safe_lines("one\n  two\x1b[2J\r") == "one\n  two\\x1b[2J\\r"
