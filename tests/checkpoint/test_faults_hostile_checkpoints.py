"""Damaged and hostile checkpoints: typed errors, nothing run, nothing half loaded."""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import MemoryFs, listed, make_batches, make_linear, make_state, train_step

from steploop import checkpoint
from steploop.checkpoint.format.sealing import seal
from steploop.checkpoint.loading import load_from, open_checkpoint
from steploop.checkpoint.storage.local import LOCAL
from steploop.errors import CheckpointDamagedError, CheckpointError

FILES = ("environment.json", "model.safetensors", "optimizer.safetensors", "state.json")
TARGET = Path("/c")


def saved_files(state):
    """The files of its checkpoint, in memory."""
    from steploop.checkpoint.packing import collect
    from steploop.checkpoint.saving import write_collected

    fs = MemoryFs({})
    write_collected(fs, TARGET, collect(state), torch.device("cpu"), overwrite=False)
    return fs.tree()["/c"]


def attempt(files, like):
    """What loading these files gives: None for a typed error, else the digest of the state."""
    try:
        state = load_from(open_checkpoint(TARGET, fs=MemoryFs({"/c": files})), like=like)
    except CheckpointError:
        return None
    return checkpoint.digest(state)


def mutant(  # noqa: C901  (one branch for each kind of damage)
    files, others, rng
):
    """A damaged copy: bytes cut, flipped, spliced, added, exchanged; a file gone, or taken from another checkpoint."""
    files = dict(files)
    name = rng.choice(FILES)
    data = bytearray(files[name])
    at = rng.randrange(len(data))
    kind = rng.choice(
        [
            "cut",
            "flip",
            "byte",
            "splice",
            "append",
            "garbage",
            "exchange",
            "gone",
            "other",
            "header",
            "extra",
            "zeros",
        ]
    )
    if kind == "cut":
        del data[at:]
    elif kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = (data[at] + rng.randrange(1, 256)) % 256
    elif kind == "splice":
        data[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40)) + b"!"
    elif kind == "append":
        data += rng.randbytes(rng.randrange(1, 100))
    elif kind == "garbage":
        data = bytearray(rng.randbytes(rng.randrange(2000)))
    elif kind == "zeros":
        data[at:] = bytes(len(data) - at) or b"!"
        data[-1] ^= 1
    elif kind == "header":
        data[:8] = rng.randrange(2**64).to_bytes(8, "little")
    elif kind == "other":
        data = bytearray(others[name])
    elif kind == "exchange":
        second = rng.choice([other for other in FILES if other != name])
        files[name], files[second] = files[second], files[name]
        return files
    elif kind == "gone":
        del files[name]
        return files
    else:
        files[rng.choice(["x", "model.safetensors.bak", ".hidden", "é"])] = b"x"
        return files
    files[name] = bytes(data)
    return files


def test_ten_thousand_mutants_give_typed_errors_and_never_a_wrong_state():
    """None crashes, hangs or takes memory; none loads as anything but the state that was saved."""
    files, others, like = saved_files(make_linear(0)), saved_files(make_linear(1)), make_linear(2)
    expected, before = checkpoint.digest(make_linear(0)), checkpoint.digest(like)
    assert attempt(files, like) == expected
    rng, loaded = random.Random(0), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        changed = mutant(files, others, rng)
        start = time.process_time()
        digest = attempt(changed, like)
        assert time.process_time() - start < 1.0
        if digest is not None:
            # only another intact environment file is no damage: it belongs to no digest
            loaded += 1
            assert digest == expected
            assert {**changed, "environment.json": files["environment.json"]} == files
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # KiB
    assert checkpoint.digest(like) == before
    assert loaded < 500


@pytest.mark.thorough
def test_every_single_bit_flip_is_found():
    """Exhaustive over a small checkpoint."""
    files, like = saved_files(make_linear(0)), make_linear(2)
    for name, data in files.items():
        for bit in range(8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            assert attempt({**files, name: bytes(changed)}, like) is None, (name, bit)


def test_a_sample_of_single_bit_flips_is_found():
    """For every push: one bit in 61."""
    files, like = saved_files(make_linear(0)), make_linear(2)
    for name, data in files.items():
        for bit in range(random.Random(name).randrange(61), 8 * len(data), 61):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            assert attempt({**files, name: bytes(changed)}, like) is None, (name, bit)


HUGE = 100 << 20  # bytes


def spoilt_header(path):
    """A file of 100 MB that says its header fills it."""
    with path.open("wb") as file:
        file.write((HUGE - 8).to_bytes(8, "little") + b"{")
        file.truncate(HUGE)


def endless_header(path):
    """The file as it was, with a header of 2**63 bytes."""
    with path.open("r+b") as file:
        file.write((1 << 63).to_bytes(8, "little"))


def many_tensors(path):
    """A header of 200,000 empty tensors, as safetensors itself reads them."""
    table = {str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def odd_shapes(path):
    """100,000 axes, and one as long as the address space."""
    table = {
        "x": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
        "y": {"dtype": "F32", "shape": [0, 2**63 - 1], "data_offsets": [4, 4]},
    }
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


@pytest.mark.parametrize("resealed", [False, True], ids=["as it was", "resealed"])
@pytest.mark.parametrize("spoil", [spoilt_header, endless_header, many_tensors, odd_shapes])
def test_a_hostile_header_is_neither_read_nor_parsed(spoil, resealed, tmp_path, monkeypatch):
    """It is compared with what the manifest's table of tensors gives, by its size first; whoever reseals gains nothing."""
    checkpoint.save(make_linear(0), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    spoil(path)
    if resealed:
        body = json.loads((tmp_path / "a" / "state.json").read_text())
        body["files"][path.name]["size"] = path.stat().st_size
        (tmp_path / "a" / "state.json").write_bytes(seal(body)[0])
    like, read, preadv = make_linear(1), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    tracemalloc.start()
    with pytest.raises(CheckpointDamagedError, match=r"model\.safetensors"):
        checkpoint.load(tmp_path / "a", like=like)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(read) < 10_000
    assert peak < 1_000_000


IN_A_SUBPROCESS = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from checkpoint_helpers import make_linear
from steploop import checkpoint
from steploop.errors import CheckpointError
like = make_linear(2)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        checkpoint.load(path, like=like)
    except CheckpointError as error:
        print(path.name, type(error).__name__)
    else:
        print(path.name, "loaded")
"""


def test_mutants_on_disk_stay_within_their_limits_of_memory_and_time(tmp_path):
    """200 of them under 64 MiB of memory above the interpreter's own."""
    files, others, rng = saved_files(make_linear(0)), saved_files(make_linear(1)), random.Random(1)
    for number in range(200):
        directory = tmp_path / f"{number:03d}"
        directory.mkdir()
        for name, data in mutant(files, others, rng).items():
            (directory / name).write_bytes(data)
    command = [
        sys.executable,
        "-c",
        IN_A_SUBPROCESS,
        str(tmp_path),
        str(Path(__file__).parents[1] / "helpers"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 200
    assert sum("loaded" in line for line in lines) < 20


# -- nothing is run ---------------------------------------------------------------------------------------------------

_watched: list[str] | None = None
_FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "marshal.loads",
    "ctypes.dlopen",
)


def _audit(event, arguments):
    if _watched is not None and event in _FORBIDDEN:
        _watched.append(f"{event} {arguments[0]!r}")


sys.addaudithook(_audit)


def events_of(act):
    """What of the forbidden happened during ``act``; what it raised, or None."""
    global _watched
    _watched, raised = [], None
    try:
        act()
    except CheckpointError as error:
        raised = error
    finally:
        events, _watched = _watched, None
    return events, raised


class Bomb:
    def __reduce__(self):
        return os.system, ("echo run > /tmp/steploop-was-run",)


def fake_files(directory):
    """Files of other formats, under the names that a checkpoint has."""
    torch.save({"weight": torch.ones(2, 3)}, directory / "torch.pt")
    with zipfile.ZipFile(directory / "archive.zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    return {
        "pickle": pickle.dumps(Bomb()),
        "torch": (directory / "torch.pt").read_bytes(),
        "zip": (directory / "archive.zip").read_bytes(),
        "python": b"import os\nos.system('echo run')\n",
        "yaml": b"!!python/object/apply:os.system ['echo run']\n",
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pickle", "torch", "zip", "python", "yaml"])
def test_files_of_other_formats_are_refused_and_nothing_in_them_is_run(tmp_path, name, kind):
    checkpoint.save(make_linear(0), tmp_path / "a")
    checkpoint.load(tmp_path / "a", like=make_linear(1))
    (tmp_path / "a" / name).write_bytes(fake_files(tmp_path)[kind])
    like = make_linear(1)
    events, raised = events_of(lambda: checkpoint.load(tmp_path / "a", like=like))
    assert isinstance(raised, CheckpointDamagedError)
    assert events == []


def test_loading_a_good_checkpoint_imports_and_runs_nothing(tmp_path):
    state, like = train_step(make_state(0), make_batches(1)[0]), make_state(1)
    checkpoint.save(state, tmp_path / "a")
    checkpoint.load(tmp_path / "a", like=like)
    events, raised = events_of(lambda: checkpoint.load(tmp_path / "a", like=like))
    assert (events, raised) == ([], None)


@pytest.mark.parametrize(
    "said", ["os.system", "torch.optim.SGD", "builtins.eval", "__main__.Bomb", "../../x.py:run"]
)
@pytest.mark.parametrize("field", ["optimizer", "precision", "early_stopping", "hyper", "slots", "scale"])
def test_names_of_code_in_a_checkpoint_are_text(tmp_path, field, said):
    """Compared with what the caller has, never looked up, though the digest is right."""
    checkpoint.save(make_linear(0), tmp_path / "a")
    body = json.loads((tmp_path / "a" / "state.json").read_text())
    values = body["state"]["states"][""]
    values[field] = {
        "hyper": [{"dict": [["_target_", said]]}],
        "slots": {"dict": [["weight", {"dict": [["_class_path", said]]}]]},
        "early_stopping": {"class_path": said},
        "scale": {"class_path": said},
    }.get(field, said)
    (tmp_path / "a" / "state.json").write_bytes(seal(body)[0])
    like = make_linear(1)
    events, raised = events_of(lambda: checkpoint.load(tmp_path / "a", like=like))
    assert events == []
    if field == "slots":  # a text among the slots is a text
        assert raised is None
        assert checkpoint.load(tmp_path / "a", like=like).slots["weight"] == {"_class_path": said}
    else:
        assert isinstance(raised, CheckpointError)


# these import the package's own modules, extras by their fixed names, and the user's recipe, module or loop
IMPORTING = {
    "core/lazy.py", "core/extras.py", "core/moved_names.py", "core/file_modules.py", "runs/logs/notebook_screen.py",
    "tools/bench/handwritten.py", "tools/report/pages.py", "tools/commands/docs.py",
}  # fmt: skip


def test_the_package_has_no_way_to_run_what_it_reads():
    """By the source: no pickle, marshal, torch.load, eval, exec or yaml; imports by a string in a few known places."""
    import ast

    import steploop

    root, importing = Path(steploop.__file__).parent, set()
    for path in root.rglob("*.py"):
        if "_recipes" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                found = {name.split(".")[0] for name in names}
                assert not {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "pydoc", "runpy"} & found
                if "importlib" in found:
                    importing.add(path.relative_to(root).as_posix())
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in {
                    "torch.load",
                    "torch.jit.load",
                    "torch.package.PackageImporter",
                }
    assert importing == IMPORTING


# -- what stands under a file's name ------------------------------------------------------------------------------------


def put_link(path):
    target = path.with_name("elsewhere")
    path.rename(target.parent.parent / "elsewhere")
    path.symlink_to(target.parent.parent / "elsewhere")


def put_fifo(path):
    path.unlink()
    os.mkfifo(path)


def put_directory(path):
    path.unlink()
    path.mkdir()


def put_socket(path):
    import socket

    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def put_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def put_nothing(path):
    path.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", [put_link, put_fifo, put_directory, put_socket, put_device, put_nothing])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, put, name):
    """A link may lead anywhere, and opening a pipe would wait for ever."""
    checkpoint.save(make_linear(0), tmp_path / "a")
    put(tmp_path / "a" / name)
    start = time.monotonic()
    with pytest.raises(CheckpointDamagedError, match=f"{name}.* cannot be read"):
        checkpoint.load(tmp_path / "a", like=make_linear(1))
    assert time.monotonic() - start < 5


def test_a_file_that_is_no_directory_is_no_checkpoint(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(CheckpointDamagedError):
        checkpoint.load(tmp_path / "a", like=make_linear(1))


def test_a_checkpoint_with_another_file_in_it_is_refused(tmp_path):
    checkpoint.save(make_linear(0), tmp_path / "a")
    (tmp_path / "a" / "run.py").write_bytes(b"")
    with pytest.raises(CheckpointDamagedError, match=r"holds 'run.py', which its manifest does not list"):
        checkpoint.load(tmp_path / "a", like=make_linear(1))


def test_a_checkpoint_loads_through_a_link_and_from_a_copy(tmp_path):
    digest = checkpoint.save(make_linear(0), tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy é ✓")
    for name in ("link", "copy é ✓"):
        assert checkpoint.digest(checkpoint.load(tmp_path / name, like=make_linear(1))) == digest


def test_a_loaded_state_does_not_depend_on_its_files(tmp_path):
    state = train_step(make_state(0), make_batches(1)[0])
    digest = checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=make_state(1))
    for path in (tmp_path / "a").iterdir():
        with path.open("r+b") as file:
            file.write(bytes(300))
            file.truncate(200)
    assert checkpoint.digest(loaded) == digest


def test_three_hundred_saves_and_loads_leave_no_descriptor_and_no_thread(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the disk is not what is tested
    state = make_linear(0)
    checkpoint.save(state, tmp_path / "a")
    checkpoint.load(tmp_path / "a", like=state)
    descriptors, threads = len(listed("/proc/self/fd")), threading.active_count()
    resident = resident_kib()
    for _ in range(300):
        checkpoint.save(state, tmp_path / "a", overwrite=True)
        checkpoint.load(tmp_path / "a", like=state)
    assert len(listed("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
    assert resident_kib() - resident < 8_000


def resident_kib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * (resource.getpagesize() // 1024)


def test_the_local_files_are_what_is_used_by_default():
    assert open_checkpoint.__kwdefaults__["fs"] is LOCAL
