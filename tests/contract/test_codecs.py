"""What holds for every codec in a cache: exactness, empty slots, rows that do not touch each other, one compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.empty import abstract_cache
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.stages.linear import Linear
from kvjax.stages.quantise import Exact
from tests.contract.codecs import CODECS, EXACT, model, random_tokens, statistics
from tests.tiny import place


def run(policy, tokens, *, prompt, chunk=1, lengths=None, spoil=None):
    """Logits after the prompt's last token and after every later one, and the cache."""
    cache = kvjax.init_cache(model(), policy, batch=len(tokens), max_tokens=tokens.shape[1], statistics=statistics())
    logits, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :prompt]), lengths=lengths)
    found = [np.asarray(logits)[:, None]]
    for start in range(prompt, tokens.shape[1], chunk):
        cache = cache if spoil is None else spoil(cache)
        logits, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(tokens[:, start : start + chunk]))
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1), cache


@dataclasses.dataclass(frozen=True)
class Unchanged(Linear):
    """The identity as a matrix product."""

    def matrix(self, arrays):
        return np.eye(16, dtype=np.float32)


@pytest.mark.optimised
@pytest.mark.parametrize("prompt", [5, 150])
def test_a_codec_of_identity_stages_gives_the_logits_of_full_bit_for_bit(prompt):
    """Through encode, rounds, packing of parts, prepared queries and finished outputs."""
    full = Policy()
    stages = {"quantiser": Exact("float32"), "linear": Unchanged()}
    identity = dataclasses.replace(
        full, keys=dataclasses.replace(full.keys, **stages), values=dataclasses.replace(full.values, **stages)
    )
    tokens = random_tokens(2, 280)
    ours, cache = run(identity, tokens, prompt=prompt, chunk=25)
    theirs, _ = run(full, tokens, prompt=prompt, chunk=25)
    assert int((cache.layers[0].body.positions >= 0).sum()) == 2 * 256  # two rounds have been
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("prompt", [1, 9, 30, 60])
def test_exact_segments_of_any_size_equal_one_pass(prompt):
    """An uncompressed body behind sinks and a short window is no other attention than a plain one."""
    tokens = random_tokens(1, 100)
    ours, _ = run(parse_policy("none" + EXACT), tokens, prompt=prompt, chunk=7)
    theirs, _ = run(Policy(), tokens, prompt=prompt, chunk=7)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def spoil_empty_slots(cache):
    """NaN where floats are stored and arbitrary bytes where codes are, in all slots without a token."""

    def spoil(array, empty, axis, entries=(1, 1)):
        numerator, denominator = entries
        rows = empty[:, :: denominator // numerator] if denominator > numerator else empty
        mask = np.moveaxis(rows.reshape(rows.shape[0], *(1,) * (array.ndim - 2), -1), -1, axis)
        garbage = jnp.nan if jnp.issubdtype(array.dtype, jnp.floating) else 85
        return jnp.where(mask, jnp.asarray(garbage, array.dtype), array)

    def layer(one):
        exact, body = one.exact, one.body
        empty = np.asarray(exact.positions < 0)
        exact = dataclasses.replace(exact, keys=spoil(exact.keys, empty, 2), values=spoil(exact.values, empty, 2))
        empty = np.asarray(body.positions[:, 0] < 0)

        def write(array, *, axis, entries):
            return spoil(array, empty, axis, entries)

        keys, values = (tuple(part.map_tokens(write) for part in parts) for parts in (body.keys, body.values))
        return dataclasses.replace(one, exact=exact, body=dataclasses.replace(body, keys=keys, values=values))

    return dataclasses.replace(cache, layers=tuple(layer(one) for one in cache.layers))


PROMPT, ROOM, CHUNK = 40, 72, 8


@dataclasses.dataclass(frozen=True)
class Story:
    """The same rows of tokens through one codec in several ways; all share the compiled functions."""

    policy: str
    tokens: np.ndarray

    def tell(self, *, lengths=(40, 23), tokens=None, chunk=CHUNK, spoil=None):
        """Logits after each later token, `rows T V`, and the cache; row i has `lengths[i]` tokens of prompt."""
        tokens = self.tokens if tokens is None else tokens
        cache = kvjax.init_cache(model(), self.policy, batch=2, max_tokens=ROOM, statistics=statistics())
        start = jnp.asarray(lengths, jnp.int32)
        _, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :PROMPT]), lengths=start)
        found = []
        for done in range(0, ROOM - max(lengths), chunk):
            cache = cache if spoil is None else spoil(cache)
            piece = np.stack([row[n + done : n + done + chunk] for row, n in zip(tokens, lengths, strict=True)])
            logits, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(piece))
            found.append(np.asarray(logits))
        return np.concatenate(found, axis=1), cache


def same_codes(one, other, row):
    """Whether a row's stored tokens of layer 0 are the same: its keys and values do not depend on attention."""
    ours, theirs = one.layers[0].body, other.layers[0].body
    np.testing.assert_array_equal(ours.positions[row], theirs.positions[row])
    count = int((ours.positions[row] >= 0).sum())
    for mine, yours in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):

        def compare(array, witness, *, axis, entries):
            live = count * entries[0] // entries[1]
            a, b = (np.take(np.asarray(x, np.float32)[row], range(live), axis=axis - 1) for x in (array, witness))
            if array.dtype == jnp.int8:
                assert np.mean(a != b) < 0.01  # a tie that rounding in the last bit breaks
            else:
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)
            return array

        mine.map_tokens(compare, yours)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_rows_slots_and_chunks(codec):
    """Empty slots may hold NaN; rows do not touch; chunks, prompts and single tokens store and see the same."""
    story = Story(codec + EXACT, random_tokens(2, 80))
    plain, cache = story.tell()
    assert np.isfinite(plain).all()
    assert (cache.layers[1].body.positions[0, 0] >= 0).sum() == 48
    spoilt, _ = story.tell(spoil=spoil_empty_slots)
    np.testing.assert_array_equal(plain, spoilt, err_msg="NaN in empty slots")
    other = np.concatenate([story.tokens[:1], random_tokens(1, 80, seed=5)])
    beside, _ = story.tell(tokens=other, lengths=(40, 31))
    np.testing.assert_array_equal(plain[0], beside[0], err_msg="the row beside it")
    kvjax.compressed_decode.clear_cache()
    single, singles = story.tell(chunk=1)
    assert kvjax.compressed_decode._cache_size() == 1  # rounds included, rows due at their own steps
    np.testing.assert_allclose(single, plain, rtol=0, atol=2e-5 * np.abs(plain).max())
    same_codes(cache, singles, row=0)
    if not any(word in codec for word in ("prompt", "2.5", "think")):  # these choose by the first tokens stored
        _, late = story.tell(chunk=1, lengths=(10, 23))
        _, whole = story.tell(lengths=(40, 23), chunk=1)
        assert (late.layers[0].body.positions[0] >= 0).sum() >= 48
        np.testing.assert_array_equal(late.layers[0].body.positions[0], whole.layers[0].body.positions[0])
        same_codes(late, whole, row=0)


@pytest.mark.optimised
@pytest.mark.parametrize("codec", ["int4", "kivi(bits=2,group=16)"])
def test_rounds_update_the_cache_in_place(codec):
    tokens = random_tokens(2, 60)
    cache = kvjax.init_cache(model(), codec + EXACT, batch=2, max_tokens=ROOM, statistics=statistics())
    _, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :PROMPT]), lengths=jnp.asarray([20, 11], jnp.int32))
    for index in range(40):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
        _, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(tokens[:, index : index + 1]))
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)] == pointers


@pytest.mark.optimised
@pytest.mark.parametrize("codec", ["int8", "fp8", "turboquant(bits=3)", "kivi(bits=2,group=16)", "none"])
def test_a_step_needs_no_more_than_one_decoded_layer(codec):
    """Temporary memory at 32,768 tokens, rounds included: at most one layer's keys and values in float32."""
    tokens = 32_768
    shape = model().cache_shape
    cache = abstract_cache(shape, policy=parse_policy(codec), batch=1, max_tokens=tokens)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = kvjax.compressed_decode.lower(model(), cache, one).compile().memory_analysis()
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= stored  # all of the cache is updated in place
    assert memory.temp_size_in_bytes <= 2 * shape.num_kv_heads * tokens * shape.head_size * 4


@pytest.mark.optimised
@pytest.mark.parametrize("codec", ["kivi(bits=2,group=16)", "lowrank(rank=16,heads=2,bits=8)"])
def test_a_mesh_stores_and_sees_what_one_device_does(codec):
    """Rows over two devices and heads over two: the same logits, and bodies cut, not copied, where heads divide."""
    tokens = random_tokens(2, 72)
    ours = place(model(), kvjax.make_mesh(data=2, model=2))
    found = []
    for one in (model(), ours):
        cache = kvjax.init_cache(one, codec + EXACT, batch=2, max_tokens=ROOM, statistics=statistics())
        first, cache = kvjax.prefill(one, cache, jnp.asarray(tokens[:, :PROMPT]))
        rest, cache = kvjax.compressed_decode(one, cache, jnp.asarray(tokens[:, PROMPT:]))
        found.append(np.concatenate([np.asarray(first)[:, None], np.asarray(rest)], axis=1))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-5 * np.abs(found[0]).max())
    codes = cache.layers[0].body.keys[0].planes[0]
    shards = 4 if codes.shape[1] == 2 else 2
    assert len({str(shard.index) for shard in codes.addressable_shards}) == shards
