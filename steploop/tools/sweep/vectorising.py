"""Train the members of a sweep that have one shape as populations, in this process."""

from collections.abc import Sequence
from typing import Any

from steploop.errors import CompileError, ConfigError
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.logs.screens import PlainScreen
from steploop.runs.safe_text import safe_lines
from steploop.runs.signals import StopFlag
from steploop.tools.sweep.member_launchers import open_log
from steploop.tools.sweep.member_run import TAKEN, is_settled, run_member
from steploop.tools.sweep.member_seats import Seat, SharedStop
from steploop.tools.sweep.populations import Built, Group, build, grouped, renamed, tried
from steploop.tools.sweep.sweep_record import Member, SweepRecord
from steploop.tools.sweep.sweep_screens import SweepScreen
from steploop.tools.sweep.together import Together
from steploop.tools.sweep.vectorise_record import Vectorised, read_vectorised, write_vectorised

__all__ = ["Vectorising"]

_MOST = 64  # members of a population: all of them are in memory at once


class Vectorising:
    """The populations of a sweep.

    Args:
        record: the sweep.
        file: its recipe.
        jobs: how many members on their own would run at once.
        screen: where it is shown.
        stop: the flag that signals set.
        trust: go on with runs whose files belong to another user.
    """

    def __init__(
        self, record: SweepRecord, file: RecipeFile, *, jobs: int, screen: SweepScreen, stop: StopFlag, trust: bool
    ) -> None:  # fmt: skip
        self._record, self._file, self._jobs = record, file, jobs
        self._screen, self._stop, self._trust = screen, stop, trust
        self._had_turn: set[int] = set()

    def run(self) -> set[int]:
        """Train what is left of the populations; the numbers of the members that had their turn.

        Raises:
            ConfigError: ``on``, and a member cannot be one of a population; says which and why.
        """
        said = read_vectorised(self._record)
        if said is None:
            return set()
        waiting = {m.number: m for m in self._record.members() if not is_settled(self._record, m.number)}
        for noted in said.groups:
            if left := [waiting[n] for n in noted["members"] if n in waiting]:
                self._train(Group(self._built(left)[0]))
        new = [member for number, member in waiting.items() if number not in said.decided]
        for begin in range(0, len(new), _MOST):
            if self._stop.signum is None:
                for group in self._decide(new[begin : begin + _MOST], said.mode):
                    self._train(group)
        return self._had_turn

    def _built(self, members: Sequence[Member]) -> tuple[list[Built], dict[int, str]]:
        """The members whose recipes can be built, and why others cannot."""
        found, apart = [], {}
        for member in members:
            try:
                found.append(build(self._record, member, self._file))
            except ConfigError as error:
                apart[member.number] = str(error)
            except Exception as error:  # noqa: BLE001  (a recipe may raise anything, and the run says it)
                apart[member.number] = f"{type(error).__name__}: {error}"
        return found, apart

    def _decide(self, members: Sequence[Member], mode: str) -> list[Group]:
        """The populations that these members make; both they and who trains apart are noted."""
        built, apart = self._built(members)
        groups, alone = grouped(built)
        apart |= alone
        taken: list[Group] = []
        for group in groups:
            if self._stop.signum is not None:
                return []
            found, reasons = self._try(group, mode)
            taken += found
            apart |= reasons
        if apart and mode == "on":
            number, reason = min(apart.items())
            raise ConfigError(
                f"--vectorise on: member {number:03d} cannot be one of a population: {reason.rstrip('.')}. --vectorise auto trains such "
                "members as runs of their own."
            )
        said = read_vectorised(self._record) or Vectorised(mode)
        by_reason: dict[str, list[int]] = {}
        for number, reason in sorted(apart.items()):
            by_reason.setdefault(safe_lines(reason), []).append(number)
        noted: list[dict[str, Any]] = [
            {"members": group.numbers, "figures": dict(group.figures)} for group in taken
        ]
        said_apart: list[dict[str, Any]] = [
            {"members": numbers, "reason": reason} for reason, numbers in by_reason.items()
        ]
        write_vectorised(self._record, Vectorised(mode, (*said.groups, *noted), (*said.apart, *said_apart)))
        for one in said_apart:
            self._screen.note(f"runs of their own: {_named(one['members'])}: {one['reason']}")
        return taken

    def _try(self, group: Group, mode: str, *, whole: bool = True) -> tuple[list[Group], dict[int, str]]:
        """The group, if it can be one graph and is fast; else parts of it; and why others cannot."""
        self._screen.note(f"trying {_named(group.numbers)} as one population")
        try:
            group = tried(
                group, measure=mode == "auto", compiled=self._record.options.get("compile", "auto"),
                jobs=self._jobs,
            )  # fmt: skip
        except CompileError as error:
            reasons = dict.fromkeys(group.numbers, renamed(str(error), group.numbers))
            parts = _by_settings(group) if whole else []
            if len(parts) < 2:
                return [], reasons
            found: list[Group] = []
            for part in parts:  # a setting that is no float decides what the graph is
                if len(part.built) > 1:
                    better, others = self._try(part, mode, whole=False)
                    found += better
                    reasons = {n: r for n, r in reasons.items() if n not in part.numbers} | others
            return found, reasons
        except Exception as error:  # noqa: BLE001  (a step that fails is to fail in the run of its member)
            return [], dict.fromkeys(group.numbers, f"{type(error).__name__}: {error}")
        if not group.figures:
            return [group], {}
        together = group.figures["population"]
        single = {name: us for name, us in group.figures.items() if name != "population"}
        name = min(single, key=lambda key: single[key])
        wins = together < single[name]
        text = (
            f"{together:,.0f} us for a step of each member as one population of {len(group.built)}, {single[name]:,.0f} us as "
            f"{name} steps, {self._jobs} at once"
        )
        self._screen.note(
            f"{_named(group.numbers)}: {text}: {'the population' if wins else 'runs of their own'}"
        )
        return ([group], {}) if wins else ([], dict.fromkeys(group.numbers, text))

    def _train(self, group: Group) -> None:
        """Train the members of a population to their ends."""
        if self._stop.signum is not None or not group.built:
            return
        seats = [self._seat(one) for one in group.built]

        def ended(number: int, code: int) -> None:
            if code != TAKEN:
                self._had_turn.add(number)
            self._screen.ended(number, code)

        Together(seats, group.steps, report=self._screen.note, ended=ended, show=self._screen.show).run()

    def _seat(self, built: Built) -> Seat:
        def train(seat: Seat) -> int:
            return run_member(
                self._record, built.member, built.file_for(seat), screen=PlainScreen(), stop=SharedStop(self._stop),
                trust=self._trust, vectorised=True,
            )  # fmt: skip

        number = built.member.number
        return Seat(number, train, open_log(self._record.path, number))


def _by_settings(group: Group) -> list[Group]:
    """The group in parts of equal settings, but for floats and the seed, which are values and no other graph."""
    parts: dict[Any, list[Built]] = {}
    for one in group.built:
        settings = one.member.settings.items()
        key = tuple((n, repr(v)) for n, v in settings if not isinstance(v, float) and n != "seed")
        parts.setdefault(key, []).append(one)
    return [Group(part) for part in parts.values()]


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{n:03d}" for n in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown}, ... ({len(numbers)} members)"
