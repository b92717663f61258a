"""Logits against Hugging Face transformers, for one tiny random model of each family and RoPE kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
import models
from kvjax.empty import empty_cache

NAMES = [
    "llama2",
    "llama31",
    "llama32_tied",
    "llama_biased",
    "mistral",
    "qwen2",
    "qwen3",
    "yarn",
    "yarn_mscale",
]
PROMPT, STEPS = 300, 32
TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order give about 1e-6


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, golden):
    """A model and transformers' arrays for it."""
    folder = golden / "transformers" / request.param
    return models.load_model(folder, dtype="float32"), dict(np.load(folder / "logits.npz"))


def assert_logits_close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def test_logits_of_one_pass_equal_transformers(checkpoint):
    model, arrays = checkpoint
    tokens = jnp.asarray(arrays["tokens"][None, :PROMPT])
    positions = jnp.arange(PROMPT)[None]
    hidden, _ = jax.jit(type(model).__call__)(model, tokens, positions=positions)
    assert_logits_close(np.asarray(model.logits(hidden))[0], arrays["prompt_logits"])


def test_prefill_of_any_length_equals_transformers(checkpoint):
    """One batch of prompts of 1, 2, 17, 128 and 300 tokens."""
    model, arrays = checkpoint
    lengths = np.asarray([1, 2, 17, 128, PROMPT], np.int32)
    tokens = jnp.asarray(np.tile(arrays["tokens"][:PROMPT], (len(lengths), 1)))
    cache = kvjax.init_cache(model, "full", batch=len(lengths), max_tokens=PROMPT)
    logits, _ = kvjax.prefill(model, cache, tokens, lengths=jnp.asarray(lengths))
    assert_logits_close(np.asarray(logits), arrays["prompt_logits"][lengths - 1])


def test_decode_steps_equal_transformers(checkpoint):
    """32 steps, one token at a time, after a prompt of 300."""
    model, arrays = checkpoint
    tokens = jnp.asarray(arrays["tokens"][None])
    cache = kvjax.init_cache(model, "full", batch=1, max_tokens=PROMPT + STEPS)
    _, cache = kvjax.prefill(model, cache, tokens[:, :PROMPT])
    rows = []
    for step in range(PROMPT, PROMPT + STEPS):
        logits, cache = kvjax.compressed_decode(model, cache, tokens[:, step : step + 1])
        rows.append(np.asarray(logits)[0, 0])
    assert_logits_close(np.stack(rows), arrays["step_logits"])


def test_a_token_outside_the_vocabulary_gives_nan(golden):
    model = models.load_model(golden / "transformers" / "llama2", dtype="float32")
    cache = kvjax.init_cache(model, batch=3, max_tokens=4)
    logits, _ = kvjax.prefill(model, cache, jnp.asarray([[1, 2], [1, 99], [1, -1]]))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1:]).all()


def test_bfloat16_runs_in_bfloat16(golden):
    model = models.load_model(golden / "transformers" / "qwen3")
    assert model.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    cache = empty_cache(model.cache_shape, policy=kvjax.Policy(), batch=1, max_tokens=8)
    assert cache.layers[0].exact.keys.dtype == jnp.bfloat16
    logits, _ = kvjax.prefill(model, cache, jnp.asarray([[1, 2, 3]]))
    assert logits.dtype == jnp.float32
