"""What counts for how much: weights of micro-batches, samples that are counted, accuracy and metrics that never broadcast."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from steploop import (
    Optimizer,
    TrainState,
    accumulate,
    accuracy,
    backward_scaled,
    evaluate,
    forward_loss,
    unscale_and_clip,
)
from steploop.core.steps.accumulation import _unit
from steploop.errors import EmptyDataError, ObjectiveError, SpentStateError

SGD = Optimizer(torch.optim.SGD, lr=0.1)
INF = float("inf")


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes))


def create(model=None, **options):
    return TrainState.create(model or network(), SGD, **options)


def batch(size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def objective(model, data):
    logits = model(data[0])
    return F.cross_entropy(logits, data[1]), {"logits": logits}


# -- weights ----------------------------------------------------------------------------------------------------------


def weighing(weights):
    """The objective's own weight of each part, in turn."""
    given = iter(weights)

    def weighed(model, data):
        return (*objective(model, data), next(given))

    return weighed


def by_hand(parts, weights):
    model = network()
    losses = [objective(model, part)[0] for part in parts]
    whole = sum(float(w) for w in weights)
    loss = sum(float(w) / whole * one for w, one in zip(weights, losses, strict=True) if float(w))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


PARTS = [batch(3, 1), batch(5, 2), batch(2, 3)]


@pytest.mark.parametrize(
    "weights",
    [
        (1, 2, 3), (0.5, 0.25, 0.25), (1e-6, 2e-6, 3e-6), (2, 0, 1), (0, 2, 1), (0.0, 0.0, 3.0), (7, 7, 7), (1e9, 1, 0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "kind",
    [float, torch.tensor, lambda w: torch.tensor(w, dtype=torch.float64)],
    ids=["numbers", "tensors", "doubles"],
)
def test_parts_count_by_their_weights_whatever_they_are_given_as(weights, kind):
    given = [kind(w) for w in weights]
    state = accumulate(create(), PARTS, weighing(given))
    loss, grads = by_hand(PARTS, weights)
    torch.testing.assert_close(state.loss, loss)
    for name, grad in state.grads.items():
        torch.testing.assert_close(grad, grads[name])


def test_weights_are_counted_in_a_unit_that_a_float16_gradient_has_room_for():
    """About their sum: with 5,000 tokens a part, the scaled gradient would overflow if they were counted in tokens."""
    assert _unit(4.0, 3) == 12.0
    assert _unit(torch.tensor(4.0), 3) == 12.0
    assert _unit(torch.tensor(0.5), 4) == 2.0
    assert _unit(torch.tensor(0.0), 3) == 1.0
    for tokens in (5000, torch.tensor(5000)):
        state = accumulate(create(precision="fp16"), PARTS, weighing([0, tokens, tokens]))
        assert unscale_and_clip(state, max_norm=INF).finite is True
    plain = accumulate(create(), PARTS, weighing([1.0, 2.0, 3.0]))
    for factor in (2.0**-20, 2.0**20):
        other = accumulate(create(), PARTS, weighing([factor * w for w in (1.0, 2.0, 3.0)]))
        assert all(torch.equal(g, other.grads[n]) for n, g in plain.grads.items())


def masked(model, data):
    """The mean over what the mask leaves: 0 / 0 where it leaves nothing, whose gradient is nan."""
    inputs, labels, mask = data
    losses = F.cross_entropy(model(inputs), labels, reduction="none")
    return (losses * mask).sum() / mask.sum(), None, mask.sum()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_part_of_weight_0_counts_for_nothing_though_its_loss_is_nan(order, precision):
    parts = [(*batch(4), torch.ones(4)), (*batch(4, 2), torch.zeros(4))]
    state = accumulate(create(precision=precision), [parts[i] for i in order], masked)
    whole = forward_loss(create(precision=precision), parts[0], masked)
    torch.testing.assert_close(state.loss, whole.loss)
    state, whole = (
        unscale_and_clip(state, max_norm=INF),
        unscale_and_clip(backward_scaled(whole), max_norm=INF),
    )
    assert state.finite is True
    for name, grad in state.grads.items():
        torch.testing.assert_close(grad, whole.grads[name])


def test_an_evaluation_weighs_in_the_same_way():
    parts = [
        (*batch(4), torch.ones(4)),
        (*batch(4, 2), torch.zeros(4)),
        (*batch(2, 3), torch.tensor([1.0, 0.0])),
    ]
    found = evaluate(create(), parts, masked)["loss"]
    model = network().eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y, reduction="none") * m for x, y, m in parts]
    assert found == pytest.approx(float(torch.cat(losses).sum() / 5), rel=1e-6)
    assert evaluate(create(), [parts[1]], masked) == {"loss": None}


@pytest.mark.parametrize("weight", [-1, -1e-9, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["a number", "a tensor"])
def test_a_weight_that_is_none_is_refused_in_training_and_in_evaluation(weight, kind):
    says = f"a weight must be a finite number >= 0, but the objective gave {float(kind(weight))!r}."
    with pytest.raises(ObjectiveError) as caught:
        accumulate(create(), PARTS, weighing([1.0, kind(weight), 1.0]))
    assert str(caught.value) == f"accumulate: {says}"
    with pytest.raises(ObjectiveError) as caught:
        evaluate(create(), PARTS, weighing([1.0, kind(weight), 1.0]))
    assert str(caught.value) == f"evaluate: {says}"


NOTHING = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("weights", [(0, 0, 0), (0.0, torch.tensor(0.0), 0)])
def test_weights_that_sum_to_nothing_are_refused(weights):
    for call in (
        lambda: accumulate(create(), PARTS, weighing(weights)),
        lambda: accumulate(create(), [NOTHING], objective),
    ):
        with pytest.raises(EmptyDataError) as caught:
            call()
        assert str(caught.value) == (
            "accumulate: the weights of the micro-batches sum to 0; there is nothing to average over."
        )
    with pytest.raises(EmptyDataError) as caught:
        accumulate(create(), [], objective)
    assert str(caught.value) == (
        "accumulate: expected at least one micro-batch, but got none. Look at how the batch is split."
    )


def test_a_part_without_samples_counts_for_nothing():
    with_it = accumulate(create(), [PARTS[0], NOTHING, PARTS[1]], objective)
    without = accumulate(create(), PARTS[:2], objective)
    assert with_it.loss == without.loss
    assert all(torch.equal(grad, without.grads[name]) for name, grad in with_it.grads.items())


def test_micro_batches_give_their_outputs_in_a_list_and_leave_what_the_host_knows():
    state = create()
    state = state.replace(flight=state.flight.replace(known=(3, 5)))
    after = accumulate(state, PARTS, objective)
    model = network()
    assert [out["logits"].shape for out in after.outputs] == [(3, 3), (5, 3), (2, 3)]
    for out, part in zip(after.outputs, PARTS, strict=True):
        assert torch.equal(out["logits"], model(part[0]).detach())
    assert after.flight.known == (3, 5)


class Clamping(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_state_whose_weights_micro_batches_have_moved_says_by_what():
    state = create(Clamping(4, 3))
    accumulate(state, PARTS, objective)
    with pytest.raises(
        SpentStateError, match=r"this state is spent: accumulate at attempted step 0 updated its"
    ):
        _ = state.params


def test_a_weight_with_an_axis_or_for_some_parts_only_is_refused():
    with pytest.raises(ObjectiveError) as caught:
        accumulate(create(), PARTS, weighing([torch.ones(3)] * 3))
    assert (
        str(caught.value)
        == "accumulate: a weight must be a number or a tensor of shape (), but is one of (3,)."
    )
    for weights in ([1.0, None, 1.0], [None, 1.0, None]):
        with pytest.raises(ObjectiveError) as caught:
            accumulate(create(), PARTS, weighing(weights))
        assert str(caught.value) == (
            "accumulate: the objective gave a weight for some micro-batches and none for others."
        )


# -- samples ------------------------------------------------------------------------------------------------------------

LENGTHS = [torch.ones(3, 4), torch.ones(2, 4)]
CANNOT_COUNT = {
    "images of their own sizes": ([torch.ones(4, 4), torch.ones(5, 4), torch.ones(6, 4)], torch.zeros(3)),
    "a list of things": [{"x": torch.ones(4)}, {"x": torch.ones(4)}],
    "time first": (torch.ones(7, 3, 4), torch.zeros(3)),
    "a graph": {"nodes": torch.ones(5, 4), "edges": torch.zeros(2, 8, dtype=torch.int64)},
    "packed": pack_sequence(LENGTHS),
    "numbers": [1.0, 2.0],
    "a scalar": torch.zeros(()),
    "None": None,
}


@pytest.mark.parametrize("kind", CANNOT_COUNT)
def test_where_samples_can_only_be_guessed_a_weight_is_asked_for(kind):
    data = CANNOT_COUNT[kind]
    inputs = torch.ones(2, 4)
    says = (
        "cannot count the samples of this batch: it has no tensor with an axis, its tensors differ in their first axis, or it "
        "is a list of things. Return (loss, outputs, weight) from the objective, with the number of samples as weight."
    )
    for name, call in (
        ("accumulate", lambda f: accumulate(create(), [data, data], f)),
        ("evaluate", lambda f: evaluate(create(), [data], f)),
    ):
        with pytest.raises(ObjectiveError) as caught:
            call(lambda model, _: model(inputs).square().mean())
        assert str(caught.value) == f"{name}: {says}"
        call(lambda model, _: (model(inputs).square().mean(), None, 2))


# -- accuracy -----------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
LABELS = torch.tensor([1, 1, 1])


@pytest.mark.parametrize(
    ("outputs", "data", "keys"),
    [
        (LOGITS, (None, LABELS), {}),
        ({"logits": LOGITS}, [None, LABELS], {}),
        ({"logits": LOGITS}, {"labels": LABELS}, {}),
        ({"logits": LOGITS}, {"y": LABELS}, {"labels": "y"}),
        ({"scores": LOGITS}, {"y": LABELS}, {"labels": "y", "logits": "scores"}),
        (LOGITS, (None, None, LABELS), {"labels": 2}),
        (LOGITS, {0: LABELS}, {"labels": 0}),
        (LOGITS.reshape(1, 3, 2), (None, LABELS.reshape(1, 3)), {}),
        (LOGITS, (None, LABELS.to(torch.uint8)), {}),
    ],
)
def test_accuracy_counts_in_any_batch_that_says_where_the_labels_are(outputs, data, keys):
    right, weight = functools.partial(accuracy, **keys)(outputs, data)
    assert (int(right), weight) == (2, 3)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(8, 3), torch.zeros(8, 1, dtype=torch.int64)),
        (torch.zeros(8, 1), torch.zeros(8, dtype=torch.int64)),
        (torch.zeros(8), torch.zeros(8, dtype=torch.int64)),
        (torch.zeros(8, 3), torch.zeros(7, dtype=torch.int64)),
        (torch.zeros(8, 3), torch.zeros((), dtype=torch.int64)),
        (torch.zeros(8, 3), torch.zeros(8)),
        (torch.zeros(8, 3), torch.zeros(8, 3)),
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 5, 5, dtype=torch.int64)),
        (torch.zeros(()), torch.zeros((), dtype=torch.int64)),
    ],
    ids=lambda t: f"{tuple(t.shape)} {t.dtype}",
)
def test_accuracy_refuses_shapes_that_would_broadcast(logits, labels):
    with pytest.raises(ObjectiveError) as caught:
        accuracy(logits, (None, labels))
    assert str(caught.value) == (
        "accuracy: expected integer labels of shape (B,) and logits of shape (B, C) with C >= 2, but the labels are "
        f"{tuple(labels.shape)} {labels.dtype} and the logits {tuple(logits.shape)}. Reshape them; for one logit a sample write "
        "a metric of your own, as ((logits > 0) == labels).sum()."
    )


@pytest.mark.parametrize(
    ("outputs", "data", "says"),
    [
        ({"scores": LOGITS}, (None, LABELS), "The outputs have no 'logits'. It has: scores."),
        (LOGITS, {"y": LABELS, "x": 1}, "The batch have no 'labels'. It has: y, x."),
        (LOGITS, (None,), "The batch have no 1."),
        (LOGITS, LABELS[0], "The batch have no 1."),
        (None, (None, LABELS), "'logits' of the outputs is a NoneType, but a tensor is needed."),
        (LOGITS, (None, [1, 1, 1]), "1 of the batch is a list, but a tensor is needed."),
    ],
)
def test_accuracy_says_what_it_did_not_find(outputs, data, says):
    with pytest.raises(ObjectiveError) as caught:
        accuracy(outputs, data)
    assert str(caught.value).startswith(says)


# -- metrics ------------------------------------------------------------------------------------------------------------


def right_of_each_class(outputs, data):
    """Recall: the samples of each class that were found, and how many there are."""
    found, labels = outputs["logits"].argmax(1), data[1]
    one_hot = F.one_hot(labels, 3)
    return (one_hot * (found == labels)[:, None]).sum(0), one_hot.sum(0)


def test_a_metric_may_have_a_value_for_each_class():
    data = [batch(size, seed) for seed, size in enumerate((5, 2, 8), start=1)]
    found = evaluate(create(), data, objective, {"recall": right_of_each_class})
    model = network().eval()
    inputs, labels = (torch.cat([b[i] for b in data]) for i in (0, 1))
    with torch.no_grad():
        predicted = model(inputs).argmax(1)
    for index in range(3):
        members = labels == index
        expected = float((predicted[members] == index).double().mean()) if members.any() else None
        assert found[f"recall.{index}"] == (None if expected is None else pytest.approx(expected))
    assert list(found) == ["loss", "recall.0", "recall.1", "recall.2"]


def test_a_class_without_samples_has_no_value_and_one_weight_may_serve_all_classes():
    none = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))]
    found = evaluate(create(), none, objective, {"recall": right_of_each_class})
    assert (found["recall.1"], found["recall.2"]) == (None, None)
    shares = evaluate(create(), none, objective, {"p": lambda o, b: (o["logits"].softmax(1).sum(0), 2)})
    assert sum(shares[f"p.{i}"] for i in range(3)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("sums", "says"),
    [
        ([(torch.ones(2, 2), 1)], "gave a sum of shape (2, 2) with a weight of shape ()"),
        ([(torch.ones(3), torch.ones(2))], "gave a sum of shape (3,) with a weight of shape (2,)"),
        ([(1.0, torch.ones(2))], "gave a sum of shape () with a weight of shape (2,)"),
        (
            [(torch.ones(3), 1), (torch.ones(2), 1)],
            "gave a sum of shape (2,) with a weight of shape () after sums of shape (3,)",
        ),
        (
            [(torch.ones(3), 1), (1.0, 1)],
            "gave a sum of shape () with a weight of shape () after sums of shape (3,)",
        ),
    ],
    ids=range(5),
)
def test_sums_that_would_broadcast_are_refused(sums, says):
    given = iter(sums)
    with pytest.raises(ObjectiveError) as caught:
        evaluate(create(), [batch(), batch()], objective, {"m": lambda outputs, data: next(given)})
    assert str(caught.value) == (
        f"evaluate: the metric 'm' {says}. Give two numbers, or two tensors with an entry for each class."
    )


@pytest.mark.parametrize(
    "weight", [-1.0, math.nan, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, math.inf, 1.0])]
)
def test_a_weight_of_a_metric_that_is_none_is_refused(weight):
    def metric(outputs, data):
        return (torch.ones(3), weight) if isinstance(weight, torch.Tensor) else (1.0, weight)

    with pytest.raises(ObjectiveError) as caught:
        evaluate(create(), [batch()], objective, {"m": metric})
    assert (
        str(caught.value)
        == "evaluate: the metric 'm' gave a weight that is no finite number >= 0 for some batch."
    )


def test_collections_and_per_class_metrics_of_torchmetrics_give_a_value_each():
    torchmetrics = pytest.importorskip("torchmetrics")
    classification = torchmetrics.classification
    data = [batch(5, 1), batch(3, 2)]
    metrics = {
        "f1": classification.MulticlassF1Score(num_classes=3, average=None),
        "all": torchmetrics.MetricCollection(
            {
                "top1": classification.MulticlassAccuracy(num_classes=3, average="micro"),
                "recall": classification.MulticlassRecall(num_classes=3, average=None),
            }
        ),
        "ours": accuracy,
    }
    found = evaluate(create(), data, objective, metrics)
    model = network().eval()
    logits, labels = model(torch.cat([b[0] for b in data])).detach(), torch.cat([b[1] for b in data])
    per_class = classification.MulticlassF1Score(num_classes=3, average=None)(logits, labels).tolist()
    assert [found[f"f1.{i}"] for i in range(3)] == pytest.approx(per_class)
    recall = classification.MulticlassRecall(num_classes=3, average=None)(logits, labels).tolist()
    assert [found[f"all.recall.{i}"] for i in range(3)] == pytest.approx(recall)
    assert found["all.top1"] == pytest.approx(found["ours"])
    again = evaluate(create(), data, objective, metrics)
    assert again == found
    assert evaluate(create(), [], objective, metrics) == {"loss": None, "ours": None, "f1": None, "all": None}


# -- objectives that differentiate -------------------------------------------------------------------------------------


def with_forces(model, data):
    """The energy's gradient by the inputs is compared with what it should be, as in force fields."""
    inputs = data[0].clone().requires_grad_(requires_grad=True)
    energy = model(inputs).square().sum()
    (forces,) = torch.autograd.grad(energy, inputs, create_graph=True)
    return (forces - 1.0).square().mean(), {"forces": forces}


def adapted(model, data):
    """A step of gradient descent on half of the data, judged on the other half, as in MAML."""
    inputs, labels = data
    params = dict(model.named_parameters())
    inner = F.cross_entropy(torch.func.functional_call(model, params, inputs[:3]), labels[:3])
    grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    return (
        F.cross_entropy(torch.func.functional_call(model, fast, inputs[3:]), labels[3:]),
        None,
        len(labels) - 3,
    )


@pytest.mark.parametrize("differentiates", [with_forces, adapted])
def test_an_objective_that_differentiates_is_trained_and_evaluated(differentiates):
    state = create()
    model = network()
    loss = differentiates(model, batch())[0]
    loss.backward()
    trained = backward_scaled(forward_loss(state, batch(), differentiates))
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained.grads[name], p.grad)
    found = evaluate(state, [batch(), batch(8, 4)], differentiates)
    weights = [
        int(differentiates(model, b)[2]) if differentiates is adapted else len(b[0])
        for b in (batch(), batch(8, 4))
    ]
    values = [differentiates(model.eval(), b)[0].item() for b in (batch(), batch(8, 4))]
    assert found["loss"] == pytest.approx(
        sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights), rel=1e-5
    )
    assert all(p.grad is None for p in state.params.values())


def test_an_evaluation_that_differentiates_gives_its_outputs_without_a_graph_and_changes_nothing():
    state = create()
    seen = []

    def look(outputs, data):
        seen.append(outputs["forces"].requires_grad)
        return outputs["forces"].sum(), len(data[0])

    plain = {n: p.detach().clone() for n, p in state.params.items()}
    evaluate(state, [batch(), batch()], with_forces, {"look": look})
    assert seen == [False, False]
    assert all(torch.equal(p, plain[n]) for n, p in state.params.items())


def test_another_error_of_an_objective_comes_out_as_it_is_from_an_evaluation():
    def broken(model, data):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        evaluate(create(), [batch()], broken)
