"""Describe a tensor in a line: range, mean, zeros, and how much is not finite."""

import attrs
import torch
from torch import Tensor

__all__ = ["Stats", "stats_of"]


@attrs.frozen(kw_only=True)
class Stats:
    """The statistics of a tensor.

    Attributes:
        name: what it is called.
        shape: of it.
        dtype: without "torch.".
        nan, pos_inf, neg_inf, zeros: how many entries.
        low, high, mean, std: of the finite entries; None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nan: int
    pos_inf: int
    neg_inf: int
    zeros: int
    low: float | None
    high: float | None
    mean: float | None
    std: float | None

    @property
    def finite(self) -> bool:
        """Whether all entries are finite."""
        return not (self.nan or self.pos_inf or self.neg_inf)

    def __str__(self) -> str:
        bad = [
            f"{n} {what}"
            for n, what in ((self.nan, "nan"), (self.pos_inf, "inf"), (self.neg_inf, "-inf"))
            if n
        ]
        zeros = f", {self.zeros} zeros" if self.zeros else ""
        spread = (
            ""
            if self.low is None
            else f", {self.low:.4g} to {self.high:.4g}, mean {self.mean:.4g}, std {self.std:.4g}{zeros}"
        )
        return f"{self.name} {self.shape} {self.dtype}{spread}{', ' if bad else ''}{', '.join(bad)}"


def stats_of(name: str, tensor: Tensor) -> Stats:
    """Compute the statistics of a floating-point tensor, in float64."""
    values = tensor.detach()
    values = values.coalesce().values() if values.is_sparse else values
    values = torch.view_as_real(values) if values.is_complex() else values
    flat = values.reshape(-1).to("cpu", torch.float64)
    known = flat[torch.isfinite(flat)]
    some = known.numel() > 0
    return Stats(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        nan=int(flat.isnan().sum()),
        pos_inf=int((flat == torch.inf).sum()),
        neg_inf=int((flat == -torch.inf).sum()),
        zeros=int((flat == 0).sum()),
        low=float(known.min()) if some else None,
        high=float(known.max()) if some else None,
        mean=float(known.mean()) if some else None,
        std=float(known.std(correction=0)) if some else None,
    )
