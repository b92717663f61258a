"""Pages of a body: bounds of products, summaries as tokens come, and which pages are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import Segment
from kernels_pallas.decode_attention.reference import without_pages
from kvjax.evidence import empty_evidence
from kvjax.pages import add_pages, best_pages, page_bounds
from kvjax.selections.knorm import KNorm
from kvjax.selections.quest import Quest
from kvjax.sharding import Placement
from tests.fitted import QUICK, normal
from tests.views import shape_of

PAGE, SLOTS, SIZE = 4, 32, 16


def evidence(*, batch=2, dtype="float32", selection=None):
    return empty_evidence(
        selection or Quest(page=PAGE),
        {},
        shape=dataclasses.replace(shape_of(), dtype=dtype),
        batch=batch,
        exact_slots=8,
        body=(2, SLOTS),
        placement=Placement(),
    )


@jax.jit(compiler_options=QUICK)
def add(state, keys, starts, due):
    return add_pages(state, keys, starts=starts, due=due)


def filled(keys, state=None, *, dtype="float32"):
    """Evidence of a body with these keys from its first slot on."""
    batch = keys.shape[0]
    return add(state or evidence(batch=batch, dtype=dtype), keys, np.zeros(batch, np.int32), np.ones(batch, bool))


def by_page(keys):
    return keys.reshape(*keys.shape[:2], -1, PAGE, keys.shape[3])


def products_of(queries, keys):
    """`B N S`, in float64."""
    spread = np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    return np.einsum("BND,BNSD->BNS", queries.astype(np.float64), spread.astype(np.float64))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bound_is_never_below_a_product(seed, dtype):
    """Of all queries with all keys of the page, whatever their signs and scales; also of keys as the model has them."""
    scales = np.exp(np.random.default_rng(seed).normal(size=(1, 2, 1, SIZE)) * 2).astype(np.float32)
    keys = jnp.asarray(normal(3, 2, SLOTS, SIZE, seed=seed) * scales + 0.5 * scales).astype(dtype)
    keys = np.asarray(keys.astype(jnp.float32))
    queries = normal(3, 4, SIZE, seed=seed + 10)
    low, high = filled(keys, dtype=dtype).pages
    bounds = np.asarray(jax.jit(page_bounds)(queries, low, high))
    products = products_of(queries, keys).reshape(3, 4, -1, PAGE).max(axis=-1)
    assert bounds.shape == (3, 4, SLOTS // PAGE)
    rounding = 1e-6 * np.abs(bounds).max()
    assert (bounds >= products - rounding).all()
    assert (bounds > products + rounding).any()


def test_the_bound_by_its_formula():
    keys, queries = normal(2, 2, SLOTS, SIZE), normal(2, 4, SIZE, seed=1)
    low, high = by_page(keys).min(axis=3), by_page(keys).max(axis=3)
    ends = [np.repeat(end, 2, axis=1).astype(np.float64) * queries[:, :, None] for end in (low, high)]
    found = jax.jit(page_bounds)(queries, low, high)
    np.testing.assert_allclose(found, np.maximum(*ends).sum(axis=-1), rtol=1e-5, atol=1e-5)


def test_a_page_of_one_key_repeated_is_bounded_exactly():
    keys, queries = np.repeat(normal(1, 2, SLOTS // PAGE, SIZE), PAGE, axis=2), normal(1, 4, SIZE, seed=1)
    found = jax.jit(page_bounds)(queries, *filled(keys).pages)
    np.testing.assert_allclose(found, products_of(queries, keys)[:, :, ::PAGE], rtol=1e-5, atol=1e-5)


def test_pages_are_summed_up_where_they_come_and_nowhere_else():
    keys, more = normal(3, 2, 12, SIZE), normal(3, 2, 8, SIZE, seed=1)
    before = filled(keys, evidence(batch=3))
    starts, due = np.array([12, 24, 12], np.int32), np.array([True, True, False])
    after = add(before, more, starts, due)
    for old, new, reduce in zip(before.pages, after.pages, (np.min, np.max), strict=True):
        wanted = np.array(old)
        np.testing.assert_array_equal(wanted[:, :, :3], reduce(by_page(keys), axis=3))
        wanted[0, :, 3:5], wanted[1, :, 6:8] = reduce(by_page(more), axis=3)[:2]
        np.testing.assert_array_equal(new, wanted)


def test_no_pages_where_none_are_wanted():
    keys, starts, due = jnp.ones((2, 2, 4, SIZE)), jnp.zeros(2, jnp.int32), jnp.ones(2, bool)
    assert add_pages(None, keys, starts=starts, due=due) is None
    state = evidence(selection=KNorm())
    assert state.pages is None
    assert add_pages(state, keys, starts=starts, due=due) is state


def body_of(keys, values, positions):
    return Segment(
        queries=jnp.zeros((keys.shape[0], 1, 4, SIZE)),
        keys=(Coded(planes=(jnp.asarray(keys),)),),
        values=(Coded(planes=(jnp.asarray(values),)),),
        positions=jnp.asarray(positions),
        num_kv_heads=2,
    )


def read(keys, positions, queries, count):
    """What is read of a body: keys, values and positions; values are the keys and a half."""
    segment, state = body_of(keys, keys + np.float32(0.5), positions), filled(keys)

    @jax.jit(compiler_options=QUICK)
    def parts(state, queries):
        chosen = best_pages(segment, state, queries, count=count)
        assert chosen.keys is segment.keys
        assert chosen.values is segment.values
        cut = without_pages(chosen)
        return cut.keys[0].planes[0], cut.values[0].planes[0], chosen.positions

    return [np.asarray(array) for array in parts(state, queries[:, None])]


def all_positions(filled_slots):
    """`B 1 S`: the first slots of each row hold tokens, sinks lie before them."""
    slots = np.arange(SLOTS, dtype=np.int32)
    return np.where(slots < np.array(filled_slots)[:, None], slots + 4, -1).astype(np.int32)[:, None]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_best_pages_of_each_head_and_the_newest(count):
    """By the largest bound over the query heads of a group; empty pages are not read while others are there."""
    keys, queries, sizes = normal(3, 2, SLOTS, SIZE), normal(3, 4, SIZE, seed=1), (SLOTS, 20, 8)
    positions = all_positions(sizes)
    found_keys, found_values, found = read(keys, positions, queries, count)
    assert found.shape == (3, 2, -(-count // 2) * 2 * PAGE)  # bytes of single bits are filled, by pages of none
    assert ((found >= 0).sum(axis=2) <= count * PAGE).all()
    low, high = by_page(keys).min(axis=3), by_page(keys).max(axis=3)
    ends = [np.repeat(end, 2, axis=1) * queries[:, :, None] for end in (low, high)]
    bounds = np.maximum(*ends).sum(axis=-1).reshape(3, 2, 2, -1).max(axis=2)
    for row, head in np.ndindex(3, 2):
        newest = sizes[row] // PAGE - 1
        others = sorted(range(newest), key=lambda page: -bounds[row, head, page])[: count - 1]
        slots = [page * PAGE + place for page in sorted([newest, *others]) for place in range(PAGE)]
        read_here = found[row, head] >= 0
        np.testing.assert_array_equal(np.sort(found[row, head][read_here]), positions[row, 0, slots])
        own = found[row, head][read_here] - 4
        np.testing.assert_array_equal(found_keys[row, head][read_here], keys[row, head, own])
        np.testing.assert_array_equal(found_values[row, head][read_here], keys[row, head, own] + np.float32(0.5))


def test_an_empty_body_reads_nothing():
    *_, found = read(normal(1, 2, SLOTS, SIZE), all_positions((0,)), normal(1, 4, SIZE), 3)
    assert (found == -1).all()


@pytest.mark.parametrize("count", [SLOTS // PAGE, 100])
def test_as_many_pages_as_there_are_is_the_whole_body(count):
    keys = normal(1, 2, SLOTS, SIZE)
    segment = body_of(keys, keys, all_positions((SLOTS,)))
    assert best_pages(segment, filled(keys), jnp.ones((1, 1, 4, SIZE)), count=count) is segment
