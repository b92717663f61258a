"""How distributions are compared, and two caches side by side."""

import functools

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from kvjax.empty import empty_cache
from kvjax.forcing import compare, divergence, divergence_along, num_common
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.walk import Followed, follow
from tests.tiny import tiny_model

model = functools.partial(tiny_model, layers=1)
PROMPT, ROOM = 20, 192
ROWS = np.random.default_rng(0).integers(0, 64, (2, 170)).tolist()  # 149 decoded: a chunk and a part of one
EXACT = "+exact(sinks=2,window=8,round=8)"
POLICIES = {"full": "full", "one bit": f"turboquant(bits=1){EXACT}"}


@pytest.fixture(scope="module")
def followed():
    """The same rows by policy."""
    given = {"answers": [row[PROMPT:] for row in ROWS], "max_tokens": ROOM}
    prompts = [row[:PROMPT] for row in ROWS]
    return {name: follow(model(), parse_policy(policy), prompts, **given) for name, policy in POLICIES.items()}


def random_pair(*, counted=None):
    """Two sets of distributions over 10 tokens, 3 rows of 500, float64, and what `Followed` makes of them."""
    generator = np.random.default_rng(1)
    cache = empty_cache(model().cache_shape, policy=Policy(), batch=1, max_tokens=4)
    targets = generator.integers(0, 10, (3, 500)).astype(np.int32)
    logs = log_softmax(generator.normal(size=(3, 500, 10)) * 2, axis=-1)
    moved = log_softmax(logs + generator.normal(size=logs.shape) * 0.1, axis=-1)
    counted = np.ones((3, 500), bool) if counted is None else counted
    made = [Followed(array.astype(np.float32), targets, counted, cache) for array in (logs, moved)]
    return logs, moved, *made


def test_the_numbers_of_a_comparison_against_scipy():
    logs, moved, base, other = random_pair()
    nats = rel_entr(np.exp(logs), np.exp(moved)).sum(axis=-1)
    np.testing.assert_allclose(divergence(base, other), nats, rtol=0, atol=1e-5)
    found = compare(base, other)
    assert found["kl_mean"] == pytest.approx(nats.mean(), rel=1e-4)
    assert found["kl_p999"] == pytest.approx(np.quantile(nats, 0.999), rel=1e-4)
    assert found["top1_agreement"] == np.mean(logs.argmax(axis=-1) == moved.argmax(axis=-1))
    targets = base.targets[..., None]
    ours, theirs = (np.exp(-np.take_along_axis(one, targets, axis=-1).mean()) for one in (moved, logs))
    assert found["perplexity"] == pytest.approx(ours, rel=1e-5)
    assert found["perplexity_change"] == pytest.approx(ours / theirs - 1, abs=1e-6)


def test_what_lies_behind_a_rows_end_does_not_count():
    counted = np.arange(500)[None] < np.asarray([500, 120, 1])[:, None]
    logs, moved, base, other = random_pair(counted=counted)
    nats = rel_entr(np.exp(logs), np.exp(moved)).sum(axis=-1)
    found = compare(base, other)
    assert found["kl_mean"] == pytest.approx(nats[counted].mean(), rel=1e-4)
    assert found["top1_agreement"] == np.mean((logs.argmax(axis=-1) == moved.argmax(axis=-1))[counted])
    taken = np.take_along_axis(moved, base.targets[..., None], axis=-1)[..., 0]
    assert found["perplexity"] == pytest.approx(np.exp(-taken[counted].mean()), rel=1e-5)
    assert (divergence(base, other)[~counted] == 0).all()


def along(policy, rows, prompts, **more):
    pair = Policy(), parse_policy(policy)
    answers = [row[cut:] for row, cut in zip(rows, prompts, strict=True)]
    given = [row[:cut] for row, cut in zip(rows, prompts, strict=True)]
    return divergence_along(model(), pair, given, answers=answers, max_tokens=ROOM, **more)


def test_two_caches_side_by_side_give_what_two_one_after_another_give(followed):
    nats, agree = along(POLICIES["one bit"], ROWS, (PROMPT, PROMPT))
    full, coded = followed["full"], followed["one bit"]
    assert (nats.shape, nats.dtype, agree.dtype) == ((2, 150), np.float64, bool)
    np.testing.assert_allclose(nats, divergence(full, coded), rtol=0, atol=1e-4)
    same = np.argmax(full.log_probabilities, axis=-1) == np.argmax(coded.log_probabilities, axis=-1)
    np.testing.assert_array_equal(agree, same)
    assert not agree.all()


def test_side_by_side_rows_end_where_they_end_whatever_the_chunk():
    rows, prompts = [ROWS[0][:60], ROWS[1][:33]], (7, 31)
    nats, agree = along(POLICIES["one bit"], rows, prompts)
    assert nats.shape == agree.shape == (2, 53)
    assert (nats[1, 2:] == 0).all()
    assert not agree[1, 2:].any()
    assert nats[0].max() > 1e-2
    short, same = along(POLICIES["one bit"], rows, prompts, most_tokens=9)
    np.testing.assert_allclose(short, nats, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(same, agree)


def test_a_policy_beside_itself_does_not_differ():
    nats, agree = along("full", [row[:30] for row in ROWS], (PROMPT, PROMPT))
    assert (nats == 0).all()
    assert agree.all()


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 4], 2), ([], [1], 0), ([5], [6], 0), ([1, 2], [1, 2], 2)],
)
def test_tokens_in_common_end_at_the_first_that_differs(one, other, count):
    assert num_common(one, other) == num_common(other, one) == count
