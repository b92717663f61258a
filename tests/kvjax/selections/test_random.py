"""random: uniform draws by seed, layer, head, position and tokens seen, in every round anew."""

import dataclasses

import numpy as np
import pytest

from tests.views import check_slots_and_rows, expected, fitted, random_view, scores_of, view_of


def long_view(*, rows=1, num_seen=None):
    keys = np.zeros((rows, 2, 4096, 2), np.float32)
    return view_of(keys, num_seen=np.full(rows, num_seen or 4096, np.int32))


def mix(bits):
    """MurmurHash3's finaliser, of a Python integer."""
    bits ^= bits >> 16
    bits = bits * 0x85EBCA6B % 2**32
    bits ^= bits >> 13
    bits = bits * 0xC2B2AE35 % 2**32
    return bits ^ (bits >> 16)


@pytest.mark.parametrize(("layer", "seed"), [(0, 0), (2, 5)])
def test_draws_are_the_hash_of_all_that_they_depend_on(layer, seed):
    selection, view = fitted("random", layer=layer, seed=seed)[0], random_view()

    def draws(tokens):
        key = mix(tokens.head + 1 + layer * 4096)
        seen = mix(tokens.num_seen + seed)
        return [(mix(mix(int(place) ^ key) ^ seen) >> 8) / 2**24 for place in tokens.positions]

    wanted = expected(view, draws)
    held = ~np.isnan(wanted)
    np.testing.assert_array_equal(scores_of(selection, view)[held], wanted[held].astype(np.float32))


def test_uniform():
    scores = np.sort(scores_of(fitted("random")[0], long_view()), axis=2)[0]
    assert scores.min() >= 0
    assert scores.max() < 1
    even = (np.arange(4096) + 0.5) / 4096
    assert np.abs(scores - even).max() < 1.63 / np.sqrt(4096)  # Kolmogorov and Smirnov, 1 in 100


def test_every_round_head_layer_and_seed_draws_for_itself():
    base = scores_of(fitted("random")[0], long_view())
    others = [
        base[:, ::-1],
        scores_of(fitted("random", layer=1)[0], long_view()),
        scores_of(fitted("random", seed=1)[0], long_view()),
        scores_of(fitted("random")[0], long_view(num_seen=4224)),
    ]
    for other in others:
        assert abs(np.corrcoef(base[0, 0], other[0, 0])[0, 1]) < 4 / np.sqrt(4096)


def test_a_row_alone_draws_as_in_a_batch():
    scores = scores_of(fitted("random")[0], long_view(rows=3))
    np.testing.assert_array_equal(scores, np.broadcast_to(scores[:1], scores.shape))
    check_slots_and_rows(fitted("random")[0], random_view(), tolerance=0)


def test_keys_and_values_do_not_count():
    view = random_view()
    other = dataclasses.replace(view, keys=view.values, values=view.keys)
    selection = fitted("random")[0]
    np.testing.assert_array_equal(scores_of(selection, view), scores_of(selection, other))
