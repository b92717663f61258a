"""Transforms that are fitted to statistics: principal components and OSCAR's rotation."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from kvjax.errors import UserError
from kvjax.stages.calibrated import Principal, QueryCovariance
from kvjax.stages.facts import LayerFacts
from kvjax.stages.linear import backward, forward
from tests.fitted import normal, shape_of, statistics_of, turned

D, K = 16, 4
SHAPE = shape_of(head_size=D, kv_heads=K, query_heads=8)


def keys_with_a_spectrum(*, mean=0.0, seed=0):
    """Keys `1 K S D`, before RoPE; each head has directions of its own, whose sizes halve from one to the next."""
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(generator.normal(size=(K, D, D)))[0]
    numbers = generator.normal(size=(1, K, 512, D)) * 0.5 ** np.arange(D)
    return (numbers @ directions.swapaxes(1, 2) + mean).astype(np.float32), directions


def facts_of(keys, role="keys", *, heads=1, centred=False, before_rope=True, shape=SHAPE, queries=None):
    """Facts of a layer with these keys before RoPE, which are also its values."""
    statistics = statistics_of(shape, turned(shape, keys), keys, queries, heads=heads)
    return LayerFacts(shape=shape, layer=0, role=role, statistics=statistics, before_rope=before_rope, centred=centred)


@pytest.mark.parametrize("role", ["keys", "values"])
def test_the_leading_directions_are_kept(role):
    keys, directions = keys_with_a_spectrum()
    settled, arrays = Principal(rank=4).fit(facts_of(keys, role))
    basis = np.asarray(settled.matrix(arrays))
    assert basis.shape == (K, D, 4)
    np.testing.assert_allclose(basis.swapaxes(1, 2) @ basis, np.broadcast_to(np.eye(4), (K, 4, 4)), rtol=0, atol=1e-5)
    agreement = np.abs(np.einsum("kdr,kdr->kr", basis, directions[:, :, :4]))
    assert agreement.min() > 0.99
    rest = backward(forward(jnp.asarray(keys), basis, heads=1), basis, heads=1) - keys
    # What is left is the sum of the other directions' squares: 4**-4 of the whole.
    assert np.sum(rest**2) / np.sum(keys**2) == pytest.approx(4.0**-4, rel=0.2)


@pytest.mark.parametrize(("energy", "needed"), [(0.7, 1), (0.93, 2), (0.98, 3), (0.999, 5), (0.9999, 7), (1.0, 16)])
def test_energy_picks_the_rank(energy, needed):
    """r directions hold 1 - 4**-r; the rank is rounded up to a multiple of 8."""
    settled, arrays = Principal(energy=energy).fit(facts_of(keys_with_a_spectrum()[0]))
    assert settled.rank == -(-needed // 8) * 8 == arrays["basis"].shape[2]
    assert settled.energy is None


def test_energy_is_what_every_head_keeps():
    """One head whose sizes are all alike makes all heads keep more."""
    keys, _ = keys_with_a_spectrum()
    keys[:, 2] = normal(512, D)
    settled, _ = Principal(energy=0.45).fit(facts_of(keys))
    assert settled.rank == 8
    settled, _ = Principal(energy=0.9).fit(facts_of(keys))
    assert settled.rank == 16


def test_about_the_mean_where_that_is_taken_off():
    """A large mean is a direction of its own, unless it is taken off before."""
    keys, directions = keys_with_a_spectrum(mean=3.0)
    plain, arrays = Principal(rank=1).fit(facts_of(keys))
    assert np.abs(np.mean(arrays["basis"], axis=1)).min() * np.sqrt(D) > 0.95
    centred, arrays = Principal(rank=1).fit(facts_of(keys, centred=True))
    assert np.abs(np.einsum("kd,kd->k", arrays["basis"][:, :, 0], directions[:, :, 0])).min() > 0.95
    assert plain == centred


def test_the_moments_are_those_of_the_vectors_that_come_in():
    """After RoPE the directions of a head are mixed: four keep less of what is cached than of what was."""
    keys, _ = keys_with_a_spectrum()
    kept = {}
    for before, vectors in ((True, keys), (False, np.asarray(turned(SHAPE, keys)))):
        settled, arrays = Principal(rank=2).fit(facts_of(keys, before_rope=before))
        numbers = forward(jnp.asarray(vectors), settled.matrix(arrays), heads=1)
        kept[before] = np.sum(numbers**2) / np.sum(vectors**2)
    assert kept[True] > 0.92 > kept[False] + 0.05


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_that_say_the_same_share_their_numbers(heads):
    """Heads that are rotations of one another need no more directions together than one alone."""
    one, _ = keys_with_a_spectrum()
    turns = np.linalg.qr(normal(K, D, D, seed=5))[0]
    keys = np.einsum("bsd,kde->bkse", one[:, 0], turns).astype(np.float32)
    settled, arrays = Principal(rank=6, heads=heads).fit(facts_of(keys, heads=4))
    assert settled.heads == heads
    numbers = forward(jnp.asarray(keys), settled.matrix(arrays), heads=heads)
    assert numbers.shape == (1, K // heads, 512, 6)
    rest = backward(numbers, settled.matrix(arrays), heads=heads) - keys
    assert np.sum(rest**2) / np.sum(keys**2) < 1e-3


def test_spread_components_are_alike():
    """Rotated among themselves they span the same space, and one scale suits them all."""
    keys, _ = keys_with_a_spectrum()
    (_, plain), (_, spread) = (Principal(rank=8, spread=spread).fit(facts_of(keys)) for spread in (False, True))
    projections = [basis @ basis.swapaxes(1, 2) for basis in (plain["basis"], spread["basis"])]
    np.testing.assert_allclose(*projections, rtol=0, atol=1e-5)
    sizes = [np.mean((keys @ arrays["basis"]) ** 2, axis=(0, 2)) for arrays in (plain, spread)]  # K R
    assert (sizes[0].max(axis=1) / sizes[0].min(axis=1)).min() > 1000
    assert (sizes[1].max(axis=1) / sizes[1].min(axis=1)).max() < 10
    _, odd = Principal(rank=6, spread=True).fit(facts_of(keys))  # no power of two: a dense rotation
    np.testing.assert_allclose(odd["basis"].swapaxes(1, 2) @ odd["basis"], np.stack([np.eye(6)] * K), rtol=0, atol=1e-5)


def test_what_does_not_suit_the_model_is_refused():
    facts = facts_of(keys_with_a_spectrum()[0], heads=2)
    with pytest.raises(UserError, match="heads is 3; it must divide the model's 4"):
        Principal(rank=4, heads=3).fit(facts)
    with pytest.raises(UserError, match="rank is 33; the vectors have 32 numbers, so it must be at most 32"):
        Principal(rank=33, heads=2).fit(facts)
    with pytest.raises(UserError, match="hold 2 .* heads=4 is asked for: calibrate again with --heads=4"):
        Principal(rank=4, heads=4).fit(facts)
    small = shape_of(head_size=12, kv_heads=1, query_heads=1)
    with pytest.raises(UserError, match="oscar needs a head size that is a power of two, and the model's is 12"):
        QueryCovariance().fit(LayerFacts(shape=small, layer=0, role="keys"))


@pytest.mark.parametrize("role", ["keys", "values"])
def test_oscars_rotation_is_u_h_p(role):
    """Eigenvectors of what meets the vectors, largest first, then Hadamard's matrix, then a bit reversal."""
    keys, _ = keys_with_a_spectrum()
    queries = normal(1, 8, 512, D, seed=7) * np.linspace(0.2, 3, D, dtype=np.float32)
    facts = facts_of(keys, role, queries=queries)
    basis = np.asarray(QueryCovariance().fit(facts)[1]["basis"], np.float64)
    np.testing.assert_allclose(basis @ basis.swapaxes(1, 2), np.stack([np.eye(D)] * K), rtol=0, atol=1e-5)
    reversed_bits = [int(f"{index:04b}"[::-1], 2) for index in range(D)]
    permutation = np.eye(D)[:, reversed_bits]
    eigenvectors = basis @ permutation.T @ linalg.hadamard(D).T / np.sqrt(D)  # U = R P^T H^T
    grouped = queries.reshape(2 * K, 512, D)
    by_queries = np.stack([np.mean([q.T @ q for q in grouped[2 * k : 2 * k + 2]], axis=0) / 512 for k in range(K)])
    if role == "keys":
        second = by_queries
    else:
        rotated = np.asarray(turned(SHAPE, keys))[0]
        weights = np.einsum("ksd,kde,kse->ks", rotated, by_queries, rotated)
        weights /= weights.mean(axis=1, keepdims=True)
        second = np.einsum("ks,ksd,kse->kde", weights, keys[0], keys[0]) / 512
    diagonal = eigenvectors.swapaxes(1, 2) @ second @ eigenvectors
    sizes = np.einsum("kdd->kd", diagonal)
    np.testing.assert_allclose(diagonal - sizes[:, :, None] * np.eye(D), 0, atol=1e-4 * sizes.max())
    assert (np.diff(sizes, axis=1) <= 1e-4 * sizes.max()).all()
    # Every stretch of numbers has an even share of what matters.
    shares = np.einsum("kdr,kde,ker->kr", basis, second, basis)
    np.testing.assert_allclose(shares, np.broadcast_to(shares.mean(axis=1, keepdims=True), shares.shape), rtol=1e-3)
