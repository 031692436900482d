"""Who owns a set of tensors: a lease, passed from state to state, and a holder that remembers a lease."""

import weakref

from steploop.errors import SpentStateError

__all__ = ["Holder", "Lease"]


class Lease:
    """The ownership of a set of tensors: the newest generation has it, earlier ones are spent.

    A step function tears the lease before its first write and hands it on after the last: an exception in between
    leaves the tensors to no state.

    Attributes:
        generation: grows by one whenever tensors are updated in place; a state is alive while its own number is this.
        spender: the step function that updated them last.
        torn: whether an update was cut off, so that some tensors are updated and others not.
    """

    __slots__ = ("__weakref__", "generation", "spender", "torn")

    def __init__(self) -> None:
        self.generation = 0
        self.spender = ""
        self.torn = False

    def tear(self) -> None:
        """Take the tensors from their state: an update begins."""
        self.torn = True
        self.generation += 1

    def mend(self) -> None:
        """Give them back to that state: nothing was written."""
        self.generation -= 1
        self.torn = False

    def hand_on(self, spender: str) -> int:
        """End the update: the generation of the state that has the tensors now."""
        self.spender = spender
        self.torn = False
        return self.generation

    def spent(self, use: str, generation: int, attempted: object) -> SpentStateError:
        """Make the error for a use of a state that has given its tensors away.

        Args:
            use: what was tried, for the message.
            generation: the state's own.
            attempted: its attempted steps.
        """
        if self.torn:
            return SpentStateError(
                f"{use}: this state is spent: an update was cut off in the middle of attempted step {attempted}, and "
                "its tensors are half updated. Go on from a checkpoint, or from a copy that state.clone() or "
                "optimizer_step(state, donate=False) left."
            )
        # states in between are gone: only the last one to update the tensors is known by name
        spender = self.spender if generation + 1 == self.generation else "optimizer_step"
        return SpentStateError(
            f"{use}: this state is spent: {spender} at attempted step {attempted} updated its tensors in "
            "place and gave them to the state it returned. Go on with that one, keep a copy beforehand with "
            "state.clone(), or leave the old state whole with optimizer_step(state, donate=False)."
        )


class Holder:
    """Remembers whose values a machine holds, without keeping them alive."""

    def __init__(self) -> None:
        self._lease: weakref.ref[Lease] | None = None

    def holds(self, lease: Lease) -> bool:
        """Whether the values are those of ``lease``."""
        return self._lease is not None and self._lease() is lease

    def free(self) -> bool:
        """Whether no living state owns the values that the machine holds."""
        return self._lease is None or self._lease() is None

    def give_to(self, lease: Lease) -> None:
        """Note that the values are those of ``lease`` from now on."""
        self._lease = weakref.ref(lease)

    def owner(self) -> "weakref.ref[Lease] | None":
        """What to hand to ``restore``."""
        return self._lease

    def restore(self, owner: "weakref.ref[Lease] | None") -> None:
        """Note again what ``owner`` gave."""
        self._lease = owner

    def release(self) -> None:
        """Note that the values are no state's."""
        self._lease = None
