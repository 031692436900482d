"""Run directories as a damaged disk or a stranger leaves them: seeded mutants of a real one."""

import copy
import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from running import train
from sample_runs import make_run

from steploop.checkpoint.format.sealing import seal

SECRET = "TOPSECRET"
RECORDS = ("config.json", "status.json", "run.owner.json")
ESCAPE = "\x1b]0;owned\x07"
WEIRD = (
    None, True, False, 0, -1, 1, 1.5, -0.0, 2**53, 2**70, -(2**70), 10**400, 1e308, -1e308, 5e-324, float("nan"),
    float("inf"), "", "x", "1", "\x00", "\x1b[2J\x9b31m\x7f", ESCAPE, "\r\ngo on with: rm", "a\u202eb\u2028", "\ud800",
    "$\\frac$", "${x}_^{", "<script>alert(1)</script>", "</script>", "%s{0}", "../../../etc/passwd", "x" * 5000, [], {}, [[]],
    [1, [2, "\x1b"]], {"a": {"b": "\x1b"}}, {"\x1b": 1}, {"": None}, {"metric": 3}, [None] * 50, {"tensor": "0"},
)  # fmt: skip
NAMES = (
    "",
    "kind",
    "step",
    "metrics",
    "best",
    "phase",
    "\x1b[31m",
    "$x$",
    "_hidden",
    "\ud800",
    "a.b",
    "n" * 300,
    "é ✓",
)


def make_base(folder: Path) -> Path:
    """A real run with checkpoints, a capsule of a step that was not finite, a picture, and a lock file."""
    run = folder / "base"
    train(run, {"epochs": "1", "explode_at": "5"}, checkpoint_every=3)
    sample = make_run(folder / "sample", steps=40, epochs=2, every=5, layers=True)
    lines = (run / "metrics.jsonl").read_text() + (sample / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines)
    (run / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (run / "run.owner.json").write_text('{"pid": 1, "host": "h", "started": "now"}')
    shutil.rmtree(sample)
    assert list((run / "capsules").glob("step-*"))
    return run


class Mutator:
    """Damages copies of a run directory.

    Args:
        base: the directory that is copied.
        rng: where its choices come from.
        outside: a folder with a ``secret`` and a ``victim``, which no command may show or change.
    """

    def __init__(self, base, rng, outside):
        self.files = {p.relative_to(base): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}
        self.rng = rng
        self.outside = outside

    def make(self, target):
        """Write a mutant; what was done to it."""
        for name, data in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        kinds = (
            self._bytes,
            self._json,
            self._json,
            self._lines,
            self._lines,
            self._sealed,
            self._special,
            self._gone,
        )
        done = []
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            with suppress(
                OSError, ValueError, RecursionError
            ):  # the one before may have left no file to damage
                done.append(self.rng.choice(kinds)(target))
        return done

    def _pick(self, target, names=None):
        names = names or [n for n in self.files if n.name != "recipe.py" or len(n.parts) == 1]
        return self._own(target, target / self.rng.choice(list(names)))

    def _own(self, target, path):
        """A path, if it is still a small file of the mutant itself."""
        if (
            path.is_symlink()
            or not path.is_file()
            or path.resolve().parent != (target.resolve() / path.relative_to(target)).parent
        ):
            raise OSError("replaced before")
        if path.stat().st_size > 1 << 20:
            raise OSError("grown before")
        return path

    def _bytes(self, target):
        """Bytes cut, flipped, spliced, added, or all of them others."""
        path = self._pick(target)
        data, rng = bytearray(path.read_bytes()) or bytearray(b"!"), self.rng
        at = rng.randrange(len(data))
        kind = rng.choice(("cut", "flip", "splice", "append", "garbage", "zeros", "exchange", "empty"))
        if kind == "cut":
            del data[at:]
        elif kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "splice":
            data[at : at + rng.randrange(40)] = rng.choice(
                (b"[" * 20_000, b"\x1b[2J", b'"', b"NaN", rng.randbytes(9))
            )
        elif kind == "append":
            data += rng.choice(
                (b"\x1b[2J", b"{", b"[" * 100_000, b"null\n" * 9, b"\xff\xfe", rng.randbytes(99))
            )
        elif kind == "garbage":
            data = bytearray(rng.randbytes(rng.randrange(2000)))
        elif kind == "zeros":
            data[at:] = bytes(len(data) - at)
        elif kind == "exchange":
            data = bytearray(self._pick(target).read_bytes())
        else:
            data.clear()
        path.write_bytes(data)
        return kind, str(path.name)

    def _changed(self, value):
        """A copy of a JSON value with one place in it changed."""
        value = copy.deepcopy(value)
        places = [(None, None)]
        waiting = [value]
        while waiting:
            one = waiting.pop()
            keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
            for key in keys:
                places.append((one, key))
                waiting.append(one[key])
        holder, key = self.rng.choice(places)
        weird = self.rng.choice(WEIRD)
        if holder is None:
            if isinstance(value, dict) and self.rng.random() < 0.7:
                return {**value, self.rng.choice(NAMES): weird}
            return self.rng.choice((weird, [value], {"a": value}))
        kind = self.rng.choice(("replace", "replace", "wrap", "drop", "rename", "add"))
        if kind == "drop":
            del holder[key]
        elif kind == "wrap":
            for _ in range(self.rng.choice((1, 3, 40, 300))):
                holder[key] = [holder[key]]
        elif kind == "rename" and isinstance(holder, dict):
            holder[self.rng.choice(NAMES)] = holder.pop(key)
        elif kind == "add" and isinstance(holder, dict):
            holder[self.rng.choice(NAMES)] = weird
        else:
            holder[key] = copy.deepcopy(weird)
        return value

    def _json(self, target):
        """A value in a record of another type."""
        names = [n for n in self.files if n.name in {*RECORDS, "capsule.json"}]
        path = self._pick(target, names)
        path.write_text(
            json.dumps(self._changed(json.loads(path.read_bytes()))), encoding="utf-8", errors="surrogatepass"
        )
        return "json", path.name

    def _lines(self, target):
        """A line of the metrics changed, repeated, moved, or many of them."""
        path = self._own(target, target / "metrics.jsonl")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        rng = self.rng
        for _ in range(rng.choice((1, 1, 5))):
            at = rng.randrange(len(lines))
            kind = rng.choice(("change", "change", "change", "repeat", "move", "many", "names"))
            if kind == "change":
                lines[at] = json.dumps(self._changed(json.loads(lines[at])), ensure_ascii=rng.random() < 0.5)
            elif kind == "repeat":
                lines += [lines[at]] * rng.choice((1, 50))
            elif kind == "move":
                lines.append(lines.pop(at))
            elif kind == "many":
                lines += [
                    f'{{"kind": "event", "event": "skipped", "step": {n}, "attempted": {n}}}'
                    for n in range(300)
                ]
            else:
                values = {f"m{n}": n for n in range(rng.choice((30, 300)))}
                lines.append(json.dumps({"kind": "eval", "step": 3, "attempted": 3, "metrics": values}))
        path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
        return "lines", kind

    def _sealed(self, target):
        """A checkpoint whose digests are right and whose content is not: digests find damage, no stranger."""
        names = [n for n in self.files if n.name in {"state.json", "environment.json"}]
        path = self._pick(target, names)
        body = self._changed(json.loads(path.read_bytes()))
        if isinstance(body, dict):
            path.write_bytes(seal(body)[0])
        return "sealed", path.name

    def _gone(self, target):
        path = self._pick(target)
        if self.rng.random() < 0.3 and path.parent != target:
            shutil.rmtree(path.parent)
        else:
            path.unlink()
        return "gone", str(path.name)

    def _special(self, target):
        """A link, a pipe, a socket or a directory in the place of a file; a link in the place of a directory."""
        rng, secret, victim = self.rng, self.outside / "secret", self.outside / "victim"
        places = [
            "run.lock",
            "run.owner.json",
            "recipe.py",
            "picture.png",
            "metrics.jsonl",
            "config.json",
            "status.json",
        ]
        outputs = ["report.html", f".report.html-{os.getpid()}", "curves.png", "curves.svg"]
        folders = ["checkpoints", "capsules", *(str(n.parent) for n in self.files if len(n.parts) > 2)]
        place = rng.choice(
            (*places, *places, *outputs, *folders, "checkpoints/step-999\x1b[2J", "new\x1b.png")
        )
        path = target / place
        if place in outputs:
            path.symlink_to(victim)
            return "link out", place
        if path.is_dir():
            shutil.rmtree(path)
            path.symlink_to(self.outside)
            return "link to a folder", place
        path.unlink(missing_ok=True)
        kind = rng.choice(("secret", "fifo", "directory", "socket", "loop", "dangling", "device", "endless"))
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        elif kind == "endless":
            with path.open("wb") as file:
                file.truncate(1 << 40)  # a sparse file: a terabyte of zeros that takes no room
        else:
            ends = {
                "secret": secret,
                "loop": path,
                "dangling": self.outside / "none",
                "device": Path("/dev/zero"),
            }
            path.symlink_to(ends[kind])
        return kind, place


def make_outside(folder: Path) -> Path:
    """What no command may show or change: a secret, a victim, and a run whose values are secret too."""
    folder.mkdir()
    (folder / "secret").write_text(f'{{"state": "{SECRET}", "kind": "event", "event": "{SECRET}"}}\n')
    (folder / "victim").write_text("mine")
    for name in ("config.json", "state.json", "metrics.jsonl", "capsule.json", f"step-{SECRET}"):
        shutil.copyfile(folder / "secret", folder / name)
    (folder / "step-000000009999").mkdir()
    return folder
