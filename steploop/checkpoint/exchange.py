"""Move the values of tensors between ranks: shards to the rank that writes, whole tensors from the one that reads."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steploop.checkpoint.format.layout import TensorSpec
from steploop.checkpoint.format.shards import Shard
from steploop.checkpoint.votes import Votes
from steploop.core.state.sharded import is_sharded
from steploop.errors import CheckpointUnsupportedError

__all__ = ["gathered", "received"]

Tables = Mapping[str, Mapping[str, Tensor]]


def gathered(tables: Tables, shards: Mapping[str, Shard], votes: Votes) -> Iterator[tuple[str, str, Tensor]]:
    """File, name and whole values of each tensor that this rank writes, in the order of its files.

    Sharded tensors are put together one at a time: all ranks go through the same rounds, in each of which every writer
    gets its next tensor. So every rank has to go to the end, whatever becomes of what it gets.
    """
    lists: list[list[tuple[str, str, str]]] = [[] for _ in range(votes.size)]
    for file, shard in shards.items():
        lists[shard.owner] += [(file, shard.table, name) for name in shard.names]
    for number in range(max(map(len, lists))):
        mine = None
        for owner, share in enumerate(lists):
            if number < len(share):
                file, table, name = share[number]
                whole = _to_owner(tables[table].get(name), owner, votes)
                if owner == votes.rank:
                    mine = file, name, whole
        if mine is not None:
            yield mine  # type: ignore[misc]  # the owner's is whole
            mine = whole = None


def _to_owner(tensor: Tensor | None, owner: int, votes: Votes) -> Tensor | None:
    """The whole tensor on the rank ``owner``; None on the others."""
    if not is_sharded(tensor):
        return tensor if owner == votes.rank else None
    cut = _Cut(tensor.device_mesh, tensor.placements, tuple(tensor.shape), votes.members[owner])  # type: ignore[union-attr]
    return cut.gather(tensor.to_local().detach(), owns=owner == votes.rank)  # type: ignore[union-attr]  # a DTensor


class _Cut:
    """How a tensor is cut over a mesh: along one axis over one dimension of the mesh, the same on the others.

    Args:
        mesh: of the ranks.
        placements: one for each dimension of the mesh.
        shape: of the whole tensor.
        root: the process that has, or gets, the whole tensor.
    """

    def __init__(self, mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...], root: int) -> None:
        sharded = [i for i, p in enumerate(placements) if type(p).__name__ == "Shard"]
        if len(sharded) > 1 or not all(
            p.is_replicate() for i, p in enumerate(placements) if i not in sharded
        ):
            raise CheckpointUnsupportedError(
                f"A tensor is placed as {placements}, and a checkpoint takes tensors that are cut along one axis of a mesh "
                "(fully_shard, on one dimension or with replicas on the others)."
            )
        self._mesh, self._placements, self._shape, self._root = mesh, placements, shape, root
        self._at = sharded[0] if sharded else None  # the dimension of the mesh
        self._others = [i for i in range(len(placements)) if i not in sharded]
        self._where: list[int] = (mesh.mesh == root).nonzero()[0].tolist()
        self._here: list[int] = mesh.get_coordinate()
        self._axis = placements[self._at].dim if self._at is not None else 0
        self._parts = mesh.size(self._at) if self._at is not None else 1
        self._rows = -(-shape[self._axis] // self._parts) if shape else 1

    def _part(self, number: int) -> tuple[int, ...]:
        """The shape of the part of a coordinate: ``torch.chunk`` gives the last ones less, or nothing."""
        if self._at is None:
            return self._shape
        rows = min(self._rows, max(0, self._shape[self._axis] - number * self._rows))
        return (*self._shape[: self._axis], rows, *self._shape[self._axis + 1 :])

    @property
    def _longest(self) -> int:
        return math.prod(self._part(0))

    def gather(self, local: Tensor, *, owns: bool) -> Tensor | None:
        """Send the parts to the root; the whole tensor there, None elsewhere."""
        if self._at is None:
            return local if owns else None
        if any(self._here[i] != self._where[i] for i in self._others):
            return None  # the replica that the root is in has all there is
        sent = local.new_zeros(self._longest)
        sent[: local.numel()] = local.contiguous().reshape(-1)
        room = local.new_empty(self._parts * self._longest) if owns else None
        parts = None if room is None else list(room.view(self._parts, self._longest).unbind())
        torch.distributed.gather(
            _raw(sent),
            None if parts is None else [_raw(part) for part in parts],
            dst=self._root,
            group=self._mesh.get_group(self._at),
        )
        if room is None or parts is None:
            return None
        if self._axis == 0:  # the parts lie one after another
            return room[: math.prod(self._shape)].view(self._shape)
        shapes = [self._part(i) for i in range(self._parts)]
        pieces = [part[: math.prod(s)].view(s) for part, s in zip(parts, shapes, strict=True)]
        return torch.cat(pieces, self._axis)

    def scatter(self, whole: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Send each rank its part of the root's tensor; a DTensor of the mesh."""
        from torch.distributed.tensor import DTensor

        here = 0 if self._at is None else self._here[self._at]
        room = torch.zeros(self._longest, dtype=dtype, device=device)
        if all(self._here[i] == self._where[i] for i in self._others):
            if self._at is None:
                if whole is not None:
                    room.copy_(whole.contiguous().reshape(-1))
            else:
                parts = None if whole is None else [_raw(part) for part in self._padded(whole, device)]
                torch.distributed.scatter(
                    _raw(room), parts, src=self._root, group=self._mesh.get_group(self._at)
                )
        place = list(self._where)
        if self._at is not None:
            place[self._at] = here
        for number, i in enumerate(
            self._others
        ):  # from the root's replica to the others, dimension by dimension
            done = self._others[: number + 1]
            if all(self._here[j] == self._where[j] for j in self._others if j not in done):
                source = [self._here[j] if j in done and j != i else place[j] for j in range(len(place))]
                torch.distributed.broadcast(
                    _raw(room), int(self._mesh.mesh[tuple(source)]), group=self._mesh.get_group(i)
                )
        shape = self._part(here)
        local = room[: math.prod(shape)].view(shape).clone()
        stride = torch.empty(self._shape, device="meta").stride()
        found: Tensor = DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=torch.Size(self._shape), stride=stride
        )
        return found

    def _padded(self, whole: Tensor, device: torch.device) -> list[Tensor]:
        parts = []
        at = 0
        for number in range(self._parts):
            shape = self._part(number)
            piece = whole.narrow(self._axis, at, shape[self._axis]).to(device).contiguous().reshape(-1)
            at += shape[self._axis]
            part = piece.new_zeros(self._longest)
            part[: piece.numel()] = piece
            parts.append(part)
        return parts


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: not every backend sends every dtype."""
    return tensor.view(torch.uint8)


def received(
    whole: Tensor | None,
    spec: TensorSpec,
    *,
    reader: int,
    votes: Votes,
    like: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The tensor that the rank ``reader`` has read: all of it, or this rank's part of it.

    Args:
        whole: on that rank; None on the others.
        spec: of the tensor.
        reader: the rank.
        votes: of the ranks.
        like: a sharded tensor that it is to be cut as; None: every rank gets it whole.
        device: that the ranks exchange tensors on.
    """
    if like is not None:
        root = votes.members[reader]
        cut = _Cut(like.device_mesh, like.placements, spec.shape, root)  # type: ignore[attr-defined]  # a DTensor
        return cut.scatter(whole, spec.torch_dtype, device)
    if votes.size == 1:
        return whole  # type: ignore[return-value]  # it was read here
    if whole is None:
        stride = spec.stride or torch.empty(spec.shape, device="meta").stride()
        values = torch.empty_strided(spec.shape, stride, dtype=spec.torch_dtype, device=device)
    else:
        values = whole.to(device)
    if values.numel():
        # a permuted tensor lies without gaps: its memory is sent as it lies
        flat = _raw(values.as_strided((values.numel(),), (1,)))
        torch.distributed.broadcast(flat, group=votes.group, group_src=reader)
    # an optimizer's own counts stay on the host
    return values.cpu() if values.numel() <= 1 else values
