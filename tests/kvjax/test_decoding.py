"""Decoding token by token equals one pass; one compile; the cache is updated in place; errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.decoding import compressed_decode, read
from kvjax.errors import UserError
from tests.tiny import tiny_config, tiny_model, whole_pass

TOLERANCE = 1e-5  # of the largest logit, float32


def assert_close(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * np.abs(reference).max())


@pytest.fixture(scope="module")
def rows():
    """Token rows of unequal lengths."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 64, length) for length in (40, 23, 31, 12)]


@pytest.mark.parametrize("chunk", [1, 3])
def test_decoding_equals_one_pass_for_unequal_lengths(rows, chunk):
    """Rows start after prompts of 1, 7, 16 and 5 tokens and end at their own lengths."""
    model = tiny_model()
    starts = np.asarray([1, 7, 16, 5])
    prompts = np.zeros((4, 16), np.int32)
    for row, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        prompts[row, :start] = tokens[:start]
    cache = kvjax.init_cache(model, "full", batch=4, max_tokens=40)
    logits, cache = kvjax.prefill(model, cache, jnp.asarray(prompts), lengths=jnp.asarray(starts))
    expected = [whole_pass(model, tokens) for tokens in rows]
    for row, start in enumerate(starts):
        assert_close(np.asarray(logits)[row], expected[row][start - 1])
    seen = starts.copy()
    while any(seen < [len(tokens) for tokens in rows]):
        new = np.zeros((4, chunk), np.int32)
        lengths = np.asarray([min(chunk, len(tokens) - at) for tokens, at in zip(rows, seen, strict=True)], np.int32)
        for row, (tokens, at) in enumerate(zip(rows, seen, strict=True)):
            new[row, : lengths[row]] = tokens[at : at + lengths[row]]
        step, cache = kvjax.compressed_decode(model, cache, jnp.asarray(new), lengths=jnp.asarray(lengths))
        for row in np.flatnonzero(lengths):
            at = seen[row]
            assert_close(np.asarray(step)[row, : lengths[row]], expected[row][at : at + lengths[row]])
        seen += lengths
    np.testing.assert_array_equal(cache.num_seen, [len(tokens) for tokens in rows])


def test_reading_a_prompt_and_what_comes_then(rows):
    """Logits after each row's last token; a row without tokens stays empty; without `then` it is `prefill`."""
    model = tiny_model()
    starts, counts = np.asarray([10, 7, 16, 0]), np.asarray([3, 6, 1, 0])
    prompts, then = np.zeros((4, 16), np.int32), np.zeros((4, 6), np.int32)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        prompts[row, :start] = rows[row][:start]
        then[row, :count] = rows[row][start : start + count]

    def run(then):
        cache = kvjax.init_cache(model, "full", batch=4, max_tokens=40)
        lengths = jnp.asarray(starts, jnp.int32)
        return jax.jit(read)(model, cache, jnp.asarray(prompts), lengths=lengths, then=then)

    logits, cache = run((jnp.asarray(then), jnp.asarray(counts, jnp.int32)))
    assert logits.shape == (4, 64)
    np.testing.assert_array_equal(cache.num_seen, starts + counts)
    for row in range(3):
        end = starts[row] + counts[row]
        assert_close(np.asarray(logits)[row], whole_pass(model, rows[row][:end])[-1])
    plain, cache = run(None)
    np.testing.assert_array_equal(cache.num_seen, starts)
    for row in range(3):
        assert_close(np.asarray(plain)[row], whole_pass(model, rows[row][: starts[row]])[-1])


def test_a_prompt_beyond_1024_tokens_equals_shorter_chunks():
    """The long prompt takes the walk over blocks, the chunks the cache."""
    model = tiny_model()
    tokens = np.random.default_rng(1).integers(0, 64, (1, 1300))
    cache = kvjax.init_cache(model, batch=1, max_tokens=1300)
    whole, _ = kvjax.prefill(model, cache, jnp.asarray(tokens))
    cache = kvjax.init_cache(model, batch=1, max_tokens=1300)
    _, cache = kvjax.prefill(model, cache, jnp.asarray(tokens[:, :650]))
    chunked, _ = kvjax.compressed_decode(model, cache, jnp.asarray(tokens[:, 650:]))
    assert_close(np.asarray(chunked)[:, -1], np.asarray(whole))


def test_padding_and_other_rows_do_not_matter(rows):
    """A row gives the same bits whatever lies in its padding and beside it."""
    model = tiny_model()
    prompts = np.zeros((2, 24), np.int32)
    prompts[0, :12], prompts[1, :23] = rows[3], rows[1]

    def run(tokens):
        cache = kvjax.init_cache(model, batch=2, max_tokens=32)
        first, cache = kvjax.prefill(model, cache, jnp.asarray(tokens), lengths=jnp.asarray([12, 23]))
        second, _ = kvjax.compressed_decode(model, cache, jnp.asarray([[5], [6]]))
        return np.asarray(first)[0], np.asarray(second)[0]

    changed = prompts.copy()
    changed[0, 12:], changed[1, :] = 63, 1
    for one, other in zip(run(prompts), run(changed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_lies_in_empty_slots_cannot_matter(rows):
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=1, max_tokens=32)
    _, cache = kvjax.prefill(model, cache, jnp.asarray(rows[3])[None])

    def poison(layer):
        empty = (layer.exact.positions < 0)[:, None, :, None]
        exact = dataclasses.replace(
            layer.exact,
            keys=jnp.where(empty, jnp.nan, layer.exact.keys),
            values=jnp.where(empty, jnp.nan, layer.exact.values),
        )
        return dataclasses.replace(layer, exact=exact)

    poisoned = dataclasses.replace(cache, layers=tuple(map(poison, cache.layers)))
    step = jax.jit(kvjax.decoding.decode_step)
    clean, _ = step(model, cache, jnp.asarray([[5]]), lengths=jnp.asarray([1]))
    dirty, _ = step(model, poisoned, jnp.asarray([[5]]), lengths=jnp.asarray([1]))
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.optimised
def test_500_tokens_compile_once_and_update_in_place():
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=1, max_tokens=520)
    logits, cache = kvjax.prefill(model, cache, jnp.asarray([[1, 2, 3]]))
    compressed_decode.clear_cache()
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    token = jnp.argmax(logits, axis=-1)[:, None]
    for _ in range(500):
        logits, cache = kvjax.compressed_decode(model, cache, token)
        token = jnp.argmax(logits[:, 0], axis=-1)[:, None]
    assert compressed_decode._cache_size() == 1
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)] == pointers


@pytest.mark.optimised
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_the_step_holds_no_second_copy_of_the_cache(num_tokens):
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=2, max_tokens=16_384)
    tokens = jnp.zeros((2, num_tokens), jnp.int32)
    memory = compressed_decode.lower(model, cache, tokens).compile().memory_analysis()
    cache_bytes = kvjax.device_bytes(cache.layers)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4  # blocks of slots, whatever the capacity


def test_a_row_without_room_gets_nan_and_leaves_others_alone():
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=2, max_tokens=4)
    _, cache = kvjax.prefill(model, cache, jnp.ones((2, 4), jnp.int32), lengths=jnp.asarray([4, 2]))
    logits, _ = kvjax.compressed_decode(model, cache, jnp.asarray([[1], [1]]))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_a_row_of_length_zero_stays_as_it_is():
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=2, max_tokens=8)
    _, cache = kvjax.prefill(model, cache, jnp.ones((2, 4), jnp.int32))
    _, cache = kvjax.compressed_decode(model, cache, jnp.asarray([[1], [1]]), lengths=jnp.asarray([0, 1]))
    np.testing.assert_array_equal(cache.num_seen, [4, 5])
    np.testing.assert_array_equal(cache.layers[0].exact.positions[0], [0, 1, 2, 3, -1, -1, -1, -1])


def test_prefill_of_a_cache_in_use_gives_nan():
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=2, max_tokens=16)
    tokens = jnp.ones((2, 4), jnp.int32)
    _, cache = kvjax.prefill(model, cache, tokens, lengths=jnp.asarray([4, 0]))
    logits, _ = kvjax.prefill(model, cache, tokens)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_refusals_name_what_was_wrong():
    model = tiny_model()
    with pytest.raises(UserError, match=r"Unknown policy term 'fulll'. Did you mean 'full'"):
        kvjax.init_cache(model, "fulll", batch=1, max_tokens=4)
    with pytest.raises(UserError, match="batch is 0"):
        kvjax.init_cache(model, batch=0, max_tokens=4)
    cache = kvjax.init_cache(model, batch=1, max_tokens=4)
    with pytest.raises(UserError, match="5 tokens do not fit in a cache of max_tokens=4"):
        kvjax.prefill(model, cache, jnp.ones((1, 5), jnp.int32))
    with pytest.raises(UserError, match=r"shape \(2, 1\); the cache expects \(1, T\)"):
        kvjax.compressed_decode(model, cache, jnp.ones((2, 1), jnp.int32))


def test_a_sliding_window_is_refused_beyond_the_window():
    import models

    config = dataclasses.replace(tiny_config(), sliding_window=8)
    model = models.Transformer(config)
    kvjax.init_cache(model, batch=1, max_tokens=8)
    with pytest.raises(UserError, match="sliding window of 8 tokens"):
        kvjax.init_cache(model, batch=1, max_tokens=9)
