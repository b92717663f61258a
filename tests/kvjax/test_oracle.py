"""The oracle: scores from what it was told, what it keeps, and that nobody does better than to know."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accounting import account, kept_positions
from kvjax.forcing import compare
from kvjax.grammar import parse_policy
from kvjax.oracle import Oracle, look_ahead, oracle_of, with_future, without_future
from kvjax.policy import Policy
from kvjax.walk import follow
from tests.tiny import sharp_model, tiny_model
from tests.views import scores_of, view_of

model = functools.partial(tiny_model, layers=1)
EXACT = "+exact(sinks=2,window=8,round=8)"


def oracle(budget, more=EXACT):
    frame = f"(budget={budget}){more}"
    return oracle_of(parse_policy(f"streaming{frame}"), text=f"oracle{frame}")


def test_a_score_is_what_queries_of_the_running_block_and_later_will_give():
    random = np.random.default_rng(0)
    future = random.random((4, 3, 2, 48)).astype(np.float32)
    positions = np.stack([random.permutation(48)[:5] for _ in range(8)]).reshape(4, 2, 5).astype(np.int32)
    positions[:, :, 3] = -1
    seen = np.asarray([0, 17, 32, 48], np.int32)  # the last row has come to its end: the last block stays
    view = view_of(np.zeros((4, 2, 5, 16), np.float32), positions=positions, num_seen=seen, arrays={"future": future})
    scores = scores_of(Oracle(budget=8), view)
    for row, block in enumerate((0, 1, 2, 2)):
        for head, slot in np.ndindex(2, 5):
            place = positions[row, head, slot]
            if place >= 0:
                assert scores[row, head, slot] == future[row, block, head, place]


def test_the_policy_is_the_same_but_for_its_selection():
    policy = oracle(26, f"{EXACT}+edges(1)")
    assert str(policy) == f"oracle(budget=26){EXACT}+edges(1)"
    assert policy.selection == Oracle(budget=26)
    assert (policy.exact.sinks, policy.exact.window, policy.exact.round, policy.edges) == (2, 8, 8, 1)
    assert policy.evicts


FIRST = np.asarray([[5, 17, 40, 88], [3, 29, 63, 70]])
"""Of each head, what is attended to in the blocks up to the sixth."""
SECOND = np.asarray([[9, 21, 54, 77], [11, 30, 31, 89]])
"""And what is attended to for ever."""


@pytest.fixture(scope="module")
def story():
    """What each head holds after a prompt of 100 tokens, after 110 and after 115; room for 8 beside sinks and window.

    The body's rounds come when 106 and 114 tokens have been seen.
    """
    future = np.zeros((1, 9, 2, 144), np.float32)
    for head in range(2):
        future[0, :7, head, FIRST[head]] = 1.0
        future[0, :, head, SECOND[head]] = 0.5
    cache = kvjax.init_cache(model(), oracle(2 + 8 + 8), batch=1, max_tokens=144)
    cache = with_future(cache, [jnp.asarray(future)])
    tokens = np.random.default_rng(2).integers(0, 64, (1, 115)).astype(np.int32)
    _, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :100]))
    held = {100: kept_positions(cache)[0]}
    for seen in (105, 110, 115):
        _, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(tokens[:, seen - 5 : seen]))
        held[seen] = kept_positions(cache)[0]
    return held


def test_a_budget_that_covers_only_what_will_be_attended_to_keeps_exactly_that(story):
    for seen, newest in ((100, 90), (110, 98)):
        for head in range(2):
            expected = {0, 1, *FIRST[head], *SECOND[head], *range(newest, seen)}
            assert set(story[seen][head].tolist()) == expected, (seen, head)


def test_what_only_past_queries_attended_to_goes(story):
    """Of tokens that nobody will look at, the newest take the room that is left."""
    for head in range(2):
        assert set(story[115][head].tolist()) == {0, 1, *SECOND[head], *range(102, 115)}, head


def test_layers_at_the_edges_are_told_nothing():
    cache = kvjax.init_cache(tiny_model(layers=3), oracle(26, f"{EXACT}+edges(1)"), batch=1, max_tokens=64)
    futures = [jnp.full((1, 4, 2, 64), value) for value in (1.0, 2.0, 3.0)]
    told = with_future(cache, futures)
    assert told.layers[0] is cache.layers[0]
    assert told.layers[2] is cache.layers[2]
    np.testing.assert_array_equal(told.layers[1].state.arrays["future"], futures[1])
    np.testing.assert_array_equal(told.num_seen, cache.num_seen)


def test_knowing_the_future_takes_no_bytes_of_the_cache():
    sizes = {"batch": 2, "max_tokens": 64}
    told = kvjax.init_cache(model(), oracle(26), **sizes)
    told = with_future(told, [jnp.zeros((2, 4, 2, 64))])
    blind = kvjax.init_cache(model(), f"streaming(budget=26){EXACT}", **sizes)
    assert account(without_future(told)) == account(blind)
    assert account(told)["device_bytes"] > account(blind)["device_bytes"]
    full = kvjax.init_cache(model(), "full", **sizes)
    assert account(without_future(full)) == account(full)


def test_looking_ahead_pads_to_whole_blocks_and_knows_rows_by_their_lengths():
    tokens = np.random.default_rng(3).integers(0, 64, (2, 40)).astype(np.int32)
    (future,) = look_ahead(model(), jnp.asarray(tokens), jnp.asarray([40, 21]))
    assert future.shape == (2, 3, 2, 48)
    changed = tokens.copy()
    changed[1, 21:] = 7
    (again,) = look_ahead(model(), jnp.asarray(changed), jnp.asarray([40, 21]))
    np.testing.assert_array_equal(future, again)
    assert (np.asarray(future)[1, :, :, 21:] == 0).all()
    assert (np.asarray(future)[1, 2] == 0).all()
    assert (np.asarray(future)[0, 2, :, :40] > 0).all()


@pytest.mark.slow
def test_nobody_beats_the_oracle_at_its_budget():
    """KL from the uncompressed cache along 40 tokens behind 80, two rows, of a model that looks at a few tokens."""
    network, rows = sharp_model(), np.random.default_rng(4).integers(0, 64, (2, 120)).tolist()
    prompts, answers = [row[:80] for row in rows], [row[80:] for row in rows]

    def led(policy, prepare=None):
        return follow(network, policy, prompts, answers=answers, max_tokens=128, prepare=prepare)

    padded = np.zeros((2, 128), np.int32)
    padded[:, :120] = rows
    futures = look_ahead(network, jnp.asarray(padded), jnp.asarray([120, 120]))
    full = led(Policy())
    found = {"oracle": compare(full, led(oracle(42), lambda cache: with_future(cache, futures)))["kl_mean"]}
    for name in ("random", "streaming"):
        found[name] = compare(full, led(parse_policy(f"{name}(budget=42){EXACT}")))["kl_mean"]
    assert 0 < found["oracle"] < 0.5 * min(found["random"], found["streaming"]), found
