"""The shipped recipes: each runs for a few steps, goes on to the bit after a stop, and does what its header says."""

import ast
import json
import math
from functools import partial

import attrs
import pytest
import torch
import torch.nn.functional as F
from running import train
from safetensors.torch import save_file

from steploop import accumulate, forward_loss
from steploop.core.state.several import members
from steploop.errors import ConfigError, DataError, EmptyDataError
from steploop.recipe.config_values import to_json
from steploop.recipe.recipe_files import load_recipe_file
from steploop.recipe.recipe_paths import find_recipe, shipped_recipes
from steploop.testing.resume_laws import check_resume_is_exact
from steploop.testing.state_comparison import clone, fold, require_same

CPU = torch.device("cpu")

# Small enough that a step takes milliseconds; everything else is the recipe's own.
SMALL = {
    "char_lm": {"max_characters": 6000, "context": 16, "width": 16, "batch_size": 8, "sample_characters": 12},
    "cifar_amp": {"data": "synthetic", "widths": (4, 8), "batch_size": 16},
    "cifar_fast": {"data": "synthetic", "widths": (4, 8), "batch_size": 16, "epochs": 2},
    "gan": {"width": 4, "noise": 4, "batch_size": 20},
    "line_search": {"hidden": 8},
    "lr_schedules": {"hidden": 8, "epochs": 2},
    "mnist": {"data": "digits", "hidden": 8, "l1": 1e-4, "l2": 1e-3},
    "resnet_transfer": {
        "data": "digits",
        "weights": "none",
        "train_images": 48,
        "test_images": 20,
        "batch_size": 8,
    },
    "segmentation": {"size": 16, "train_images": 40, "test_images": 10, "width": 2, "batch_size": 8},
    "text_classification": {"tokens": 12, "vocabulary": 50, "embedding": 4, "hidden": 4, "batch_size": 8},
}
NAMES = sorted(SMALL)


@pytest.fixture(scope="module", autouse=True)
def _shortened_library():
    """A few files of each package: reading all of them takes longer than the tests."""
    from steploop.data.sources import text

    files = text.library_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "library_files", lambda package=None: files(package)[:6])
        yield


def loaded(name):
    """The module of a shipped recipe, a new one every time; making 12,000 synthetic images would take seconds."""
    module = load_recipe_file(find_recipe(name)).module
    if name in {"cifar_amp", "cifar_fast"}:
        module.load_images = partial(module.load_images, train_samples=80, test_samples=20)
    return module


def built(name, **values):
    """The module and the Recipe of a small configuration."""
    module = loaded(name)
    return module, module.build(module.Config(**{**SMALL[name], **values}), CPU)


def some_batches(recipe, count):
    """The first batches of the training."""
    batches = recipe.batches.epoch(0)
    return [next(batches) for _ in range(count)]


# -- all of them --------------------------------------------------------------------------------------------


def test_every_shipped_recipe_is_tested_here():
    assert sorted(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_it_is_how_to_run_it_and_what_was_measured(name):
    path = find_recipe(name)
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    paragraphs = header.split("\n\n")
    assert paragraphs[0].endswith(".")
    assert "\n" not in paragraphs[0]
    assert f"    steploop run recipes/{name}.py\n" in f"{header}\n"
    (measured,) = [p for p in paragraphs if p.startswith("Measured")]
    assert "seed" in measured
    assert "2 CPU cores" in measured
    assert "torch 2." in measured
    assert any(digit in measured for digit in "123456789")


@pytest.mark.parametrize("name", NAMES)
def test_each_resumes_to_the_bit(name):
    """A checkpoint after two steps, loaded into a recipe built with another seed, goes on as if it had not been."""
    _, recipe = built(name)
    _, again = built(name)
    _, other = built(name, seed=7)
    check_resume_is_exact(
        recipe.train_step,
        recipe.state,
        some_batches(recipe, 4),
        2,
        like=other.state,
        resumed_step=again.train_step,
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_state_takes_its_steps(name):
    _, recipe = built(name)
    before = {
        key: {n: p.detach().clone() for n, p in one.params.items()}
        for key, one in members(recipe.state).items()
    }
    after = members(fold(recipe.train_step, some_batches(recipe, 3), recipe.state))
    assert after.keys() == before.keys()
    for key, state in after.items():
        assert (state.attempted_steps, state.step) == (3, 3)
        trained = [n for n, p in state.params.items() if p.requires_grad]
        assert any(not torch.equal(state.params[n], before[key][n]) for n in trained)
        assert math.isfinite(float(state.loss))


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_gives_what_is_monitored_and_changes_nothing(name):
    _, recipe = built(name)
    before = clone(recipe.state)
    metrics = recipe.evaluate(recipe.state)
    require_same(recipe.state, before, "an evaluation changes nothing")
    assert recipe.monitor is None or math.isfinite(metrics[recipe.monitor])
    assert metrics == recipe.evaluate(recipe.state)


PICTURES = {
    "char_lm": {"sample.txt"},
    "gan": {"samples.png"},
    "lr_schedules": {"learning_rates.png", "losses.png"},
    "segmentation": {"predictions.png"},
    "text_classification": {"clipping.png"},
}


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_run_leaves_its_pictures(name, tmp_path, capsys):
    values = {
        key: json.dumps(to_json(value)) if isinstance(value, tuple) else str(value)
        for key, value in SMALL[name].items()
    }
    out = tmp_path / "run"
    summary = train(out, values, recipe=name, limit_steps=2)
    assert summary.steps_attempted == 2
    for file in PICTURES[name]:
        content = (out / file).read_bytes()
        assert len(content) > (500 if file.endswith(".png") else 12)
        assert content.startswith(b"\x89PNG") == file.endswith(".png")
    if name == "char_lm":
        assert (out / "sample.txt").read_text(encoding="utf-8").strip() in capsys.readouterr().out


# -- mnist --------------------------------------------------------------------------------------------------


def test_the_penalties_are_those_of_l1_and_l2_over_the_weight_matrices():
    module, recipe = built("mnist")
    (batch,) = some_batches(recipe, 1)
    model = recipe.state.model.requires_grad_(requires_grad=False)
    plain, _ = module.objective(model, batch)
    loss, _ = module.penalised(model, batch, l1=0.5, l2=0.25)
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("weight")])
    assert float(loss) == pytest.approx(
        float(plain + 0.5 * weights.abs().sum() + 0.25 * (weights**2).sum()), rel=1e-5
    )
    none, _ = module.penalised(model, batch, l1=0.0, l2=0.0)
    assert torch.equal(none, plain)


# -- resnet_transfer ----------------------------------------------------------------------------------------


def test_the_first_phase_trains_the_head_and_the_second_all_layers():
    _, recipe = built("resnet_transfer", frozen_epochs=1, epochs=1)
    before = {n: p.detach().clone() for n, p in recipe.state.params.items()}
    state = fold(recipe.train_step, some_batches(recipe, 1), recipe.state)
    moved = {n for n, p in state.params.items() if not torch.equal(p, before[n])}
    assert moved == {"fc.weight", "fc.bias"}
    values = {n: v.detach().clone() for n, v in {**state.params, **state.buffers}.items()}

    second = recipe.then(state)
    assert second.then is None
    assert all(torch.equal(v, values[n]) for n, v in {**second.state.params, **second.state.buffers}.items())
    state = fold(second.train_step, some_batches(second, 1), second.state)
    assert all(not torch.equal(p, values[n]) for n, p in state.params.items() if n.endswith("conv1.weight"))


def test_both_phases_of_a_run_resume_to_the_bit(tmp_path):
    values = {key: str(value) for key, value in SMALL["resnet_transfer"].items()} | {
        "frozen_epochs": "1",
        "epochs": "1",
    }
    whole = train(tmp_path / "whole", values, recipe="resnet_transfer")
    train(tmp_path / "cut", values, recipe="resnet_transfer", stop_at=8)
    resumed = train(tmp_path / "cut", resume=True)
    assert resumed.metrics == whole.metrics
    ends = [
        sorted(path.rglob("checkpoints*/**/model.safetensors"))
        for path in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert ends[0][-1].read_bytes() == ends[1][-1].read_bytes()


def test_weights_of_a_file_are_taken_and_its_head_is_not(tmp_path):
    module, recipe = built("resnet_transfer")
    values = {n: torch.full_like(v, 0.5).contiguous() for n, v in recipe.state.model.state_dict().items()}
    save_file(values, tmp_path / "weights.safetensors")
    _, other = built("resnet_transfer", weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(other.state.params["conv1.weight"], values["conv1.weight"])
    assert not torch.equal(other.state.params["fc.weight"], values["fc.weight"])
    assert "weights.safetensors" in other.data

    save_file({"conv1.weight": values["conv1.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"is not a ResNet-18: \d+ names differ, for instance bn1"):
        built("resnet_transfer", weights=str(tmp_path / "other.safetensors"))
    assert module.Config().weights == "auto"


def test_a_pickle_is_refused_as_weights(tmp_path):
    _, recipe = built("resnet_transfer")
    torch.save(recipe.state.model.state_dict(), tmp_path / "weights.pth")
    for file in ("weights.pth", "missing.safetensors"):
        with pytest.raises(ConfigError, match="weights must be imagenet, none, auto or a safetensors file"):
            built("resnet_transfer", weights=str(tmp_path / file))


def test_imagenet_weights_that_cannot_be_had_are_an_error_or_said(monkeypatch, tmp_path):
    module = loaded("resnet_transfer")

    def unreachable(url, *, timeout_s):
        raise DataError(f"{url} cannot be reached")

    monkeypatch.setattr(module, "open_url", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = module.Config(**{**SMALL["resnet_transfer"], "weights": "auto"})
    assert (
        "drawn at random (ImageNet's are not on disk and could not be downloaded)"
        in module.build(config, CPU).data
    )
    with pytest.raises(DataError, match=r"could not be downloaded: https://.* Use --set weights=none"):
        module.build(attrs.evolve(config, weights="imagenet"), CPU)


def test_imagenet_weights_on_disk_are_used(monkeypatch, tmp_path):
    module, recipe = built("resnet_transfer")
    values = {n: torch.full_like(v, 0.25) for n, v in recipe.state.model.state_dict().items()}
    monkeypatch.setattr(module, "imagenet_weights", lambda: values)
    config = module.Config(**{**SMALL["resnet_transfer"], "weights": "auto"})
    found = module.build(config, CPU)
    assert torch.equal(found.state.params["layer1.0.conv1.weight"], values["layer1.0.conv1.weight"])
    assert found.data.endswith("Weights: imagenet.")


def test_digits_are_taken_where_there_is_no_cifar10(monkeypatch):
    module = loaded("resnet_transfer")

    def load_images(data, **_):
        raise DataError(f"{data} could not be had")

    monkeypatch.setattr(module, "load_images", load_images)
    assert module.load(module.Config()).name == "digits"
    with pytest.raises(DataError, match="cifar10 could not be had"):
        module.load(module.Config(data="cifar10"))


# -- lr_schedules -------------------------------------------------------------------------------------------


def test_all_schedules_begin_at_one_state_and_go_their_own_rates():
    module, recipe = built("lr_schedules")
    states = members(recipe.state)
    assert list(states) == ["StepLR", "CosineAnnealingLR", "OneCycleLR", "WarmupCosine", "ReduceLROnPlateau"]
    first = states["StepLR"]
    assert all(torch.equal(p, state.params[n]) for state in states.values() for n, p in first.params.items())
    assert states["OneCycleLR"].learning_rate == pytest.approx(0.1 / 25)
    assert states["StepLR"].learning_rate == states["ReduceLROnPlateau"].learning_rate == 0.1
    after = fold(recipe.train_step, some_batches(recipe, 2), recipe.state)
    assert len({state.learning_rate for state in after.values()}) == 4
    assert isinstance(module.Config().learning_rate, float)


def test_the_plateau_is_checked_at_the_end_of_an_epoch():
    _, recipe = built("lr_schedules")
    state = fold(recipe.train_step, some_batches(recipe, len(recipe.batches) - 1), recipe.state)
    assert state["ReduceLROnPlateau"].plateau.best is None
    last = list(recipe.batches.epoch(0, len(recipe.batches) - 1))
    state = fold(recipe.train_step, last, state)
    expected = recipe.evaluate(state)["ReduceLROnPlateau.loss"]
    assert state["ReduceLROnPlateau"].plateau.best == expected
    for _ in range(4):  # checks that are no better, until the patience is over
        worse = attrs.evolve(state["ReduceLROnPlateau"].plateau, best=0.0)
        lead = {n: s.replace(batch=len(recipe.batches) - 1) for n, s in state.items()}
        lead["ReduceLROnPlateau"] = lead["ReduceLROnPlateau"].replace(plateau=worse)
        state = fold(recipe.train_step, last, lead)
    assert state["ReduceLROnPlateau"].learning_rate == pytest.approx(0.03)


# -- text_classification ------------------------------------------------------------------------------------


def test_one_of_the_two_is_clipped():
    _, recipe = built("text_classification", max_norm=0.01)
    states = recipe.state
    for batch in some_batches(recipe, 3):
        states = recipe.train_step(states, batch)
        assert float(states["clipped"].clipped_norm) == pytest.approx(0.01, rel=1e-3)
        assert float(states["unclipped"].clipped_norm) == float(states["unclipped"].grad_norm) > 0.01


def test_no_file_is_in_both_sets(monkeypatch, tmp_path):
    module = loaded("text_classification")
    files = []
    for n in range(10):
        files.append(tmp_path / f"{n}.py")
        files[-1].write_text(f"word{chr(97 + n)} " * 30)
    monkeypatch.setattr(module, "library_files", lambda package: files if package == "asyncio" else files[:1])
    (train_tokens, train_labels), (test_tokens, _) = module.load(module.Config(tokens=10, vocabulary=50))
    assert set(test_tokens.flatten().tolist()) == {0}  # words of files held out are in no vocabulary
    assert 0 not in train_tokens
    assert len(train_tokens) == len(train_labels)


# -- char_lm ------------------------------------------------------------------------------------------------


def test_pieces_hold_every_character_once_and_none_of_the_next_file():
    module = loaded("char_lm")
    ids = {c: n for n, c in enumerate("?abcdefghij")}
    inputs, targets = module.pieces(["abcde", "fg", "x"], ids, 3)
    assert inputs.tolist() == [[1, 2, 3], [4, 0, 0], [6, 0, 0]]
    assert targets.tolist() == [[2, 3, 4], [5, -100, -100], [7, -100, -100]]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    module, recipe = built("char_lm")
    inputs, targets = some_batches(recipe, 1)[0]
    targets = targets.clone()
    targets[:3, 2:] = module.BEYOND  # parts of different weight
    whole = accumulate(recipe.state, [(inputs, targets)], module.objective)
    parts = accumulate(recipe.state, zip(inputs.split(3), targets.split(3), strict=True), module.objective)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    for name, grad in whole.grads.items():
        torch.testing.assert_close(parts.grads[name], grad, rtol=1e-4, atol=1e-6)
    direct = forward_loss(recipe.state, (inputs, targets), module.objective)
    with torch.no_grad():
        expected = F.cross_entropy(
            recipe.state.model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100
        )
    assert float(direct.loss) == pytest.approx(float(expected), rel=1e-5)


def test_weights_decay_on_matrices_only():
    _, recipe = built("char_lm")
    decays = {
        group["weight_decay"]: names
        for group, names in zip(recipe.state.hyper, recipe.state.machine.group_names, strict=True)
    }
    assert set(decays) == {0.1, 0.0}
    assert all(recipe.state.params[n].dim() > 1 for n in decays[0.1])
    assert all(recipe.state.params[n].dim() == 1 for n in decays[0.0])


def test_a_sample_is_the_same_every_time_and_changes_nothing():
    module, recipe = built("char_lm")
    before = clone(recipe.state)
    config = module.Config(**SMALL["char_lm"])
    text = module.sample(recipe.state, [1, 2], config)
    assert text[:2] == [1, 2]
    assert len(text) == 2 + config.sample_characters
    assert text == module.sample(recipe.state, [1, 2], config)
    require_same(recipe.state, before, "sampling changes nothing")


def test_a_text_of_ones_own_is_learned_from(tmp_path):
    (tmp_path / "own.txt").write_text("abcdefghij" * 100, encoding="utf-8")
    _, recipe = built("char_lm", text=str(tmp_path / "own.txt"), context=10)
    assert recipe.data == f"900 characters of {tmp_path / 'own.txt'}, 11 different"
    with pytest.raises(DataError, match=r"missing\.txt cannot be read as text"):
        built("char_lm", text=str(tmp_path / "missing.txt"))
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    with pytest.raises(EmptyDataError, match="too short to train and to test on"):
        built("char_lm", text=str(tmp_path / "short.txt"))


# -- segmentation -------------------------------------------------------------------------------------------


def test_intersection_over_union_is_that_of_the_pixels():
    module = loaded("segmentation")
    predicted, mask = torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[[0, 1], [2, 2]]])
    found = [module.intersection_over_union({"classes": predicted}, (None, mask), index=i) for i in range(3)]
    assert [(int(a), int(b)) for a, b in found] == [(1, 1), (1, 2), (1, 2)]


def test_dice_is_nothing_for_a_perfect_prediction_and_most_for_none_right():
    module = loaded("segmentation")
    mask = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.uint8)
    right = 50.0 * F.one_hot(mask.long(), 2).permute(0, 3, 1, 2).float()
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    losses = {}
    for name, logits in (("right", right), ("wrong", 50.0 - right)):
        both = [
            module.objective(lambda _, logits=logits: logits, (images, mask), dice_weight=w)[0]
            for w in (0.0, 1.0)
        ]
        losses[name] = float(both[1] - both[0])
    assert losses["right"] == pytest.approx(0.0, abs=1e-6)
    assert losses["wrong"] == pytest.approx(1 - 1 / 5, abs=1e-5)  # (2 * 0 + 1) / (2 + 2 + 1)


def test_mean_iou_is_the_mean_over_the_classes():
    _, recipe = built("segmentation")
    metrics = recipe.evaluate(recipe.state)
    classes = [metrics[name] for name in ("background", "disc", "square", "triangle")]
    assert metrics["mean_iou"] == pytest.approx(sum(classes) / 4)


def test_pets_that_cannot_be_had_are_an_error(monkeypatch, tmp_path):
    from torchvision import datasets

    def no_pets(root, **_):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "OxfordIIITPet", no_pets)
    with pytest.raises(DataError, match=r"could not be downloaded \(no network\).*--set data=shapes"):
        built("segmentation", data="pets", root=str(tmp_path))


def test_pets_become_small_images_and_masks_from_zero(monkeypatch, tmp_path):
    from PIL import Image
    from torchvision import datasets

    pairs = [(Image.new("RGB", (30, 20), (n, 0, 0)), Image.new("L", (30, 20), 1 + n % 3)) for n in range(9)]
    monkeypatch.setattr(datasets, "OxfordIIITPet", lambda root, **_: pairs)
    module = loaded("segmentation")
    images, masks = module.pets(module.Config(data="pets", size=16, root=str(tmp_path)), "test", 3)
    assert images.shape == (3, 3, 16, 16)
    assert images[:, 0, 0, 0].tolist() == [0, 4, 8]
    assert masks[:, 0, 0].tolist() == [0, 1, 2]
    assert masks.shape == (3, 16, 16)


# -- gan ----------------------------------------------------------------------------------------------------


def test_each_of_the_two_follows_its_own_objective():
    """With the other one's learning rate at 0, each lowers its own loss on a repeated batch."""
    _, recipe = built("gan")
    (batch,) = some_batches(recipe, 1)
    for name, other in (("generator", "discriminator"), ("discriminator", "generator")):
        states = clone(recipe.state)
        still = {n: p.detach().clone() for n, p in states[other].params.items()}
        frozen = tuple({**group, "lr": 0.0} for group in states[other].hyper)
        states = {**states, other: states[other].replace(hyper=frozen)}
        losses = []
        for _ in range(30):
            states = recipe.train_step(states, batch)
            losses.append(float(states[name].loss))
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
        assert all(torch.equal(p, still[n]) for n, p in states[other].params.items())


def test_the_frechet_distance_is_zero_for_equal_sets_and_the_square_of_a_shift():
    module = loaded("gan")
    a = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    assert module.frechet_distance(a, a, components=6) == pytest.approx(0.0, abs=1e-3)
    axes = torch.linalg.svd(a - a.mean(0), full_matrices=False).Vh
    assert module.frechet_distance(a + 3 * axes[0], a, components=6) == pytest.approx(9.0, abs=1e-2)


# -- line_search --------------------------------------------------------------------------------------------


def test_no_step_raises_the_loss_of_its_batch():
    for rate in (1e-4, 0.3, 100.0):
        module, recipe = built("line_search", learning_rate=rate)
        state = recipe.state
        for batch in some_batches(recipe, 6):
            before = float(forward_loss(state, batch, module.objective).loss)
            state = recipe.train_step(state, batch)
            assert float(forward_loss(state, batch, module.objective).loss) <= before * (1 + 1e-6)


def test_a_rate_too_low_is_raised_and_one_too_high_lowered():
    _, low = built("line_search", learning_rate=1e-6)
    assert fold(low.train_step, some_batches(low, 4), low.state).learning_rate == pytest.approx(1.6e-5)
    _, high = built("line_search", learning_rate=1000.0)
    before = {n: p.detach().clone() for n, p in high.state.params.items()}
    state = fold(high.train_step, some_batches(high, 3), high.state)
    assert state.learning_rate == pytest.approx(125.0)
    assert all(torch.equal(p, before[n]) for n, p in state.params.items())


# -- cifar_fast ---------------------------------------------------------------------------------------------


def test_cifar_fast_whitens_patches():
    """The covariance of what the first convolution gives of 2x2 patches is the identity, up to its small constant."""
    module = loaded("cifar_fast")
    images = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images.cumsum(3) + images.flip(1)  # neighbours and channels that depend on each other
    filters = module.whitening(images)
    assert filters.shape == (24, 3, 2, 2)
    assert torch.equal(filters[:12], -filters[12:])
    given = F.conv2d(images, filters[:12]).transpose(0, 1).reshape(12, -1)
    torch.testing.assert_close(torch.cov(given), torch.eye(12), atol=0.02, rtol=0.0)


def test_cifar_fast_mirrors_every_image_in_one_of_two_epochs():
    module, recipe = built("cifar_fast", padding=0)
    seen = []
    recipe.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    images = torch.rand(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    coins = torch.arange(16) % 2 == 0
    state = recipe.state
    for epoch in (0, 1, 2):
        state = recipe.train_step(attrs.evolve(state, epoch=epoch), (images, torch.arange(16) % 10, coins))
    assert torch.equal(seen[0], module.mirrored(images, coins))
    assert torch.equal(seen[1], module.mirrored(images, ~coins))
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(seen[0][0], images[0].flip(2))


def test_the_biases_of_cifar_fast_learn_faster_and_decay_alike():
    _, recipe = built("cifar_fast", bias_factor=8.0)
    (batch,) = some_batches(recipe, 1)
    slow, quick = recipe.train_step(recipe.state, batch).hyper
    assert quick["lr"] == pytest.approx(8 * slow["lr"])
    assert quick["lr"] * quick["weight_decay"] == pytest.approx(slow["lr"] * slow["weight_decay"])
    names = recipe.state.machine.group_names
    assert len(names[1]) == 4  # two norms in each of two groups
    assert all(name.endswith(".bias") for name in names[1])
    assert not any(name.endswith(".bias") and "0.bias" not in name for name in names[0])
