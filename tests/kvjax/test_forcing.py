"""Scores of text with a cache against one pass without, and how distributions are compared."""

import functools

import numpy as np
import pytest
from kvjax.perplexity import Scores, compare, score
from scipy.special import log_softmax, rel_entr

from kvjax.empty import empty_cache
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from tests.tiny import tiny_model, whole_pass

model = functools.partial(tiny_model, layers=1)
PREFIX = 20
ROWS = np.random.default_rng(0).integers(0, 64, (2, 170)).astype(np.int32)  # 149 decoded: a chunk and a part of one
EXACT = "+exact(sinks=2,window=8,round=8)"


@pytest.fixture(scope="module")
def scores():
    """Of the same rows by policy."""
    policies = ("full", f"int8{EXACT}", f"turboquant(bits=1){EXACT}")
    found = [score(model(), parse_policy(policy), ROWS, prefix=PREFIX) for policy in policies]
    return dict(zip(("full", "int8", "one bit"), found, strict=True))


def test_the_full_cache_gives_what_one_pass_gives_for_every_scored_token(scores):
    full = scores["full"]
    assert full.log_probabilities.shape == (2, 150, 64)
    np.testing.assert_array_equal(full.targets, ROWS[:, PREFIX:])
    logits = np.stack([whole_pass(model(), row) for row in ROWS])
    expected = log_softmax(logits.astype(np.float64), axis=-1)[:, PREFIX - 1 : -1]
    np.testing.assert_allclose(full.log_probabilities, expected, rtol=0, atol=1e-5 * np.abs(logits).max())
    taken = np.take_along_axis(expected, ROWS[:, PREFIX:, None], axis=-1)
    assert full.perplexity == pytest.approx(np.exp(-taken.mean()), rel=1e-4)


def test_distributions_do_not_differ_from_themselves(scores):
    found = compare(scores["full"], scores["full"])
    assert found.pop("perplexity") == scores["full"].perplexity
    assert found == {"perplexity_change": 0.0, "kl_mean": 0.0, "kl_p999": 0.0, "top1_agreement": 1.0}


def test_divergence_grows_as_bits_shrink(scores):
    """Most tokens are in the body here; the first scored one comes from the prefill, which is uncompressed."""
    eight, one = (compare(scores["full"], scores[name]) for name in ("int8", "one bit"))
    assert 1e-7 < eight["kl_mean"] < 1e-2
    assert one["kl_mean"] > 20 * eight["kl_mean"]
    assert one["top1_agreement"] < eight["top1_agreement"] <= 1.0
    assert abs(eight["perplexity_change"]) < 0.02
    assert int(scores["int8"].cache.layers[0].body.positions.max()) > 150
    first = [scores[name].log_probabilities[:, 0] for name in ("full", "one bit")]
    np.testing.assert_allclose(*first, rtol=0, atol=1e-5)


def test_rows_may_be_shorter_than_a_chunk():
    """The same numbers as for the start of longer rows."""
    num_tokens = 60
    found = score(model(), Policy(), ROWS[:, :num_tokens], prefix=PREFIX)
    expected = np.stack([whole_pass(model(), row) for row in ROWS[:, :num_tokens]])[:, PREFIX - 1 : -1]
    expected = log_softmax(expected, axis=-1)
    assert found.log_probabilities.shape == expected.shape == (2, num_tokens - PREFIX, 64)
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=0, atol=1e-4)


def test_the_numbers_of_a_comparison_against_scipy():
    generator = np.random.default_rng(1)
    cache = empty_cache(model().config.cache_shape("float32"), policy=Policy(), batch=1, max_tokens=4)
    targets = generator.integers(0, 10, (3, 500)).astype(np.int32)
    logs = log_softmax(generator.normal(size=(3, 500, 10)) * 2, axis=-1)
    moved = log_softmax(logs + generator.normal(size=logs.shape) * 0.1, axis=-1)
    base, other = (Scores(array.astype(np.float32), targets, cache) for array in (logs, moved))
    divergence = rel_entr(np.exp(logs), np.exp(moved)).sum(axis=-1)
    found = compare(base, other)
    assert found["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-4)
    assert found["kl_p999"] == pytest.approx(np.quantile(divergence, 0.999), rel=1e-4)
    assert found["top1_agreement"] == np.mean(logs.argmax(axis=-1) == moved.argmax(axis=-1))
    ours, theirs = (np.exp(-np.take_along_axis(one, targets[..., None], axis=-1).mean()) for one in (moved, logs))
    assert found["perplexity"] == pytest.approx(ours, rel=1e-5)
    assert found["perplexity_change"] == pytest.approx(ours / theirs - 1, abs=1e-6)
