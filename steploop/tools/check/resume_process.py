"""Check a recipe's exact resume: run one half here, the other in a new process, compare.

As a program, ``python -m steploop.tools.check.resume_process REQUEST``, it is that other process.
"""

import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from steploop import checkpoint
from steploop.testing.state_comparison import copied, require, require_same, values
from steploop.tools.check.one_line import one_line
from steploop.tools.check.subjects import Subject

__all__ = ["check_resume", "main"]


def check_resume(subject: Subject, cut: int) -> None:
    """Law 4. fold(load(save(fold(s, a))), b) = fold(s, a + b), the second fold in a new process.

    Both runs begin with a fresh build of the recipe; the new process also takes its batches from the cursor on by
    itself, and orders sets differently (``PYTHONHASHSEED``), as any new process may.

    Args:
        subject: the recipe.
        cut: batches before the checkpoint.
    """
    recipe = subject.fresh()
    batches = subject.batches_of(recipe)
    with TemporaryDirectory() as name:
        folder = Path(name)
        half = reduce(recipe.train_step, batches[:cut], recipe.state)
        checkpoint.save(half, folder / "half")
        whole = copied(values(reduce(recipe.train_step, batches[cut:], half)))
        _in_new_process(subject, cut, folder)
        resumed = checkpoint.load(folder / "resumed", like=subject.fresh().state)
    require_same(resumed, whole, f"a run resumed after {cut} batches must equal the uninterrupted run")


def _in_new_process(subject: Subject, cut: int, folder: Path) -> None:
    request = {
        "path": str(subject.path.resolve()), "values": subject.values, "device": str(subject.device), "phase": subject.phase,
        "samples": subject.samples, "steps": subject.steps, "cut": cut, "folder": str(folder),
        "threads": torch.get_num_threads(), "whole": subject.structure.cut is None,
    }  # fmt: skip
    done = subprocess.run(  # noqa: S603  (this interpreter, and a request of our own)
        [sys.executable, "-m", "steploop.tools.check.resume_process", json.dumps(request)],
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.strip().rpartition("\n")[2]
    require(
        done.returncode == 0,
        f"a new process must be able to resume after {cut} batches, but it failed: {last}",
    )


def main(text: str) -> None:
    """Load the checkpoint, run to the end, save.

    Args:
        text: the request, as JSON.
    """
    request: dict[str, Any] = json.loads(text)
    torch.set_num_threads(request["threads"])
    folder, cut = Path(request["folder"]), request["cut"]
    subject = Subject(
        path=Path(request["path"]), values=request["values"], device=torch.device(request["device"]),
        phase=request["phase"], samples=request["samples"], steps=request["steps"], whole=request["whole"],
    )  # fmt: skip
    recipe = subject.recipe
    state = checkpoint.load(folder / "half", like=recipe.state)
    state = reduce(recipe.train_step, subject.batches_of(recipe, cut), state)
    checkpoint.save(state, folder / "resumed")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:  # noqa: BLE001  (a recipe may raise anything, and the last line is what is read)
        sys.exit(one_line(error))
