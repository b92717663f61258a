"""lowrank: principal components of keys and values, exact or quantised."""

import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, shape_of, statistics_of, stored, turned

D, K = 32, 4
SHAPE = shape_of(head_size=D, kv_heads=K)


def vectors(seed=0):
    """`1 K S D` before RoPE: a mean, and directions of each head whose sizes fall by a fifth from one to the next."""
    generator = np.random.default_rng(7)
    directions = np.linalg.qr(generator.normal(size=(K, D, D)))[0]
    mean = generator.normal(size=(K, 1, D))
    numbers = normal(1, K, 2048, D, seed=seed) * 0.8 ** np.arange(D)
    return (numbers @ directions.swapaxes(1, 2) + mean).astype(np.float32)


def statistics(heads=1):
    return statistics_of(SHAPE, np.asarray(turned(SHAPE, vectors(1))), vectors(1), heads=heads)


def mean_square_lost(given, role, **arguments):
    codec, arrays = fitted("lowrank", role, shape=SHAPE, statistics=statistics(), **arguments)
    return np.mean((np.asarray(stored(codec, arrays, given)[1]) - given) ** 2)


def lost_of_variance(**arguments):
    """Share of the variance of values, which the codec was not fitted to."""
    centred = vectors() - vectors().mean(axis=2, keepdims=True)
    return mean_square_lost(vectors(), "values", **arguments) / np.mean(centred**2)


@pytest.mark.parametrize("rank", [4, 8])
def test_what_is_lost_is_the_variance_of_the_other_directions(rank):
    assert lost_of_variance(rank=rank) == pytest.approx(0.64**rank, rel=0.1)


def test_nothing_is_lost_at_full_rank():
    assert lost_of_variance(rank=D) < 1e-12


def test_the_mean_is_not_lost():
    """Without taking the mean off it is a direction like any other, and costs one of the components."""
    with_mean, without = (lost_of_variance(rank=8, mean=mean) for mean in ("calibrated", "none"))
    assert with_mean < 0.75 * without
    assert lost_of_variance(rank=8, mean="prompt") == pytest.approx(with_mean, rel=0.02)


def test_keys_have_a_lower_rank_before_rope():
    given = np.asarray(turned(SHAPE, vectors()))
    before, after = (mean_square_lost(given, "keys", rank=8, rope=rope) for rope in ("pre", "post"))
    assert before < 0.5 * after


@pytest.mark.parametrize(("bits", "loss"), [(8, 4e-5), (4, 0.0096), (2, 0.121)])
def test_quantised_components(bits, loss):
    """With all directions kept, the error is the quantiser's: rotated, the components suit one scale a token."""
    assert 0.3 * loss < lost_of_variance(rank=D, bits=bits) < 1.2 * loss


def test_heads_that_share_components():
    """Two heads with the same numbers, each turned its own way, need the components of one."""
    turns = np.linalg.qr(np.random.default_rng(3).normal(size=(K, D, D)))[0]
    given = np.einsum("bsd,kde->bkse", vectors()[:, 0], turns).astype(np.float32)
    found = statistics_of(SHAPE, given, given, heads=2)
    apart, shared = (
        error_of("lowrank", given, "values", shape=SHAPE, statistics=found, rank=8 * heads // 2, heads=heads)
        for heads in (1, 2)
    )
    assert shared < 0.3 * apart  # as many numbers stored: 4 for each head
    assert bytes_a_token("lowrank", shape=SHAPE, statistics=found, rank=8, heads=2) == 4 * 4  # float32


def test_stored_bytes():
    """R numbers, and one 16-bit scale where they are quantised."""
    shape = shape_of(head_size=D, kv_heads=K, dtype="bfloat16")
    given = {"shape": shape, "statistics": statistics(2)}
    assert bytes_a_token("lowrank", rank=16, **given) == 16 * 2
    assert bytes_a_token("lowrank", rank=16, bits=8, **given) == 16 + 2
    assert bytes_a_token("lowrank", rank=16, bits=3, **given) == 16 * 3 / 8 + 2
    assert bytes_a_token("lowrank", rank=16, bits=4, heads=2, rope="pre", **given) == (16 * 4 / 8 + 2) / 2
    codec, arrays = fitted("lowrank", energy=0.95, **given)
    assert codec.bits_per_element(arrays) == codec.linear.rank * 16 / D


def test_energy_gives_each_layer_a_rank():
    codec, _ = fitted("lowrank", "values", shape=SHAPE, statistics=statistics(), energy=0.95)
    assert codec.linear.rank == 8  # 0.64**7 is 0.044
    assert lost_of_variance(energy=0.95) < 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"either rank=R or energy=SHARE, e\.g\. lowrank\(energy=0\.95\)"),
        ({"rank": 8, "energy": 0.9}, "either rank=R or energy=SHARE"),
        ({"rank": -1}, r"lowrank\(rank\) is -1; .* The nearest is 1\."),
        ({"energy": 1.5}, r"lowrank\(energy\) is 1\.5; .* The nearest is 1\.0\."),
        ({"rank": 8, "bits": 6}, r"lowrank\(bits\) is 6; it must be one of 1, 2, 3, 4, 8, 16\. The nearest is (4|8)\."),
        ({"rank": 8, "heads": 0}, r"lowrank\(heads\) is 0; .* The nearest is 1\."),
        ({"rank": 8, "mean": "calib"}, r"mean is calib; .* The nearest is calibrated\."),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("lowrank")("keys", **wrong)


def test_statistics_are_asked_for():
    with pytest.raises(UserError, match=r"python -m kvjax\.calibrate"):
        fitted("lowrank", rank=8, mean="none", shape=SHAPE)
    with pytest.raises(UserError, match="calibrate again with --heads=4"):
        fitted("lowrank", rank=8, heads=4, shape=SHAPE, statistics=statistics(2))
