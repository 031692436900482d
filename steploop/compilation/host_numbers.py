"""Numbers that the host knows at each step: a trace computes with them, and notes what Python decides by them."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.core.state.trace import TracedCount
from steploop.errors import CompileError

__all__ = [
    "Counter",
    "Expression",
    "Guard",
    "HostNumber",
    "Now",
    "fed",
    "holds_numbers",
    "plain_number",
    "refuse_if_new_at_each_step",
]


@attrs.define(eq=False)
class Now:
    """What the host knows at a step, before its graph runs.

    Attributes:
        states: that go in.
        numbers: of the batch.
        finite: for each state, whether its step will be finite: assumed, for this is known afterwards.
    """

    states: Sequence[Any]
    numbers: Sequence[Any]
    finite: Sequence[bool]


# What the host computes at each step.
Expression = Callable[[Now], Any]


@attrs.frozen(eq=False)
class Guard:
    """What Python decided while a step was traced: the graph holds while it decides the same.

    Attributes:
        read: gives the value from the states and the batch of a step.
        value: what it was when the step was traced.
        after: the states whose step being finite it depends on.
        name: for messages.
    """

    read: Expression
    value: Any
    after: frozenset[int]
    name: str


class HostNumber(TracedCount):
    """A number that may be another one at each step: of a counter, of the batch, of the step before.

    Arithmetic gives another such number; with a tensor it gives a tensor, which the host feeds. What makes it a number
    of Python's (a comparison, ``int()``, a format) gives today's value, and is noted: the graph is run only while that
    is the same.
    """

    __slots__ = ("after", "name", "read")

    trace: Any  # a StepTrace, which imports this module

    def __init__(self, trace: Any, read: Expression, name: str, after: frozenset[int] = frozenset()) -> None:
        super().__init__(trace)
        self.read = read
        self.name = name
        self.after = after

    @property  # type: ignore[misc]  # isinstance() reads it
    def __class__(self) -> Any:
        return type(self.trace.look(self))

    def tensor(self, *like: Tensor) -> Tensor:
        """The number as a tensor of shape (), of the dtype that Python's number takes with these tensors."""
        value = self.trace.look(self)
        dtype = torch.get_default_dtype() if isinstance(value, float) else torch.int64
        if like:
            dtype = torch.result_type(like[0], value)
            for t in like[1:]:
                dtype = torch.promote_types(dtype, torch.result_type(t, value))
        return self.trace.tensor(self, dtype)  # type: ignore[no-any-return]

    def _made(self, read: Expression, after: frozenset[int]) -> "HostNumber":
        return HostNumber(self.trace, read, self.name, after)

    def _combined(self, op: Callable[[Any, Any], Any], other: Any, *, swapped: bool = False) -> Any:
        mine, after = self.read, self.after
        if issubclass(type(other), HostNumber):
            theirs, after = other.read, after | other.after
            return self._made(lambda now: op(mine(now), theirs(now)), after)
        if swapped:
            return self._made(lambda now: op(other, mine(now)), after)
        return self._made(lambda now: op(mine(now), other), after)

    def _value(self) -> Any:
        return self.trace.note(self)

    def __bool__(self) -> bool:
        """Noted."""
        return bool(self._made(lambda now, mine=self.read: bool(mine(now)), self.after)._value())  # type: ignore[misc]

    def __int__(self) -> int:
        """Noted."""
        return int(self._value())

    def __index__(self) -> int:
        """Noted; a float is no index."""
        return operator.index(self._value())

    def __float__(self) -> float:
        """Noted."""
        return float(self._value())

    def __complex__(self) -> complex:
        """Noted."""
        return complex(self._value())

    def __hash__(self) -> int:
        """Noted."""
        return hash(self._value())

    def __str__(self) -> str:
        """Noted."""
        return str(self._value())

    def __repr__(self) -> str:
        """Noted."""
        return repr(self._value())

    def __format__(self, spec: str) -> str:
        """Noted."""
        return format(self._value(), spec)

    def __round__(self, digits: int | None = None) -> Any:
        return self._made(lambda now, mine=self.read: round(mine(now), digits), self.after)  # type: ignore[misc]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take part in a call of torch as a tensor."""
        return func(*fed(args), **fed(kwargs or {}))


def holds_numbers(args: Any) -> bool:
    """Whether there is such a number among arguments, or in a list of them."""
    return any(
        issubclass(type(a), HostNumber)
        or (type(a) in {list, tuple} and any(issubclass(type(v), HostNumber) for v in a))
        for a in args
    )


def fed(args: Any) -> Any:
    """Arguments of a call of torch, with tensors in the places of such numbers."""
    values = list(args.values()) if isinstance(args, dict) else list(args)
    like = [a for a in values if isinstance(a, Tensor)]
    values = [a.tensor(*like) if issubclass(type(a), HostNumber) else _plain_items(a) for a in values]
    return dict(zip(args, values, strict=True)) if isinstance(args, dict) else tuple(values)


def _plain_items(value: Any) -> Any:
    """Sizes and lengths, which torch takes as Python's numbers only."""
    if type(value) in {list, tuple} and any(issubclass(type(v), HostNumber) for v in value):
        return type(value)(map(plain_number, value))
    return value


def plain_number(value: Any) -> Any:
    """The value of such a number, noted; anything else as it is."""
    return value._value() if issubclass(type(value), HostNumber) else value


def _arithmetic(op: Callable[[Any, Any], Any], *, swapped: bool = False) -> Any:
    def apply(self: HostNumber, other: Any) -> Any:
        if isinstance(other, Tensor):
            mine = self.tensor(other)
            return op(other, mine) if swapped else op(mine, other)
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self._combined(op, other, swapped=swapped)

    return apply


def _comparison(op: Callable[[Any, Any], Any]) -> Any:
    def apply(self: HostNumber, other: Any) -> Any:
        if isinstance(other, Tensor):
            return op(self.tensor(other), other)
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self._combined(op, other)._value()

    return apply


def _single(op: Callable[[Any], Any]) -> Any:
    def apply(self: HostNumber) -> Any:
        return self._made(lambda now, mine=self.read: op(mine(now)), self.after)  # type: ignore[misc]

    return apply


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
):
    _op = getattr(operator, f"{_name}_" if _name in {"and", "or"} else _name)
    setattr(HostNumber, f"__{_name}__", _arithmetic(_op))
    setattr(HostNumber, f"__r{_name}__", _arithmetic(_op, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(HostNumber, f"__{_name}__", _comparison(getattr(operator, _name)))
for _name, _op in {
    "neg": operator.neg, "pos": operator.pos, "abs": abs, "invert": operator.invert, "trunc": math.trunc, "floor": math.floor,
    "ceil": math.ceil,
}.items():  # fmt: skip
    setattr(HostNumber, f"__{_name}__", _single(_op))  # type: ignore[arg-type]


class Counter(HostNumber):
    """``attempted_steps`` or ``batch``: how far a step counts it on is part of the plan.

    Attributes:
        owner: the traced state's Owner.
        offset: how far it was counted on in this step.
    """

    __slots__ = ("offset", "owner")

    def __init__(self, trace: Any, read: Expression, name: str, owner: Any, offset: int = 0) -> None:
        super().__init__(trace, read, name)
        self.owner = owner
        self.offset = offset

    def __add__(self, more: Any) -> Any:
        if type(more) is not int:
            return (
                self._combined(operator.add, more)
                if not isinstance(more, Tensor)
                else self.tensor(more) + more
            )
        first = self.read
        return Counter(self.trace, lambda now: first(now) + more, self.name, self.owner, self.offset + more)

    __radd__ = __add__


def refuse_if_new_at_each_step(number: HostNumber, now: Now, steps: int) -> None:
    """Raise CompileError if a number is another one at each of the next steps, so that each would cost a graph."""
    seen = set()
    for k in range(steps):
        states = [
            s.replace(
                attempted_steps=s.attempted_steps + k, applied_steps=s.applied_steps + k, batch=s.batch + k
            )
            for s in now.states
        ]
        try:
            seen.add(number.read(attrs.evolve(now, states=states)))
        except Exception:  # noqa: BLE001  (a table that ends, a division by 0: not known then)
            return
    if len(seen) == steps:
        raise CompileError(
            f"reads {number.name} as a number, which is another one at every step, and each would cost a graph. Decide by it "
            f"(`if {number.name} % k == 0`, `if {number.name} < n`), compute with it and tensors (`loss * {number.name}`), give "
            "a function of the step to schedule or update_ema(decay=...), or read it outside of train_step."
        )
