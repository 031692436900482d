"""Test a recipe against every law, and report the smallest case that fails."""

from collections.abc import Callable, Iterable, Iterator

import attrs

from steploop.tools.check.law_cases import LAWS, Law, NotApplicable
from steploop.tools.check.subjects import Subject

__all__ = ["Verdict", "examine"]


@attrs.frozen(kw_only=True)
class Verdict:
    """The result of one law.

    Attributes:
        law: its name.
        passed: whether it held in every case; None where it does not apply.
        cases: how many were tried; the first that fails is the last.
        example: the smallest case that failed.
        message: what is wrong, or why the law does not apply.
    """

    law: str
    passed: bool | None
    cases: int = 0
    example: str = ""
    message: str = ""


def examine(
    subject: Subject, show: Callable[[str], None] = lambda _: None, *, laws: Iterable[Law] | None = None
) -> Iterator[Verdict]:
    """Test the recipe against every law.

    Args:
        subject: the recipe.
        show: called with the name of each law before it is tried.
        laws: the laws to test; by default all.
    """
    for law in LAWS if laws is None else laws:
        show(law.name)
        yield _judge(law, subject)


def _judge(law: Law, subject: Subject) -> Verdict:
    tried, example = 0, "before the first case"
    try:
        for label, check in law.cases(subject):
            tried, example = tried + 1, label
            check()
    except NotApplicable as reason:
        return Verdict(law=law.name, passed=None, message=str(reason))
    except AssertionError as failure:
        return Verdict(law=law.name, passed=False, cases=tried, example=example, message=str(failure))
    except Exception as error:  # noqa: BLE001  (a recipe may raise anything, and the other laws are still to come)
        message = f"{type(error).__name__}: {error}".removesuffix(": ")
        return Verdict(law=law.name, passed=False, cases=tried, example=example, message=message)
    return Verdict(law=law.name, passed=True, cases=tried)
