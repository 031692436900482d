"""Show a sweep while it lasts: a live table in a terminal, a line for each member elsewhere."""

import sys
import time
from collections.abc import Collection
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steploop.errors import ConfigError
from steploop.runs.safe_text import safe_text
from steploop.runs.standing import read_standing
from steploop.tools.report.charts import number
from steploop.tools.report.results import duration
from steploop.tools.sweep.member_results import MemberResult, read_member
from steploop.tools.sweep.member_run import TAKEN, is_settled
from steploop.tools.sweep.sweep_record import Member, SweepRecord
from steploop.tools.sweep.sweep_result import settings_text

__all__ = ["LiveSweep", "PlainSweep", "QuietSweep", "SweepScreen", "choose_sweep_screen"]

_RENEWED_S = 0.5
_SHOWN = 20  # running members


class QuietSweep:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def ended(self, number: int, code: int) -> None:
        """Nothing."""

    def show(self, running: Collection[int]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainSweep(QuietSweep):
    """A line for each member that has ended.

    Args:
        sweep: which.
        stream: where to write.
    """

    def __init__(self, sweep: SweepRecord, stream: TextIO) -> None:
        self._sweep = sweep
        self._stream = stream
        self._members = {
            member.number: member for member in (sweep.members() if sweep.search == "grid" else ())
        }
        self._done = sum(is_settled(sweep, number) for number in range(sweep.size))

    def note(self, text: str) -> None:
        """Say something."""
        self._stream.write(safe_text(text) + "\n")
        self._stream.flush()

    def member(self, number: int) -> Member:
        """The member of a number; the settings of a search's are read from its run."""
        return self._members.get(number) or Member(number, {})

    def ended(self, number: int, code: int) -> None:
        """Say how a member ended."""
        if code != TAKEN:
            self._done += 1
            self.note(self._line(read_member(self._sweep, self.member(number)), code))

    def _line(self, result: MemberResult, code: int) -> str:
        value = "" if result.value is None else f", {result.metric} {number(result.value)}"
        error = (
            f": {result.error}" if result.error else f" (exit code {code})" if result.state == "died" else ""
        )
        time_s = f" in {duration(result.seconds)}" if result.seconds else ""
        return (
            f"{result.number:03d} ({self._done} of {self._sweep.size}) {settings_text(result.settings)}: "
            f"{result.state}{time_s}{value}{error}"
        )


class LiveSweep(PlainSweep):
    """A table of the members that run, which moves, below the lines of those that have ended."""

    def __init__(self, sweep: SweepRecord, console: Console) -> None:
        super().__init__(sweep, sys.stdout)
        self._console = console
        self._live: Live | None = None
        self._shown_s = 0.0

    def note(self, text: str) -> None:
        """Say something above the table."""
        self._console.print(Text(safe_text(text)))

    def show(self, running: Collection[int]) -> None:
        """Renew the table, twice a second at most."""
        now = time.monotonic()
        if now - self._shown_s < _RENEWED_S:
            return
        self._shown_s = now
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("run", "settings", "step", "best so far"):
            table.add_column(head, no_wrap=head != "settings")
        for running_number in sorted(running)[:_SHOWN]:
            table.add_row(*map(Text, self._row(running_number)))
        if self._live is None:
            self._live = Live(table, console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)

    def _row(self, number_: int) -> tuple[str, str, str, str]:
        name, settings = f"{number_:03d}", settings_text(self.member(number_).settings)
        try:
            standing = read_standing(self._sweep.directory(number_))
        except ConfigError:
            return name, settings, "starting", ""
        if not settings:
            fields = standing.config.get("config", {})
            settings = settings_text({k: fields.get(k) for k in self._sweep.varied})
        best = (standing.status.best or {}).get("metrics", {})
        shown = " ".join(f"{key} {number(value)}" for key, value in best.items() if value is not None)
        return name, settings, str(standing.status.step or 0), safe_text(shown)

    def close(self) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


SweepScreen = QuietSweep | PlainSweep | LiveSweep


def choose_sweep_screen(sweep: SweepRecord, *, progress: str, stream: TextIO) -> SweepScreen:
    """The screen that suits where the output goes.

    Raises:
        ConfigError: ``progress`` is not one of "auto", "plain" and "none".
    """
    if progress not in {"auto", "plain", "none"}:
        raise ConfigError(f'progress must be "auto", "plain" or "none", but is {progress!r}.')
    if progress == "none":
        return QuietSweep()
    console = Console(highlight=False)
    if progress == "auto" and stream is sys.stdout and stream.isatty() and not console.is_dumb_terminal:
        return LiveSweep(sweep, console)
    return PlainSweep(sweep, stream)
