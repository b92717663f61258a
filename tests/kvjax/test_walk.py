"""Given answers through a cache against one pass without; and its own answers, by the same compiled functions."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from kvjax.compilations import compilations
from kvjax.empty import empty_cache
from kvjax.errors import UserError
from kvjax.forcing import compare
from kvjax.generation import Generator
from kvjax.grammar import parse_policy
from kvjax.sharding import make_mesh
from kvjax.timing import seconds_per_step
from kvjax.walk import STEPS, answer, follow
from tests.tiny import place, tiny_model, whole_pass

model = functools.partial(tiny_model, layers=1)
PROMPT, ROOM = 20, 192
ROWS = np.random.default_rng(0).integers(0, 64, (2, 170)).tolist()  # 149 steps: nine calls and a part of one
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


PROMPTS = [ROWS[0][:PROMPT], ROWS[1][:7]]
NEW = STEPS + 9


def own(policy="one bit", prompts=PROMPTS, **more):
    """A policy's own answers."""
    return answer(model(), parse_policy(POLICIES[policy]), prompts, **{"new_tokens": NEW, "max_tokens": ROOM} | more)


def generated(policy="one bit", *, stop_tokens=(), then=()):
    generator = Generator(
        model(), policy=POLICIES[policy], batch=len(PROMPTS), max_tokens=ROOM, stop_tokens=stop_tokens
    )
    return generator.generate(PROMPTS, max_new_tokens=NEW, then=then)


@pytest.mark.parametrize("asked", [0, 5])
def test_own_answers_are_those_that_are_generated(asked):
    then = [row[-asked:] for row in ROWS] if asked else ()
    plain = generated(then=then)
    found = own(then=then)
    assert found.answers == plain
    assert found.log_probabilities.shape == (2, NEW, 64)
    assert found.counted.all()
    np.testing.assert_array_equal(np.argmax(found.log_probabilities, axis=-1), found.targets)
    # Stopped in one row at its sixth token, which is the last that comes; the other goes on, or stops where it has it.
    stops = [plain[0][5], 64 + 7]  # the second is beyond the vocabulary
    stopped = own(then=then, stop_tokens=stops)
    assert stopped.answers == generated(then=then, stop_tokens=stops[:1])
    assert stopped.answers[0] == plain[0][: plain[0].index(stops[0]) + 1]
    assert stopped.targets.shape == (2, max(map(len, stopped.answers)))
    np.testing.assert_array_equal(stopped.log_probabilities.shape[:2], stopped.targets.shape)


def test_distributions_of_own_answers_are_those_of_following_them():
    found = own()
    along = follow(model(), parse_policy(POLICIES["one bit"]), PROMPTS, answers=found.answers, max_tokens=ROOM)
    np.testing.assert_array_equal(along.targets, found.targets)
    np.testing.assert_array_equal(along.log_probabilities, found.log_probabilities)
    np.testing.assert_array_equal(along.cache.num_seen, found.cache.num_seen)
    plain = own(distributions=False)
    assert plain.answers == found.answers
    assert plain.log_probabilities.shape == (2, 0, 64)


def test_an_answer_that_stops_at_once_takes_no_step():
    first = [row[0] for row in own().answers]
    found = own(stop_tokens=first)
    assert found.answers == [[token] for token in first]
    np.testing.assert_array_equal(found.cache.num_seen, [20, 7])
    assert own(new_tokens=1).answers == found.answers


@pytest.mark.parametrize("sizes", [None, {}, {"data": 2, "model": 2}])
def test_following_answering_and_timing_share_what_is_compiled(sizes):
    """Several calls of each, without a mesh and on two: what comes out of one goes into the next."""
    network = model() if sizes is None else place(model(), make_mesh(**sizes))
    policy, longest = parse_policy(POLICIES["int8"]), {"max_tokens": ROOM}
    jax.clear_caches()
    with compilations() as counts:
        found = answer(network, policy, PROMPTS, new_tokens=STEPS + 4, stop_tokens=[3], **longest)
        follow(network, policy, PROMPTS, answers=found.answers, **longest)
        assert seconds_per_step(network, found.cache, count=STEPS + 1) > 0
    assert (counts["walk"], counts["_read"]) == (1, 1)
