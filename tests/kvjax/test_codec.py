"""What every codec promises: stored numbers meet queries as decoded vectors do, rows and slots keep to themselves."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax._kernels import read_parts, score
from kvjax.codec import CODECS, MEANS, pipeline
from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.stages.facts import LayerFacts
from tests.fitted import QUICK, all_positions, fitted, normal, shape_of, statistics_of, stored, turned

SHAPE = shape_of(head_size=32, kv_heads=2, query_heads=4)
B, K, N, S, T, D = 2, 2, 4, 64, 3, 32
CASES = [
    ("none", {"mean": "prompt"}),
    ("int8", {"mean": "calibrated"}),
    ("fp8", {"scale": "token"}),
    ("int4", {}),
    ("int2", {"rotation": "dense", "range": "minmax", "mean": "prompt"}),
    ("kivi", {"group": 16}),
    ("nf", {}),
    ("turboquant", {"bits": 3.0}),
    ("turboquant", {"bits": 2.5, "mean": "prompt"}),
    ("turboquant", {"bits": 2.0, "prod": "gaussian"}),
    ("turboquant", {"bits": 1.0, "prod": "orthogonal", "mean": "prompt"}),
    ("lowrank", {"rank": 16, "heads": 2, "bits": 8}),
    ("oscar", {}),
    ("think", {}),
]
BEFORE_ROPE = [
    ("int8", {"rope": "pre"}),
    ("kivi", {"group": 16, "bits": 3, "rope": "pre", "mean": "prompt"}),
    ("turboquant", {"bits": 2.5, "rope": "pre", "mean": "prompt"}),
    ("lowrank", {"energy": 0.9, "bits": 4, "rope": "pre"}),
    ("lowrank", {"rank": 16, "heads": 2, "rope": "pre", "mean": "none"}),
]
KEYS = [("keys", *case) for case in CASES + BEFORE_ROPE]
# Without those that do to values what they do to keys, or nothing.
VALUES = [("values", *case) for case in CASES if case[0] not in ("int8", "fp8", "int2", "nf", "think")]


def named(case):
    """A case as people type it."""
    role, name, arguments = case
    return f"{role}-{name}({','.join(f'{key}={value}' for key, value in arguments.items())})"


each_codec = pytest.mark.parametrize("case", KEYS + VALUES, ids=named)


def vectors(seed=0):
    """Keys or values `B K S D` with channels of different sizes and a mean."""
    return normal(B, K, S, D, seed=seed) * np.linspace(0.5, 2, D, dtype=np.float32) + 0.5


@functools.cache
def settled(role, name, arguments):
    statistics = statistics_of(SHAPE, vectors(5), vectors(6), heads=2)
    return fitted(name, role, shape=SHAPE, statistics=statistics, **dict(arguments))


def codec_of(case):
    role, name, arguments = case
    return settled(role, name, tuple(arguments.items()))


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _choose(codec, given, positions, queries, arrays):
    return {**arrays, **codec.choose(given, positions=positions, queries=queries, arrays=arrays)}


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _use(codec, given, positions, queries, arrays):
    """Products with keys, or sums of values, from stored numbers and from decoded vectors; the numbers, the parts."""
    parts = codec.encode(given, positions=positions, arrays=arrays)
    read = read_parts(codec.readable(parts, arrays), positions[:, None])
    decoded = codec.decode(parts, positions=positions[:, None], arrays=arrays)
    wide, all_decoded = (jnp.repeat(numbers, N // numbers.shape[1], axis=1) for numbers in (read, decoded))
    if codec.role == "keys":
        prepared, bias = codec.prepare_query(queries, arrays)
        ours = jnp.einsum("BTNR,BNSR->BTNS", prepared, wide)
        ours = ours if bias is None else ours + bias[..., None]
        return ours, jnp.einsum("BTND,BNSD->BTNS", queries, all_decoded), read_parts(parts), parts
    weights = jax.nn.softmax(jnp.einsum("BTND,BNSD->BTNS", queries, all_decoded))
    weights = weights * jnp.asarray([0.3, 1.0, 2.0])[None, :, None, None]  # sums may be of a part of the tokens
    summed = jnp.einsum("BTNS,BNSR->BTNR", weights, wide)
    ours = codec.finish_output(summed, jnp.sum(weights, axis=-1), arrays)
    return ours, jnp.einsum("BTNS,BNSD->BTND", weights, all_decoded), read_parts(parts), parts


QUERIES = normal(B, T, N, D, seed=9)


def choose(case, given, positions=None):
    """All arrays once these first vectors are stored."""
    codec, arrays = codec_of(case)
    given = jnp.array(given)
    return _choose(codec, given, all_positions(given) if positions is None else positions, QUERIES, arrays)


def use(case, given, arrays=None):
    """See `_use`."""
    given = jnp.array(given)
    arrays = choose(case, given) if arrays is None else arrays
    return _use(codec_of(case)[0], given, all_positions(given), QUERIES, arrays)


def test_every_codec_is_here():
    assert {name for _, name, _ in KEYS} == set(CODECS.names())


@each_codec
def test_queries_and_outputs_meet_stored_numbers_as_they_meet_vectors(case):
    """q' . y + bias = q . x^ for keys, finish(sum w y) = sum w x^ for values, whatever is stored."""
    ours, plain, _, _ = use(case, vectors())
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _score(codec, given, positions, queries, arrays):
    """What a selection makes of keys as they are stored: read, and as products; and what they decode to."""
    parts, places = codec.encode(given, positions=positions, arrays=arrays), positions[:, None]
    keys = codec.stored(parts, positions=places, owners=None, arrays=arrays)
    products = score(keys, rows=queries[:, 0], implementation="reference")
    return keys.read(), products, codec.decode(parts, positions=places, arrays=arrays)


@pytest.mark.parametrize("case", KEYS, ids=named)
def test_selections_read_stored_keys_as_they_decode(case):
    given = jnp.array(vectors())
    read, products, decoded = _score(codec_of(case)[0], given, all_positions(given), QUERIES, choose(case, given))
    np.testing.assert_allclose(read, decoded, rtol=0, atol=1e-5 * np.abs(decoded).max())
    wanted = np.einsum("bnd,bnsd->bns", QUERIES[:, 0], np.repeat(decoded, N // K, axis=1))
    np.testing.assert_allclose(products, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@each_codec
def test_rows_keep_to_themselves(case):
    """NaN in one row changes nothing in another, neither what is chosen nor what is stored."""
    spoilt = vectors()
    spoilt[1] = np.nan
    one, other = ((choose(case, given), use(case, given)) for given in (vectors(), spoilt))
    for clean, beside in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if clean.shape[0] == B:  # fitted arrays have no rows
            np.testing.assert_array_equal(clean[0], beside[0])


@each_codec
def test_slots_keep_to_themselves(case):
    """Once the first tokens have chosen, NaN elsewhere changes nothing of a granule's numbers."""
    codec, arrays = codec_of(case)[0], choose(case, vectors())
    block = slice(16, 16 + max(8, codec.granule))
    spoilt = np.full_like(vectors(), np.nan)
    spoilt[:, :, block] = vectors()[:, :, block]
    clean, beside = (use(case, given, arrays)[2] for given in (vectors(), spoilt))
    np.testing.assert_array_equal(clean[:, :, block], beside[:, :, block])


@pytest.mark.parametrize("case", [KEYS[3], KEYS[5], KEYS[-4], VALUES[2]], ids=named)
def test_blocks_are_stored_as_the_whole_is(case):
    codec, arrays, given = codec_of(case)[0], choose(case, vectors()), jnp.asarray(vectors())

    @jax.jit(compiler_options=QUICK)
    def numbers(block, positions):
        return read_parts(codec.encode(block, positions=positions, arrays=arrays))

    whole = np.asarray(use(case, vectors())[2])
    for start in range(0, S, 16):
        block = slice(start, start + 16)
        piece = numbers(given[:, :, block], all_positions(given)[:, block])
        # Where rounding in the last bit breaks a tie, another code is stored.
        differ = np.abs(piece - whole[:, :, block]) > 1e-3 * np.abs(whole).max()
        assert differ.mean() < 2e-3


@each_codec
def test_zero_vectors(case):
    """They decode to zeros if nothing is taken off or it is their own mean, and never to NaN."""
    zeros = np.zeros((B, K, S, D), np.float32)
    ours, plain, numbers, _ = use(case, zeros)
    assert all(np.isfinite(array).all() for array in (ours, plain, numbers))
    if codec_of(case)[0].mean != "calibrated":
        np.testing.assert_allclose(plain, 0, atol=1e-6)
        np.testing.assert_allclose(ours, 0, atol=1e-6)


@each_codec
def test_the_layout_is_what_is_stored(case):
    """Shapes and dtypes for a cache before anything is stored, and bits counted from them."""
    codec, arrays = codec_of(case)
    parts, chosen = use(case, vectors())[3], choose(case, vectors())
    planned, chosen_planned = codec.layout(arrays, batch=B, num_slots=S)
    assert jax.tree.structure(planned) == jax.tree.structure(parts)
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(parts), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    for name, array in chosen_planned.items():
        assert array.shape == chosen[name].shape
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
    assert codec.bits_per_element(arrays) == 8 * nbytes / (B * K * S * D)


@each_codec
def test_slots_without_a_token_choose_nothing(case):
    """A mean or channels come from tokens alone: NaN at position -1 leaves them as they are."""
    positions = jnp.where(jnp.arange(S) < 48, all_positions(vectors()), -1)
    found = []
    for garbage in (3.0, np.nan):
        given = vectors()
        given[:, :, 48:] = garbage
        found.append(choose(case, given, positions))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("case", [case for case in KEYS + VALUES if case[2].get("mean") == "prompt"], ids=named)
def test_a_constant_costs_nothing_once_the_mean_is_taken_off(case):
    """With mean=prompt, one vector added to all of a head's leaves what is stored as it was."""
    given, constant = vectors(), jnp.asarray(8 * normal(1, K, 1, D, seed=4))
    constant = jnp.broadcast_to(constant, given.shape)
    if codec_of(case)[0].before_rope:
        constant = turned(SHAPE, constant)
    plain, moved = (use(case, one)[2] for one in (given, given + constant))
    differ = np.abs(moved - plain) > 1e-3 * np.abs(plain).max()
    assert differ.mean() < 0.01  # where rounding in the last bit breaks a tie, another code is stored


@pytest.mark.parametrize("name", CODECS.names())
def test_the_options_that_codecs_share_reach_the_pipeline(name):
    function, needed = CODECS.get(name), {"rank": 4} if name == "lowrank" else {}
    options = inspect.signature(function).parameters
    if "mean" in options:
        assert [function("values", mean=mean, **needed).mean for mean in MEANS] == list(MEANS)
    if "rope" in options:
        assert [function("keys", rope=rope, **needed).before_rope for rope in ("pre", "post")] == [True, False]
        assert not function("values", rope="pre", **needed).before_rope


def divergence(queries, keys, decoded):
    """Mean over queries of KL(exact || quantised) of the softmax over all keys, in float64."""
    exact, ours = (queries @ np.asarray(array, np.float64)[0, 0].T for array in (keys, decoded))
    logs = [logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) for logits in (exact, ours)]
    return np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=1))


@pytest.mark.parametrize("bands", ["slow", "all"])
def test_a_large_bias_of_the_keys_costs_nothing_before_rope(bands):
    """Keys with a bias of length 600 before RoPE, as Qwen2's have: taken off there, int4 does as without a bias.

    In the slowest bands alone, where trained biases lie, it hardly turns; in all bands its logits drown the others.
    """
    shape = shape_of(kv_heads=1, query_heads=1, theta=1e6)
    keys, bias = normal(1, 1, 512, 128), normal(128, seed=1)
    if bands == "slow":
        bias[:56] = bias[64:120] = 0
    bias = 600 * bias / np.linalg.norm(bias)
    plain, biased = turned(shape, keys), turned(shape, keys + bias)
    queries = normal(64, 128, seed=2).astype(np.float64)
    # Logits of a standard deviation of 2 for each query.
    queries *= 2 / np.std(queries @ np.asarray(biased, np.float64)[0, 0].T, axis=1, keepdims=True)
    statistics = statistics_of(shape, biased, queries=normal(1, 1, 512, 128, seed=3))

    def cost(given, **options):
        codec, arrays = fitted("int4", shape=shape, statistics=statistics, **options)
        return divergence(queries, given, stored(codec, arrays, given)[1])

    without = cost(plain)
    for mean in ("prompt", "calibrated"):
        assert cost(biased, rope="pre", mean=mean) < 2 * without
    assert cost(biased) > 100 * without
    assert cost(biased, rope="pre") > 100 * without
    if bands == "all":
        assert cost(biased, mean="prompt") > 100 * without


def test_arguments_that_all_share_are_checked():
    with pytest.raises(UserError, match=r"mean is prompts; it must be one of none, calibrated, prompt"):
        pipeline("keys", None, mean="prompts")
    with pytest.raises(UserError, match=r"rope is pree; it must be one of post, pre\. The nearest is pre"):
        pipeline("keys", None, rope="pree")
    assert [pipeline(role, None, rope="pre").before_rope for role in ("keys", "values")] == [True, False]
    assert MEANS[0] == pipeline("keys", None).mean == "none"


def test_what_a_model_cannot_give_is_refused():
    bare = ModelShape(num_layers=1, num_query_heads=2, num_kv_heads=1, head_size=8, dtype="float32", vocab_size=4)
    facts = LayerFacts(shape=bare, layer=0, role="keys")
    with pytest.raises(UserError, match="rope=pre needs a model that rotates its keys; use rope=post"):
        pipeline("keys", None, rope="pre").fit(facts)
    with pytest.raises(UserError, match=r"python -m kvjax\.calibrate"):
        pipeline("keys", None, mean="calibrated").fit(facts)
