"""Length predictors against plain Python; and who looks at the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.scheduler.layerkv.lengths import CAPACITY, LENGTHS, Bucket, Mean, Oracle, Quantile

NONE = np.empty(0, np.int32)


def ask(predictor, produced, truth=None, number=None):
    """What a predictor says, as a list."""
    produced = np.array(produced, np.int32)
    truth = np.ones_like(produced) if truth is None else np.array(truth, np.int32)
    number = np.arange(len(produced)) if number is None else np.array(number)
    found = predictor.remaining(produced, truth, number)
    assert found.shape == produced.shape and found.dtype == np.float64 and (found >= 1).all()
    return found.tolist()


def left_by_hand(finished, produced, q, min_samples):
    """Of the finished outputs that were longer, the quantile of what was left."""
    left = [length - produced for length in finished[-CAPACITY:] if length > produced]
    if len(finished) < min_samples or not left:
        return 1
    return np.quantile(left, q, method="lower")


lengths = st.lists(st.integers(1, 60), max_size=40)


@given(lengths, st.lists(st.integers(0, 70), max_size=6), st.sampled_from([0, 0.1, 0.5, 0.9, 1]), st.integers(1, 9))
def test_quantile_is_survival(finished, produced, q, min_samples):
    """Asked after every output that finishes."""
    predictor = Quantile(q, min_samples)
    for i, length in enumerate(finished):
        predictor.learn(length)
        expected = [left_by_hand(finished[: i + 1], p, q, min_samples) for p in produced]
        assert ask(predictor, produced) == expected


def test_quantile_by_hand():
    """Nothing is promised before eight have finished, nor beyond the longest. The more a sequence has produced, the
    longer those are that it is compared with."""
    predictor = Quantile()
    for length in (10, 20, 30, 40, 50, 60, 70):
        predictor.learn(length)
    assert ask(predictor, [0, 35]) == [1, 1]
    predictor.learn(80)
    assert ask(predictor, [0, 35, 40, 79, 80, 500]) == [40, 25, 20, 1, 1, 1]


def test_quantile_forgets():
    """512 outputs later the old ones do not count."""
    predictor = Quantile()
    for _ in range(10):
        predictor.learn(1000)
    for _ in range(CAPACITY):
        predictor.learn(10)
    assert ask(predictor, [0, 20]) == [10, 1]


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000)), max_size=8))
def test_a_bucket_ends_at_a_power_of_two(sequences):
    """Of the total; what is produced is taken off."""
    expected = [2 ** math.ceil(math.log2(p + t)) - p for p, t in sequences]
    assert ask(Bucket(), [p for p, _ in sequences], [t for _, t in sequences]) == [max(1, n) for n in expected]


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 0.9])
def test_a_classifier_errs_as_often_as_it_should(accuracy):
    """20,000 requests of 100 tokens: right is 128, wrong 64 or 256, each half of the time."""
    number = np.arange(20_000)
    said = np.array(ask(Bucket(accuracy, seed=3), np.zeros(20_000), np.full(20_000, 100), number))
    assert set(said.tolist()) <= {64.0, 128.0, 256.0}
    wrong = (1 - accuracy) / 2
    for bound, chance in ((64, wrong), (128, accuracy), (256, wrong)):
        assert (said == bound).mean() == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 20_000) ** 0.5)


def test_a_classification_lasts_as_long_as_its_request():
    """The same bucket at every token, in any company; other seeds err elsewhere; the lowest bucket errs upwards."""
    predictor, number = Bucket(0.5, seed=1), np.arange(40)
    first = np.array(ask(predictor, np.zeros(40), np.full(40, 100), number))
    later = np.array(ask(predictor, np.full(40, 30), np.full(40, 70), number))
    assert (first - 30 == later).all() and len(set(first.tolist())) == 3
    assert ask(predictor, np.zeros(3), np.full(3, 100), [7, 39, 0]) == first[[7, 39, 0]].tolist()
    assert ask(Bucket(0.5, seed=2), np.zeros(40), np.full(40, 100), number) != first.tolist()
    assert set(ask(Bucket(0.0), np.zeros(40), np.ones(40), number)) == {2.0}
    outgrown = np.array(ask(predictor, np.full(40, 90), np.full(40, 10), number))
    assert (outgrown == np.maximum(first - 90, 1)).all() and 1 in outgrown


def test_mean_and_oracle():
    """By hand."""
    mean = Mean()
    assert ask(mean, [0, 5]) == [1, 1]
    for length in (10, 20, 60):
        mean.learn(length)
    assert ask(mean, [0, 12, 29, 30, 31]) == [30, 18, 1, 1, 1]
    assert ask(Oracle(), [9, 9], [4, 1]) == [4, 1]


@settings(max_examples=20)
@given(lengths, st.lists(st.tuples(st.integers(0, 70), st.integers(1, 50), st.integers(1, 50)), max_size=5))
def test_only_two_look_at_the_truth(finished, sequences):
    """The others say the same whatever it is."""
    produced, one, other = [[s[i] for s in sequences] for i in range(3)]
    for name in LENGTHS.keys() - {"oracle", "bucket"}:
        predictor = LENGTHS[name]()
        for length in finished:
            predictor.learn(length)
        assert ask(predictor, produced, one) == ask(predictor, produced, other)


@pytest.mark.parametrize("name", LENGTHS)
def test_nobody_decodes(name):
    """Empty in, empty out, before and after learning."""
    predictor = LENGTHS[name]()
    assert ask(predictor, NONE) == []
    for _ in range(8):
        predictor.learn(5)
    assert ask(predictor, NONE) == []


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Quantile(1.5), "quantile needs 0 <= q <= 1 and min_samples >= 1, got q=1.5 and min_samples=8"),
        (lambda: Quantile(min_samples=0), "got q=0.5 and min_samples=0"),
        (lambda: Bucket(-0.1), "bucket needs 0 <= accuracy <= 1 and seed >= 0, got accuracy=-0.1 and seed=0"),
        (lambda: Bucket(seed=-1), "got accuracy=1.0 and seed=-1"),
    ],
)
def test_bad_settings_are_named(make, message):
    """One line each."""
    with pytest.raises(ConfigError, match=message):
        make()
