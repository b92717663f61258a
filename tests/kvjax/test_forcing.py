"""Given answers through a cache against one pass without, and how distributions are compared."""

import functools

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from kvjax.empty import empty_cache
from kvjax.errors import UserError
from kvjax.forcing import Followed, compare, divergence, divergence_along, follow, num_common
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from tests.tiny import tiny_model, whole_pass

model = functools.partial(tiny_model, layers=1)
PROMPT, ROOM = 20, 192
ROWS = np.random.default_rng(0).integers(0, 64, (2, 170)).tolist()  # 149 decoded: a chunk and a part of one
EXACT = "+exact(sinks=2,window=8,round=8)"
POLICIES = {"full": "full", "int8": f"int8{EXACT}", "one bit": f"turboquant(bits=1){EXACT}"}


def led(policy, rows=ROWS, *, prompts=(PROMPT, PROMPT), asked=0, **more):
    """Rows through a cache: of each a prompt of so many tokens, then `asked` tokens, the rest is the answer."""
    cuts = list(zip(rows, prompts, strict=True))
    then = [row[cut : cut + asked] for row, cut in cuts] if asked else []
    answers = [row[cut + asked :] for row, cut in cuts]
    given = {"answers": answers, "then": then, "max_tokens": ROOM} | more
    return follow(model(), parse_policy(policy), [row[:cut] for row, cut in cuts], **given)


def expected_logs(row, first):
    """Log-probabilities of a row's tokens from `first` on, from one pass, float64."""
    return log_softmax(whole_pass(model(), row).astype(np.float64), axis=-1)[first - 1 : -1]


@pytest.fixture(scope="module")
def followed():
    """The same rows by policy."""
    return {name: led(policy) for name, policy in POLICIES.items()}


def test_the_full_cache_gives_what_one_pass_gives_for_every_token(followed):
    full = followed["full"]
    assert (full.log_probabilities.shape, full.log_probabilities.dtype) == ((2, 150, 64), np.float32)
    np.testing.assert_array_equal(full.targets, [row[PROMPT:] for row in ROWS])
    assert full.counted.all()
    expected = np.stack([expected_logs(row, PROMPT) for row in ROWS])
    np.testing.assert_allclose(full.log_probabilities, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    taken = np.take_along_axis(expected, full.targets[..., None], axis=-1)
    assert full.perplexity == pytest.approx(np.exp(-taken.mean()), rel=1e-4)
    np.testing.assert_array_equal(full.cache.num_seen, [169, 169])  # an answer's last token is never fed


def test_distributions_do_not_differ_from_themselves(followed):
    found = compare(followed["full"], followed["full"])
    assert found.pop("perplexity") == followed["full"].perplexity
    assert found == {"perplexity_change": 0.0, "kl_mean": 0.0, "kl_p999": 0.0, "top1_agreement": 1.0}


def test_divergence_grows_as_bits_shrink(followed):
    """Most tokens are in the body here; the first distribution comes from the prefill, which is uncompressed."""
    eight, one = (compare(followed["full"], followed[name]) for name in ("int8", "one bit"))
    assert 1e-7 < eight["kl_mean"] < 1e-2
    assert one["kl_mean"] > 20 * eight["kl_mean"]
    assert one["top1_agreement"] < eight["top1_agreement"] <= 1.0
    assert abs(eight["perplexity_change"]) < 0.02
    assert int(followed["int8"].cache.layers[0].body.positions.max()) > 150
    first = [followed[name].log_probabilities[:, 0] for name in ("full", "one bit")]
    np.testing.assert_allclose(*first, rtol=0, atol=1e-5)


def test_prompts_and_answers_may_be_of_any_lengths():
    """The rows' own distributions, and nothing counts behind a row's end."""
    rows, prompts = [ROWS[0][:60], ROWS[1][:33]], (7, 31)
    found = led("full", rows, prompts=prompts)
    assert found.log_probabilities.shape == (2, 53, 64)
    np.testing.assert_array_equal(found.counted.sum(axis=1), [53, 2])
    logs = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        expected = expected_logs(row, prompt)
        np.testing.assert_allclose(found.log_probabilities[index, : len(expected)], expected, rtol=0, atol=1e-4)
        logs.append(np.take_along_axis(expected, np.asarray(row[prompt:])[:, None], axis=1))
    assert found.perplexity == pytest.approx(np.exp(-np.concatenate(logs).mean()), rel=1e-4)
    np.testing.assert_array_equal(found.cache.num_seen, [59, 32])


def test_answers_of_one_token_need_no_step():
    found = led("full", [ROWS[0][:21], ROWS[1][:21]])
    assert found.log_probabilities.shape == (2, 1, 64)
    for index, row in enumerate(ROWS):
        np.testing.assert_allclose(found.log_probabilities[index], expected_logs(row[:21], 20), rtol=0, atol=1e-4)


def test_what_comes_then_makes_no_difference_to_the_full_cache(followed):
    """8 tokens of each row behind a prompt of 12, against one prompt of 20."""
    parted = led("full", prompts=(12, 12), asked=8)
    whole = followed["full"]
    assert parted.log_probabilities.shape == whole.log_probabilities.shape
    np.testing.assert_allclose(parted.log_probabilities, whole.log_probabilities, rtol=0, atol=1e-4)
    assert parted.perplexity == pytest.approx(whole.perplexity, rel=1e-4)


def test_what_comes_then_finds_the_prompt_compressed():
    """A prompt sees itself uncompressed, so what follows it is exact; ten tokens more see it in one bit."""
    row = [ROWS[0][:80]]
    exact = expected_logs(row[0], 70)[0]
    policy = f"turboquant(bits=1){EXACT}"
    whole = led(policy, row, prompts=(70,)).log_probabilities[0, 0]
    parted = led(policy, row, prompts=(60,), asked=10).log_probabilities[0, 0]
    np.testing.assert_allclose(whole, exact, rtol=0, atol=1e-4)
    assert np.abs(parted - exact).max() > 1e-2


def test_the_empty_cache_may_be_prepared():
    """Whoever prepares it is given an empty one for these rows; what comes back is used."""
    given = []

    def prepare(cache):
        given.append(cache)
        return empty_cache(model().cache_shape, policy=parse_policy(POLICIES["int8"]), batch=2, max_tokens=ROOM)

    found = led("full", prepare=prepare)
    (cache,) = given
    assert (cache.max_tokens, str(cache.policy)) == (ROOM, "full")
    assert str(found.cache.policy) == POLICIES["int8"]


def test_prompts_that_cannot_be_pinned_are_refused():
    with pytest.raises(UserError, match=r"A prompt of 20 tokens is longer than what 'random.*' can pin: 16\."):
        led(f"random(budget=34)+prompt(16){EXACT}")


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
