"""Workers under spawn and forkserver (the default from Python 3.14 on): the same batches, or a reason in words."""

import multiprocessing as mp
import subprocess
import sys
import textwrap
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch.utils.data import Dataset

from steploop.core.file_modules import file_modules, load_file
from steploop.data import worker_start
from steploop.data.loader import Loader
from steploop.errors import DataError
from steploop.tools.cli import call


@pytest.fixture
def spawned(monkeypatch):
    """Start the workers of this test by spawn."""
    before = mp.get_start_method()
    mp.set_start_method("spawn", force=True)
    yield
    mp.set_start_method(before, force=True)


class Held(Dataset):
    """Holds what is awkward to send: a generator, a read-only array, an empty tensor."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)
        self.empty = torch.zeros(0)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return i, self.generator.initial_seed(), len(self.empty)


def test_a_generator_arrives_in_its_state(spawned):
    (batch,) = Loader(Held(), batch_size=4, seed=0, num_workers=1, shuffle=False)
    assert [part.tolist() for part in batch] == [[0, 1, 2, 3], [5] * 4, [0] * 4]


def test_a_generator_is_sent_with_all_of_its_state():
    generator = torch.Generator().manual_seed(3)
    torch.rand(7, generator=generator)
    copy = ForkingPickler.loads(ForkingPickler.dumps(generator))
    assert torch.equal(torch.rand(5, generator=copy), torch.rand(5, generator=generator))


def test_what_cannot_be_sent_is_named(spawned):
    with pytest.raises(DataError, match=r"'spawn'.*cannot send: transform \(\w+: .*lambda.*num_workers=0"):
        Loader(Held(), batch_size=2, seed=0, num_workers=1, transform=lambda s, _: s).epoch(0)

    class Local(Held):
        pass

    with pytest.raises(DataError, match=r"cannot send: dataset \(\w+: .*Local.*top level"):
        Loader(Local(), batch_size=2, seed=0, num_workers=2).epoch(0)
    assert mp.active_children() == []


def test_a_module_that_was_loaded_by_path_is_listed_with_the_text_that_was_run(tmp_path, monkeypatch):
    file = tmp_path / "plain.py"
    file.write_text("x = 1")
    module = load_file("other_name_of_plain", file, b"x = 2")
    monkeypatch.setitem(sys.modules, "other_name_of_plain", module)
    assert module.x == 2
    listed = {name: (path, text) for name, path, text in file_modules()}
    assert listed["other_name_of_plain"] == (str(file), b"x = 2")
    assert not {"torch", "steploop", "pytest", "textwrap", "__main__"} & set(listed)


@pytest.mark.parametrize(("chosen", "pid", "expected"), [
    (["__main__"], None, ["__main__", "steploop.data.batch_requests"]),
    (["numpy"], None, ["numpy"]),
    (["__main__"], 123, ["__main__"]),
])  # fmt: skip
def test_a_fork_server_imports_torch_once_unless_its_modules_were_chosen(monkeypatch, chosen, pid, expected):
    server = forkserver._forkserver
    monkeypatch.setattr(server, "_preload_modules", chosen)
    monkeypatch.setattr(server, "_forkserver_pid", pid)
    monkeypatch.setattr(worker_start, "_start_method", lambda: "forkserver")
    monkeypatch.setattr(worker_start.resource_tracker, "ensure_running", lambda: None)
    with worker_start.starting():
        pass
    assert server._preload_modules == expected


RECIPE = '''
"""A recipe whose dataset, transform and start method are its own."""
import multiprocessing as mp
import attrs, torch, torch.nn.functional as F
from torch import nn
from steploop import Optimizer, TrainState, backward_scaled, evaluate, forward_loss, optimizer_step, unscale_and_clip
from steploop.data import Loader
from steploop.recipe import Recipe

mp.set_start_method("spawn")

@attrs.frozen(kw_only=True)
class Config:
    epochs: int = 2
    num_workers: int = 1
    change_file: bool = False

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, i):
        x = torch.rand(3)
        return x, x.sum(0, keepdim=True)

def moved(sample, generator):
    return sample[0] + torch.rand(3, generator=generator), sample[1]

def objective(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])

def build(config, device):
    if config.change_file:  # as an editor does while the run goes on
        with open(__file__, "w") as file:
            file.write("1 / 0")
    torch.manual_seed(0)
    state = TrainState.create(nn.Linear(3, 1), Optimizer(torch.optim.SGD, lr=0.1), seed=0)
    def train_step(state, batch):
        return optimizer_step(unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1e9))
    batches = Loader(Points(), batch_size=4, seed=0, num_workers=config.num_workers, transform=moved, persistent_workers=True)
    return Recipe(state=state, train_step=train_step, batches=batches, epochs=config.epochs)
'''


def test_a_recipe_file_finds_its_dataset_in_workers_even_if_the_file_has_changed(tmp_path):
    """The workers run the text that the run began with, and the weights are those without workers, to the bit."""
    recipe, plain = tmp_path / "spawns.py", tmp_path / "plain.py"
    recipe.write_text(RECIPE)
    plain.write_text(RECIPE.replace('mp.set_start_method("spawn")', ""))
    words = ["run", str(recipe), "--out", str(tmp_path / "spawned"), "--set", "change_file=true"]
    done = subprocess.run(
        [sys.executable, "-m", "steploop", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert recipe.read_text() == "1 / 0"
    assert call(["run", str(plain), "--out", str(tmp_path / "plain"), "--set", "num_workers=0"]) == 0
    assert call(["diff", str(tmp_path / "spawned"), str(tmp_path / "plain")]) == 0


def test_a_script_that_trains_at_its_top_level_is_told_what_to_write(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing as mp
        from steploop.data import Loader
        mp.set_start_method("forkserver", force=True)
        list(Loader(list(range(8)), batch_size=4, seed=0, num_workers=1))
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ended with exit code 1" in done.stderr
    assert "it must train below `if __name__ == '__main__':`" in done.stderr
