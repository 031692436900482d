"""Say after which attempted steps of a run something is due: a line, an evaluation, a checkpoint, the end."""

from steploop.runs.plan import Plan, lines_every

__all__ = ["Due"]


class Due:
    """What is due when, counted in attempted steps.

    Args:
        plan: see `Plan`.
        eval_every: steps between two evaluations besides those after each epoch; None: no others.
        steps_per_epoch: of the recipe.
    """

    def __init__(self, plan: Plan, eval_every: int | None, steps_per_epoch: int) -> None:
        self._lines = lines_every(plan, steps_per_epoch)
        self._evaluations = eval_every
        self._checkpoints = plan.checkpoint_every
        self._limit = plan.limit_steps

    def line(self, before: int, now: int) -> bool:
        """Whether a line is due after the steps in (before, now]; after the first step of all there is one."""
        return now == 1 or _crossed(self._lines, before, now)

    def evaluation(self, before: int, now: int) -> bool:
        """Whether an evaluation is."""
        return _crossed(self._evaluations, before, now)

    def checkpoint(self, before: int, now: int) -> bool:
        """Whether a checkpoint is."""
        return _crossed(self._checkpoints, before, now)

    def end(self, now: int) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and now >= self._limit

    def steps_left(self, now: int) -> int:
        """Steps until something may be due, >= 1; before the last of them nothing is."""
        left = [n - now % n for n in (self._lines, self._evaluations, self._checkpoints) if n is not None]
        if now == 0:
            left.append(1)
        if self._limit is not None:
            left.append(max(1, self._limit - now))
        return min(left)


def _crossed(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return every is not None and now // every > before // every
