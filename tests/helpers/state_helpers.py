"""Small things that many tests of the core do with a state."""

from steploop import optimizer_step


def with_flight(state, **changes):
    """The state with other values in flight, as a step function would leave them."""
    return state.replace(flight=state.flight.replace(**changes))


def take_step(state, gradients, **options):
    """Step with what ``gradients(state)`` gives; an optimizer that evaluates the loss itself gets it as its closure."""
    if state.machine.needs_closure:
        return optimizer_step(state, closure=gradients, **options)
    return optimizer_step(gradients(state), **options)
