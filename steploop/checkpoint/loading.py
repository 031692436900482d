"""Load a checkpoint: verified bytes become a state that fits the caller's."""

from collections.abc import Mapping
from pathlib import Path

from steploop.checkpoint.opening import Checkpoint, open_checkpoint
from steploop.checkpoint.packing import named_members
from steploop.checkpoint.provenance import check_environment
from steploop.checkpoint.rank_loading import open_on_ranks
from steploop.checkpoint.unpacking import restore
from steploop.checkpoint.votes import Votes, votes_of
from steploop.core.state.several import State
from steploop.core.state.sharded import is_sharded
from steploop.errors import CheckpointIncompatibleError

__all__ = ["load", "load_from"]


def load(
    directory: Path | str,
    *,
    like: State,
    migrate: Mapping[str, str | None] | None = None,
    require_exact: bool = False,
) -> State:
    """Load a checkpoint's state onto the model and optimizer of ``like``.

    Every byte is verified first, then everything is compared with ``like`` by name, shape and dtype, and only then
    is a new state built; ``like`` stays as it was in every case. The values are ordinary memory: what becomes of
    the files later does not matter.

    Into a state that has ranks every rank loads at the same time; each file is read and verified by one of them, and if
    one of them refuses, all do.

    Args:
        directory: of the checkpoint.
        like: a state of the same model and optimizer, such as ``TrainState.create`` gives; or several by name.
            A spent one will do.
        migrate: None: everything has to agree. A mapping says what may differ: saved parameter (or buffer) name ->
            its new name, or None for one that is not loaded and that ``like`` keeps as it has it. Optimizer,
            groups and trained parameters may differ then: values kept per parameter (moments) go with their
            parameter, if the optimizer is of the same class.
        require_exact: refuse to go on in an environment where the last bits may differ, instead of warning.

    Raises:
        CheckpointDamagedError: bytes are missing, changed or hostile.
        CheckpointVersionError: the format is newer or older than this version reads.
        CheckpointIncompatibleError: it does not fit ``like``; lists the first ten differences.

    Example:
        >>> _ = checkpoint.save(train_step(state, batch), folder / "half")
        >>> checkpoint.load(folder / "half", like=TrainState.create(model, optimizer)).step
        1
    """
    votes = votes_of(like)
    found = open_checkpoint(directory) if votes is None else open_on_ranks(directory, like=like, votes=votes)
    return load_from(found, like=like, migrate=migrate, require_exact=require_exact, votes=votes)


def load_from(
    checkpoint: Checkpoint,
    *,
    like: State,
    migrate: Mapping[str, str | None] | None = None,
    require_exact: bool = False,
    votes: Votes | None = None,
) -> State:
    """Like ``load``, from a checkpoint that is already read; what one rank refuses all refuse."""

    def restored() -> State:
        state = restore(checkpoint.manifest.state, checkpoint.tensors, like, migrate)
        lead = next(iter(named_members(like).values()))
        check_environment(
            checkpoint.environment,
            lead.device,
            require_exact=require_exact,
            ranks=lead.ranks,
            sharded=any(map(is_sharded, lead.tensors.params.values())),
        )
        return state

    return restored() if votes is None else votes.agreed(restored, CheckpointIncompatibleError)
