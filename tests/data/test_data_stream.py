"""Streams: what cannot be resumed is refused, what was promised is held to."""

import itertools

import pytest
import torch

from steploop.data.stream import Stream
from steploop.errors import ConfigError, DataError, EmptyDataError


def counting(epoch, start):
    return (torch.tensor([epoch, i]) for i in itertools.count(start))


def test_an_infinite_stream_has_epochs_of_the_length_given():
    stream = Stream(counting, length=3, restorable=True)
    assert len(stream) == 3
    assert [b.tolist() for b in stream.epoch(2)] == [[2, 0], [2, 1], [2, 2]]
    rest = stream.epoch(2, 1)
    assert [b.tolist() for b in rest] == [[2, 1], [2, 2]]
    assert rest.position == 3
    assert list(stream.epoch(2, 3)) == []
    assert len(list(stream)) == 3


def test_resuming_within_an_epoch_is_refused_unless_the_stream_can():
    with pytest.raises(DataError, match=r"cannot continue at batch 1 of epoch 0: .* restorable=True"):
        Stream(counting, length=3).epoch(0, 1)


def test_a_stream_that_ends_early_breaks_its_promise():
    batches = Stream(lambda _epoch, _start: [1, 2], length=3).epoch(4)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(DataError, match="ended after 2 batches of epoch 4, and length=3 was promised"):
        next(batches)


def test_a_spent_iterator_is_an_empty_epoch():
    once = iter([1, 2])
    stream = Stream(lambda _epoch, _start: once)
    assert list(stream.epoch(0)) == [1, 2]
    with pytest.raises(EmptyDataError, match=r"no batch in epoch 1; if it is a generator .* it is spent"):
        list(stream.epoch(1))


def test_a_stream_that_raises_names_the_batch():
    def raising(_epoch, _start):
        yield 1
        raise KeyError("gone")

    batches = Stream(raising).epoch(0)
    next(batches)
    with pytest.raises(DataError, match="the stream raised at batch 1 of epoch 0: KeyError: 'gone'"):
        next(batches)


def test_a_poll_is_asked_before_every_batch():
    asked = []
    list(Stream(counting, length=3).epoch(0, poll=lambda: asked.append(1)))
    assert len(asked) == 3


def test_what_is_not_a_stream_is_refused():
    with pytest.raises(
        ConfigError, match=r"batches must be a function \(epoch, start\) .* got list; for .* Stream.lambda"
    ):
        Stream([1, 2])
    with pytest.raises(ConfigError, match="length must be an integer >= 1, got 0"):
        Stream(counting, length=0)
    with pytest.raises(DataError, match="no known length"):
        len(Stream(counting))


def test_batches_go_to_the_device():
    assert next(Stream(counting, length=1, device="cpu").epoch(0)).device == torch.device("cpu")
