"""Test a recipe against every law, and report the smallest case that fails."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs

from steploop.errors import SteploopError
from steploop.tools.check.law_cases import LAWS, Case, Law, NotApplicable
from steploop.tools.check.one_line import one_line, shortened
from steploop.tools.check.subjects import Subject

__all__ = ["BUILT", "Verdict", "examine"]

# What is tried before any law; where it fails, no law is.
BUILT = "the recipe can be built and gives batches"


@attrs.frozen(kw_only=True)
class Verdict:
    """The result of one law.

    Attributes:
        law: its name.
        passed: whether it held in every case; None where it does not apply, or was not tried.
        tried: whether it was tried: ``--quick`` leaves some laws out.
        cases: how many were tried; the first that fails is the last.
        example: the smallest case that failed.
        message: what is wrong, or why the law does not apply.
    """

    law: str
    passed: bool | None
    tried: bool = True
    cases: int = 0
    example: str = ""
    message: str = ""


def examine(
    subject: Subject,
    show: Callable[[str], None] = lambda _: None,
    *,
    laws: Iterable[Law] | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Verdict]:
    """Test the recipe against every law, and give each verdict as it is found; only one if it cannot be built.

    Args:
        subject: the recipe.
        show: called with the name of each law before it is tried.
        laws: the laws to test; by default all.
        seconds: the quick form: only the first and the last case of each law, and none of the laws that start workers or
            train for long. No law begins later than this; those that start a process come last, within half of it.
        clock: where the seconds come from.
    """
    begun = clock()
    if (failure := _unbuilt(subject)) is not None:
        yield failure
        return
    chosen = list(LAWS if laws is None else laws)
    for law in chosen if seconds is None else sorted(chosen, key=lambda law: law.late):
        show(law.name)
        if seconds is None:
            yield _judge(law, subject, quick=False)
        elif not law.quick:
            yield Verdict(law=law.name, passed=None, tried=False, message="it takes too long for --quick")
        elif clock() - begun > (seconds / 2 if law.late else seconds):
            yield Verdict(law=law.name, passed=None, tried=False, message="--quick has no time left")
        else:
            yield _judge(law, subject, quick=True)


def _unbuilt(subject: Subject) -> Verdict | None:
    """The verdict on a recipe that raises while it is built or gives its first batches; None where it does not."""
    example = "build"
    try:
        subject.recipe  # noqa: B018  (made when it is first looked at)
        example = "the first batches"
        subject.batches  # noqa: B018  (likewise)
    except SteploopError:  # said as by every command
        raise
    except Exception as error:  # noqa: BLE001  (a recipe may raise anything)
        message = one_line(error, subject.path)
        return Verdict(law=BUILT, passed=False, cases=1, example=example, message=message)
    return None


def _judge(law: Law, subject: Subject, *, quick: bool) -> Verdict:
    tried, example = 0, "before the first case"
    try:
        cases: Iterable[Case] = law.cases(subject)
        if quick:
            all_cases = list(cases)
            cases = all_cases if len(all_cases) < 2 else [all_cases[0], all_cases[-1]]
        for label, check in cases:
            tried, example = tried + 1, label
            check()
    except NotApplicable as reason:
        return Verdict(law=law.name, passed=None, message=str(reason))
    except AssertionError as failure:
        # a law says what is wrong; an assert in the recipe may say nothing but where
        message = shortened(str(failure)) if _is_law(failure) else one_line(failure, subject.path)
        return Verdict(law=law.name, passed=False, cases=tried, example=example, message=message)
    except Exception as error:  # noqa: BLE001  (a recipe may raise anything, and the other laws are still to come)
        message = one_line(error, subject.path)
        return Verdict(law=law.name, passed=False, cases=tried, example=example, message=message)
    return Verdict(law=law.name, passed=True, cases=tried)


def _is_law(failure: AssertionError) -> bool:
    """Whether a law of ``steploop.testing`` raised this, in one line of its own."""
    last = traceback.extract_tb(failure.__traceback__)[-1].filename
    return str(Path("steploop", "testing")) in last and "\n" not in str(failure)
