"""Decoding for ever: thousands of steps under a budget, in constant memory, with one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accounting import held_tokens, kept_positions, num_evicted, num_rounds
from kvjax.decoder import read_statistics
from kvjax.empty import abstract_cache
from kvjax.timing import run_steps
from models import load_model
from tests.conftest import ROOT
from tests.contract.codecs import model, random_tokens, statistics

pytestmark = pytest.mark.optimised


def live(cache):
    return [(leaf.shape, leaf.dtype, leaf.unsafe_buffer_pointer()) for leaf in jax.tree.leaves(cache.layers)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streaming", "triattention", "h2o", "adakv"])
def test_sinks_and_prompt_survive_ten_thousand_steps(policy):
    """More than a thousand rounds, a token at a time: constant buffers, one compilation, absolute positions."""
    text = f"{policy}(budget=42)+prompt(20)+exact(sinks=2,window=8,round=8)"
    cache = kvjax.init_cache(model(), text, batch=1, max_tokens=20_000, statistics=statistics())
    _, cache = kvjax.prefill(model(), cache, jnp.asarray(random_tokens(1, 20)))
    run_steps.clear_cache()
    cache = run_steps(model(), cache, jnp.int32(100))
    before = live(cache)
    for _ in range(10):
        cache = run_steps(model(), cache, jnp.int32(1000))
        sizes = [len(head) for layer in kept_positions(cache) for head in layer]
        assert sum(sizes) <= len(sizes) * (42 + 8 + 18)
    assert run_steps._cache_size() == 1
    assert live(cache) == before
    seen = 20 + 100 + 10_000
    assert int(cache.num_seen[0]) == seen
    for layer in kept_positions(cache):
        for head in layer:
            assert set(range(20)) <= set(head.tolist())
            assert set(range(seen - 8, seen)) <= set(head.tolist())
            assert len(set(head.tolist())) == len(head)
    assert num_rounds(cache) == -(-(seen - 18) // 8)
    assert num_evicted(cache) == int((seen - held_tokens(cache)).sum())


def test_a_prompt_in_chunks_is_evicted_while_it_is_read():
    """Never more than budget and round beside what is pinned; the pinned tokens stay; two rows of their own lengths."""
    text = "streaming(budget=26)+prompt(20)+exact(sinks=2,window=8,round=8)"
    cache = kvjax.init_cache(model(), text, batch=2, max_tokens=500)
    cache = kvjax.pin_prompt(cache, jnp.asarray([20, 7], jnp.int32))
    tokens = random_tokens(2, 120)
    for start in range(0, 120, 24):
        lengths = jnp.asarray([24, max(min(24, 80 - start), 0)], jnp.int32)
        piece = jnp.asarray(tokens[:, start : start + 24])
        _, cache = kvjax.compressed_decode(model(), cache, piece, lengths=lengths)
        for row, pinned in enumerate((20, 7)):
            held = kept_positions(cache, row=row)[0][0]
            assert len(held) <= 26 + 8 + pinned - 2
    for row, (pinned, seen) in enumerate(((20, 120), (7, 80))):
        for layer in kept_positions(cache, row=row):
            for head in layer:
                newest = [position for position in head.tolist() if position >= pinned]
                assert set(range(pinned)) <= set(head.tolist())
                assert newest == list(range(seen - len(newest), seen))


def test_what_cannot_be_pinned_is_refused_or_nan():
    text = "streaming(budget=26)+{}+exact(sinks=2,window=8,round=8)"
    tokens = jnp.asarray(random_tokens(2, 24))
    lengths = jnp.asarray([24, 20], jnp.int32)
    for term, most in (("prompt(20)", 20), ("prompt(inside)", 18)):
        cache = kvjax.init_cache(model(), text.format(term), batch=2, max_tokens=500)
        logits, _ = kvjax.prefill(model(), cache, tokens, lengths=lengths)
        np.testing.assert_array_equal(np.isnan(np.asarray(logits)).all(axis=1), np.asarray([24, 20]) > most)
        cache = kvjax.init_cache(model(), text.format(term), batch=2, max_tokens=500)
        with pytest.raises(kvjax.UserError, match=f"24 tokens is longer than what .* can pin: {most}"):
            kvjax.pin_prompt(cache, lengths)
    with pytest.raises(kvjax.UserError, match="Prompt 0 has 24 tokens, and the policy .* can pin 20: give prompt"):
        kvjax.generate(model(), [tokens[0].tolist()], max_new_tokens=2, policy=text.format("prompt(20)"))
    with pytest.raises(kvjax.UserError, match="pins no prompts"):
        kvjax.pin_prompt(kvjax.init_cache(model(), "full", batch=2, max_tokens=50), lengths)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["h2o(budget=512)", "snapkv(budget=512)"])
def test_a_long_prompt_lays_out_no_square(policy, record_property):
    """8,192 tokens of prompt, the model in the tree: one T x T matrix of its heads would be 1,074 MB."""
    ours = load_model(ROOT / "models" / "tiny", dtype="float32")
    cache = abstract_cache(ours.cache_shape, policy=kvjax.parse_policy(policy), batch=1, max_tokens=8200)
    prompt = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    memory = kvjax.prefill.lower(ours, cache, prompt).compile().memory_analysis()
    record_property("print", f"prefill of 8,192 tokens, {policy}: {memory.temp_size_in_bytes:,} bytes of temporaries")
    assert memory.temp_size_in_bytes <= 180e6


@pytest.mark.long
def test_a_hundred_thousand_tokens_at_a_budget_of_256(record_property):
    """The model in the tree, token by token: logits stay finite, memory and compilations do not grow."""
    folder = ROOT / "models" / "tiny"
    ours = load_model(folder, dtype="float32")
    cache = kvjax.init_cache(
        ours, "triattention(budget=256)", batch=1, max_tokens=100_100, statistics=read_statistics(None, folder, ours)
    )
    _, cache = kvjax.prefill(ours, cache, jnp.asarray([list(b"KING RICHARD:")], jnp.int32))
    cache = run_steps(ours, cache, jnp.int32(1000))
    before = live(cache)
    for _ in range(99):
        cache = run_steps(ours, cache, jnp.int32(1000))
    assert live(cache) == before
    assert run_steps._cache_size() == 1
    logits, cache = kvjax.compressed_decode(ours, cache, jnp.zeros((1, 1), jnp.int32))
    assert np.isfinite(np.asarray(logits)).all()
    assert held_tokens(cache).max() <= 256 + 128
    record_property("print", f"100,000 tokens at a budget of 256: {kvjax.device_bytes(cache):,} bytes throughout")
