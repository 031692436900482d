"""Save a state from all ranks at once: each writes the tensors that it owns, rank 0 seals and renames."""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.checkpoint.exchange import gathered
from steploop.checkpoint.finiteness import refuse_nonfinite
from steploop.checkpoint.format.json_values import write_json
from steploop.checkpoint.format.manifest import MANIFEST
from steploop.checkpoint.format.shard_files import write_shard
from steploop.checkpoint.format.shard_manifest import ShardManifest
from steploop.checkpoint.format.shards import Shard, cut, metadata_of
from steploop.checkpoint.format.table_entries import write_table
from steploop.checkpoint.format.tensor_files import Nowhere
from steploop.checkpoint.packing import Collected
from steploop.checkpoint.provenance import ENVIRONMENT, environment_bytes
from steploop.checkpoint.storage.commit import commit, write_bytes, write_file
from steploop.checkpoint.storage.local import FileWriter, Fs
from steploop.checkpoint.votes import Votes, described, rebuilt, told
from steploop.core.state.sharded import is_sharded
from steploop.errors import CheckpointWriteError

__all__ = ["RankSave", "rank_digest"]

Values = Iterator[tuple[str, str, Tensor]]
# write(file, fill): what ``fill`` gives, which fills the new file
_Write = Callable[[str, Callable[[FileWriter], dict[str, str]]], dict[str, str]]


@attrs.frozen(kw_only=True)
class RankSave:
    """One save of all ranks.

    Attributes:
        votes: of the ranks.
        collected: the state, taken apart.
        shards: what each file holds, and who writes it.
    """

    votes: Votes
    collected: Collected
    shards: Mapping[str, Shard]

    @classmethod
    def begin(cls, votes: Votes, collect: Callable[[], Collected]) -> "RankSave":
        """Take the state apart on every rank; nothing is begun if that fails on one.

        Raises:
            ConfigError: the ranks have different states.
            CheckpointWriteError: or what ``collect`` raised on a rank.
        """
        collected = votes.agreed(collect)
        if votes.size > 1:
            votes.same(_table_digest(collected), "The state to be saved")
        return cls(votes=votes, collected=collected, shards=cut(collected.specs, votes.size))

    def values(self) -> Values:
        """File, name and values of each tensor that this rank writes; every rank has to go to the end."""
        return gathered(self.collected.tensors, self.shards, self.votes)

    def copied(self, copy: Callable[[str, str, Tensor], Tensor]) -> "RankSave":
        """The same save with copies of what this rank writes: no tensor of the state is needed any more.

        Args:
            copy: ``copy(table, name, tensor)`` gives a copy on the host.
        """
        copies: dict[str, dict[str, Tensor]] = {table: {} for table in self.collected.tensors}
        problem: BaseException | None = None
        mine = self.values()
        try:
            for file, name, tensor in mine:
                table = self.shards[file].table
                copies[table][name] = copy(table, name, tensor)
        except BaseException as error:  # noqa: BLE001  (the other ranks wait for this one)
            problem = error
        for _ in mine:
            pass
        self.votes.agree(problem)
        return attrs.evolve(self, collected=attrs.evolve(self.collected, tensors=copies))

    def own(self) -> Collected:
        """What this rank checks: the tensors that it writes, and its parts of sharded ones."""
        here = {
            (s.table, name) for s in self.shards.values() if s.owner == self.votes.rank for name in s.names
        }
        tensors = {
            table: {n: t for n, t in tensors.items() if (table, n) in here or is_sharded(t)}
            for table, tensors in self.collected.tensors.items()
        }
        return attrs.evolve(self.collected, tensors=tensors)

    def write(
        self,
        fs: Fs,
        target: Path,
        device: torch.device,
        *,
        overwrite: bool,
        require_finite: bool = True,
        after: Callable[[], None] | None = None,
        tries: int = 3,
        wait_s: float = 0.5,
    ) -> str:
        """Write the checkpoint ``target``, on every rank; return the state's digest.

        Args:
            fs: the storage; every rank sees the same files.
            target: the directory that is to appear.
            device: where the state is, for the record.
            overwrite: take the place of a checkpoint that has the name.
            require_finite: refuse trained parameters that are not finite.
            after: called on rank 0 when the checkpoint is on the disk; its failure is one of all.
            tries: how often to begin again after a system error on some rank.
            wait_s: seconds before the second try.

        Raises:
            NonFiniteError: a trained parameter is not finite, and ``require_finite``.
            CheckpointWriteError: some rank could not write; on every rank, with one sentence that names it.
        """
        if require_finite:
            self.votes.agreed(lambda: refuse_nonfinite(self.own()))

        def share(temporary: Path) -> dict[str, dict[str, str]]:
            return self._share(lambda file, fill: write_file(fs, temporary / file, fill), self.values())

        if not self.votes.leads:
            return self._follow(target, share)

        def write(temporary: Path) -> str:
            self.votes.from_first({"write": temporary.name})
            manifest = self._manifest(share(temporary))
            for file, index in manifest.indexes().items():
                write_bytes(fs, temporary / file, index)
            write_bytes(fs, temporary / MANIFEST, manifest.seal())
            write_bytes(fs, temporary / ENVIRONMENT, environment_bytes(device, self.votes.ranks))
            return manifest.digest

        try:
            digest = commit(fs, target, write, overwrite=overwrite, tries=tries, wait_s=wait_s)
            if after is not None:
                after()
        except BaseException as error:
            self.votes.from_first({"failed": described(error)})
            raise
        self.votes.from_first({"done": digest})
        return digest

    def _follow(self, target: Path, share: Callable[[Path], object]) -> str:
        """Write this rank's files as often as rank 0 begins; its last word is everyone's."""
        problem: BaseException | None = None
        while "write" in (message := self.votes.from_first()):
            problem = None
            try:
                share(target.with_name(message["write"]))
            except BaseException as error:  # noqa: BLE001  (rank 0 knows, and says what becomes of it)
                problem = error
        if "done" in message:
            return str(message["done"])
        if problem is not None and not isinstance(problem, Exception):
            raise problem
        raise told(message["failed"]) from problem

    def _share(self, write: _Write, mine: Values) -> dict[str, dict[str, str]]:
        """Write this rank's files; the digests of all ranks' tensors, or OSError if the system failed some rank."""
        digests: dict[str, dict[str, str]] = {}
        problem: BaseException | None = None
        try:
            for file, shard in self.shards.items():
                if shard.owner == self.votes.rank:
                    found = write(file, partial(self._fill, file, mine))
                    digests.setdefault(shard.table, {}).update(found)
        except BaseException as error:  # noqa: BLE001  (the other ranks wait for this one)
            problem = error
        for _ in mine:  # the others need this rank's parts of what they write
            pass
        votes = self.votes.everyone(
            {"digests": digests, "problem": None if problem is None else described(problem)}
        )
        failed = [rank for rank, vote in enumerate(votes) if vote["problem"]]
        if problem is not None and (self.votes.size == 1 or not isinstance(problem, Exception)):
            raise problem
        if failed:
            raise _of_ranks(failed, votes[failed[0]]["problem"]) from problem
        whole: dict[str, dict[str, str]] = {table: {} for table in self.collected.specs}
        for vote in votes:
            for table, found in vote["digests"].items():
                whole[table] |= found
        return whole

    def _fill(self, file: str, mine: Values, out: FileWriter) -> dict[str, str]:
        shard = self.shards[file]
        specs = {name: self.collected.specs[shard.table][name] for name in shard.names}
        pairs = ((name, tensor) for _, name, tensor in islice(mine, len(specs)))
        return write_shard(out, pairs, specs, metadata_of(self.collected.metadata[shard.table], shard.names))

    def _manifest(self, digests: Mapping[str, Mapping[str, str]]) -> ShardManifest:
        return ShardManifest(
            tensors=self.collected.specs,
            digests=digests,
            metadata=self.collected.metadata,
            state=self.collected.state,
            shards=self.shards,
        )

    def digest(self) -> str:
        """The digest that ``write`` would return, without writing."""
        return self._manifest(self._share(lambda _, fill: fill(Nowhere()), self.values())).digest


def rank_digest(votes: Votes, collect: Callable[[], Collected]) -> str:
    """The digest of a state that has ranks; what every rank has whole is hashed by each for itself, without a message."""
    collected = collect()
    alone = votes
    if not any(is_sharded(t) for table in collected.tensors.values() for t in table.values()):
        alone = Votes()
    return RankSave(votes=alone, collected=collected, shards=cut(collected.specs, alone.size)).digest()


def _table_digest(collected: Collected) -> str:
    """A digest of all of a state but the values of its tensors."""
    tables = {table: write_table(specs) for table, specs in collected.specs.items()}
    return hashlib.sha256(write_json({"tensors": tables, "state": collected.state})).hexdigest()


def _of_ranks(failed: list[int], first: Mapping[str, Any]) -> Exception:
    """What failed on some ranks: an error of the system, which may pass, stays one."""
    error = rebuilt(failed, first, CheckpointWriteError)
    if first["errno"] is None:
        return error
    text = str(error)
    if first["errno"] == errno.ENOENT:
        text += " (the directory that rank 0 made is not there: save to a disk that all ranks share)"
    return OSError(first["errno"], text)
