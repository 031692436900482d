"""Run members as jobs of a cluster, through submitit: it knows Slurm, and has an executor for one machine."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steploop.core.extras import import_extra
from steploop.errors import ConfigError
from steploop.tools.sweep.member_launchers import member_command, member_environment, open_log

__all__ = ["ClusterJob", "ClusterJobs"]


class ClusterJob:
    """What a job runs: the process of a member.

    Args:
        path: the sweep's directory, which the job must reach.
        number: of the member.
        threads: of the member.
        trust: run a recipe whose files belong to another user.
    """

    def __init__(self, path: Path, number: int, threads: int, *, trust: bool) -> None:
        self._path = path
        self._number = number
        self._threads = threads
        self._trust = trust
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the member; its exit code."""
        import os

        log = open_log(self._path, self._number)
        try:
            self._process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
                member_command(self._path, self._number, trust=self._trust), stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=member_environment(self._threads),
            )  # fmt: skip
        finally:
            os.close(log)
        with self._process as process:
            return process.wait()

    def checkpoint(self) -> Any:
        """At the end of its time, let the member save, and ask for another job that goes on with it."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        return DelayedSubmission(ClusterJob(self._path, self._number, self._threads, trust=self._trust))


class _Submitted:
    """A job that was submitted."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        """The exit code of its member; 1 for a job that ended without one."""
        if not self._job.done():
            return None
        return 1 if self._job.exception() is not None else int(self._job.result())

    def stop(self) -> None:
        """Cancel the job: its member gets SIGTERM and saves."""
        self._job.cancel(check=False)


class ClusterJobs:
    """Submits each member as a job.

    Args:
        path: the sweep's directory, on a disk that every node reaches.
        cluster: "slurm", or "local" for this machine.
        options: parameters of submitit's executor; whole numbers may be given as text.
        threads: of each member.
        trust: run a recipe whose files belong to another user.

    Raises:
        ConfigError: there is no such cluster, or a parameter is none of submitit's.
        MissingExtraError: submitit is not installed.
    """

    def __init__(
        self, path: Path, *, cluster: str, options: Mapping[str, Any], threads: int, trust: bool
    ) -> None:
        submitit = import_extra("submitit", extra="slurm", purpose="Running on a cluster")
        if cluster not in {"slurm", "local"}:
            raise ConfigError(f'--cluster must be "slurm" or "local", but is {cluster!r}.')
        self._path, self._threads, self._trust = path.absolute(), threads, trust
        plain = {k: int(v) if isinstance(v, str) and v.isdecimal() else v for k, v in options.items()}
        try:
            self._executor = submitit.AutoExecutor(folder=self._path / "jobs", cluster=cluster)
            self._executor.update_parameters(**{"name": "steploop", "cpus_per_task": threads, **plain})
        except Exception as error:  # (submitit's own, RuntimeError, NameError)
            raise ConfigError(f"submitit refuses: {error}") from error

    def start(self, number: int) -> _Submitted:
        """Submit a member."""
        return _Submitted(
            self._executor.submit(ClusterJob(self._path, number, self._threads, trust=self._trust))
        )
