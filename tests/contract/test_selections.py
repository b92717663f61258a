"""What holds for every selection, whatever its file: the list of them is the registry's, and none can opt out."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accounting import kept_positions, num_evicted
from kvjax.attention import attend, decode_layer
from kvjax.empty import abstract_cache
from kvjax.rounds import make_room
from kvjax.selection import SELECTIONS
from tests.contract.codecs import CODECS, model, random_tokens, statistics
from tests.contract.selections import ARGUMENTS, BUDGET, EXACT, PATTERN, ROUND, SINKS, WINDOW, policy_of
from tests.tiny import place

PROMPT, TOKENS, CHUNK = 48, 120, 8
QUOTA = BUDGET - SINKS - WINDOW


def test_every_selection_is_under_contract():
    assert set(ARGUMENTS) == set(SELECTIONS.names())


@dataclasses.dataclass(frozen=True)
class Story:
    """Rows of tokens through one policy in several ways; all share the compiled functions."""

    policy: str
    tokens: np.ndarray

    def tell(self, *, lengths=(PROMPT, 23), tokens=None, chunk=CHUNK, spoil=None, watch=None):
        """Logits after each later token, `B T V`, and the cache; row i has `lengths[i]` tokens of prompt."""
        tokens = self.tokens if tokens is None else tokens
        cache = kvjax.init_cache(model(), self.policy, batch=2, max_tokens=200, statistics=statistics())
        start = jnp.asarray(lengths, jnp.int32)
        _, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :PROMPT]), lengths=start)
        found = []
        for done in range(0, TOKENS - max(lengths), chunk):
            cache = cache if spoil is None else spoil(cache)
            piece = np.stack([row[n + done : n + done + chunk] for row, n in zip(tokens, lengths, strict=True)])
            logits, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(piece))
            found.append(np.asarray(logits))
            if watch is not None:
                watch(cache)
        return np.concatenate(found, axis=1), cache


class Watch:
    """Checks a cache after each call: positions, protections, budgets, and that what is gone stays gone."""

    def __init__(self, name, prompt):
        self.name, self.prompt, self.last, self.most = name, prompt, None, []

    def __call__(self, cache):
        layout = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)]
        seen = np.asarray(cache.num_seen)
        held = [kept_positions(cache, row=row) for row in range(2)]
        for row in range(2):
            for layer in held[row]:
                for head in layer:
                    assert len(set(head.tolist())) == len(head), "a position twice in one head"
                    assert head.min() >= 0
                    assert head.max() == seen[row] - 1
                    protected = {*range(min(SINKS, seen[row])), *range(max(seen[row] - WINDOW, 0), seen[row])}
                    assert protected <= set(head.tolist())
                self._check_budget(layer, seen[row])
        if self.last is not None:
            before, were_seen, old_layout = self.last
            assert layout == old_layout
            for row in range(2):
                for old, new in zip(before[row], held[row], strict=True):
                    for ours, theirs in zip(new, old, strict=True):
                        gone = set(range(were_seen[row])) - set(theirs.tolist())
                        assert not gone & set(ours.tolist()), "an evicted token came back"
        self.last = held, seen, layout

    def _check_budget(self, layer, seen):
        if self.name in ("quest", "duo"):
            return
        sizes = [len(head) for head in layer]
        self.most.append(sum(sizes) / len(sizes))
        # The ring holds up to W + U tokens; the body what the budget leaves.
        even = BUDGET + ROUND
        if self.name == "pyramidkv":
            even += QUOTA  # the first of two layers has nearly twice the body
        assert sum(sizes) <= even * len(sizes), (self.name, sizes, seen)
        if self.name not in ("adakv", "pyramidkv"):
            assert max(sizes) <= even


def spoil_empty_slots(cache):
    """NaN in all floats of slots without a token, arbitrary bytes where codes are."""

    def fill(array, empty):
        mask = np.broadcast_to(empty, array.shape[:3]).reshape(*array.shape[:3], *(1,) * (array.ndim - 3))
        return jnp.where(mask, jnp.asarray(jnp.nan, array.dtype), array)

    def layer(one):
        exact, body = one.exact, one.body
        empty = np.asarray(exact.positions < 0)[:, None]
        exact = dataclasses.replace(exact, keys=fill(exact.keys, empty), values=fill(exact.values, empty))
        empty_body = np.asarray(body.positions < 0)
        keys, values = (
            tuple(part.map_tokens(lambda array, *, axis, entries: fill(array, empty_body)) for part in parts)
            for parts in (body.keys, body.values)
        )
        state = dataclasses.replace(
            one.state,
            exact={name: fill(array, empty) for name, array in one.state.exact.items()},
            body={name: fill(array, empty_body) for name, array in one.state.body.items()},
        )
        return dataclasses.replace(
            one, exact=exact, body=dataclasses.replace(body, keys=keys, values=values), state=state
        )

    return dataclasses.replace(cache, layers=tuple(layer(one) for one in cache.layers))


# Norms of two tokens are so near each other that they must be rounded alike whatever the chunk: as users compile.
NEAR = {"knorm": pytest.mark.optimised}


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
@pytest.mark.parametrize("name", [pytest.param(name, marks=NEAR.get(name, ())) for name in ARGUMENTS])
def test_a_life_under_a_budget(name):
    """Positions, protections, budgets, empty slots, other rows, padding, chunks, one compilation, repetition."""
    story = Story(policy_of(name), random_tokens(2, 160))
    watch = Watch(name, PROMPT)
    plain, cache = story.tell(watch=watch)
    assert np.isfinite(plain).all()
    if name not in ("quest", "duo", "pyramidkv"):
        assert max(watch.most) > BUDGET  # between budget and budget + U
        assert min(watch.most[-8:]) >= BUDGET
        assert num_evicted(cache) > 0
    again, _ = story.tell()
    np.testing.assert_array_equal(plain, again, err_msg="another run")
    spoilt, _ = story.tell(spoil=spoil_empty_slots)
    np.testing.assert_array_equal(plain, spoilt, err_msg="NaN in empty slots")
    other = np.concatenate([story.tokens[:1], random_tokens(1, 160, seed=5)])
    beside, _ = story.tell(tokens=other, lengths=(PROMPT, 31))
    np.testing.assert_array_equal(plain[0], beside[0], err_msg="the row beside it, and its padding")
    kvjax.compressed_decode.clear_cache()
    single, singles = story.tell(chunk=1)
    assert kvjax.compressed_decode._cache_size() == 1  # rounds included, rows due at their own steps
    np.testing.assert_allclose(single, plain, rtol=0, atol=1e-4 * np.abs(plain).max(), err_msg="single tokens")
    for ours, theirs in zip(kept_positions(cache), kept_positions(singles), strict=True):
        for one, another in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, another)


@functools.cache
def uncompressed():
    """Logits of the same rows with the uncompressed cache."""
    return Story("full", random_tokens(2, 160)).tell()[0]


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_budget_that_covers_everything_gives_the_uncompressed_logits(name):
    """With room for all tokens, and the prompt pinned besides."""
    if name == "duo":  # its other heads never look back, whatever the budget
        policy = f"duo(pattern={PATTERN},sparsity=0.0)+prompt({PROMPT})+{EXACT}"
    else:
        # PyramidKV's last layers would have less; Quest has no budget of what it keeps.
        terms = ["layers(uniform)"] * (name == "pyramidkv") + [f"prompt({PROMPT})"] * (name != "quest")
        policy = policy_of(name, *terms, budget=200)
    whole, cache = Story(policy, random_tokens(2, 160)).tell()
    np.testing.assert_allclose(whole, uncompressed(), rtol=0, atol=1e-5 * np.abs(whole).max())
    assert num_evicted(cache) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
@pytest.mark.parametrize("policy", ["adakv(budget=42,queries=8)", "h2o(budget=42)+heads(adaptive)+prompt(24)", "duo"])
def test_a_pool_of_slots_attends_as_a_mask_over_all_tokens_would(policy):
    """What is evicted is as if masked: the first layer's attention over its pool, against plain attention in NumPy."""
    policy = policy_of("duo") if policy == "duo" else f"{policy}+exact(sinks=2,window=8,round=8)"
    tokens = random_tokens(2, 160)
    _, cache = Story(policy, tokens).tell(lengths=(48, 20))
    whole = kvjax.init_cache(model(), "full", batch=2, max_tokens=200)
    seen = np.asarray(cache.num_seen)
    _, whole = kvjax.prefill(model(), whole, jnp.asarray(tokens[:, : seen.max()]), lengths=jnp.asarray(seen))
    exact = whole.layers[0].exact
    keys, values = (np.asarray(array, np.float64) for array in (exact.keys, exact.values))
    queries = np.random.default_rng(3).normal(size=(2, 1, 4, 16)).astype(np.float32)
    read = jax.jit(functools.partial(attend, placement=cache.placement))
    found, _ = read(cache.layers[0], jnp.asarray(queries), positions=jnp.asarray(seen[:, None]))
    for row, head in np.ndindex(2, 4):
        held = kept_positions(cache, row=row)[0][head // 2]
        scores = keys[row, head // 2, held] @ queries[row, 0, head].astype(np.float64) / 4
        weights = np.exp(scores - scores.max())
        expected = weights @ values[row, head // 2, held] / weights.sum()
        np.testing.assert_allclose(found[row, 0, head], expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("let_go")
def test_planted_tokens_are_found_by_those_who_look_and_lost_by_chance():
    """Three tokens that carry the mass of all later queries survive forty rounds of `h2o`, and none of `random`."""
    shape = model().cache_shape

    def survivors(policy):
        text = f"{policy}(budget=26)+exact(sinks=2,window=8,round=8)"
        cache = kvjax.init_cache(model(), text, batch=1, max_tokens=1000)
        generator = np.random.default_rng(0)
        needles, direction = (10, 23, 41), generator.normal(size=16)

        @jax.jit
        def step(cache, keys, queries):
            cache = make_room(cache, jnp.ones((1,), bool))
            position = cache.num_seen[:, None]
            kernel = jnp.zeros((4, 16, 8))
            layer = dict(keys=keys, values=keys, positions=position, output=kernel, placement=cache.placement)
            layers = tuple(decode_layer(one, queries, **layer)[1] for one in cache.layers)
            return dataclasses.replace(cache, layers=layers, num_seen=cache.num_seen + 1)

        for index in range(360):
            key = generator.normal(size=(1, 1, 2, 16)) * 0.3
            key = key + direction * (3.0 if index in needles else 0.0)
            query = np.broadcast_to(direction, (1, 1, 4, 16))
            cache = step(cache, jnp.asarray(key, jnp.float32), jnp.asarray(query, jnp.float32))
        assert shape.num_kv_heads == 2
        return [len(set(needles) & set(head.tolist())) for layer in kept_positions(cache) for head in layer]

    assert survivors("h2o") == [3] * 4
    assert sum(survivors("random")) < 6


PAIRS = [
    (name, codec)
    for shift in (0, 5)
    for name, codec in zip(ARGUMENTS, itertools.islice(itertools.cycle(CODECS), shift, None), strict=False)
]


@pytest.mark.parametrize(("name", "codec"), PAIRS)
def test_any_selection_takes_any_codec_or_says_why_not(name, codec):
    """A prompt and a step are traced: shapes fit, the cache's layout stays; each codec meets several selections."""
    text = policy_of(name, codec).replace("round=8", "round=16").replace("page=8", "page=16")
    joins = any(word in codec for word in ("heads=2", "int8(mean=prompt,rope=pre)", "bits=4,rope=pre"))
    if SELECTIONS.get(name).heads == "adaptive" and joins:
        with pytest.raises(kvjax.UserError, match=r"heads\(adaptive\)"):
            kvjax.parse_policy(text)
        return
    policy = kvjax.parse_policy(text)
    sizes = {"batch": 2, "max_tokens": 200, "statistics": statistics()}
    cache = abstract_cache(model().cache_shape, policy=policy, **sizes)
    prompt, token = (jax.ShapeDtypeStruct((2, count), jnp.int32) for count in (PROMPT, 1))
    _, filled = jax.eval_shape(kvjax.prefill.__wrapped__, model(), cache, prompt)
    logits, after = jax.eval_shape(kvjax.compressed_decode.__wrapped__, model(), filled, token)
    assert logits.shape == (2, 1, 64)
    layouts = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) for one in (cache, filled, after)]
    assert layouts[0] == layouts[1] == layouts[2]


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
@pytest.mark.parametrize("policy", ["snapkv(budget=42,queries=8)+int4", "h2o(budget=42)+heads(adaptive)"])
def test_a_mesh_keeps_what_one_device_keeps(policy):
    """Rows over two devices and heads over two: the same tokens, the same logits, ties and pools included."""
    tokens = random_tokens(2, 96)
    ours = place(model(), kvjax.make_mesh(data=2, model=2))
    found, kept = [], []
    for one in (model(), ours):
        text = f"{policy}+{EXACT}"
        cache = kvjax.init_cache(one, text, batch=2, max_tokens=200, statistics=statistics())
        first, cache = kvjax.prefill(one, cache, jnp.asarray(tokens[:, :PROMPT]))
        rest, cache = kvjax.compressed_decode(one, cache, jnp.asarray(tokens[:, PROMPT:]))
        found.append(np.concatenate([np.asarray(first)[:, None], np.asarray(rest)], axis=1))
        kept.append([head.tolist() for row in range(2) for layer in kept_positions(cache, row=row) for head in layer])
    assert kept[0] == kept[1]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-5 * np.abs(found[0]).max())
