"""Tiny random models that tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.sharding import Placement
from kvjax.symbols import SYMBOLS
from models.hf_config import parse_config
from models.save import save_checkpoint

SYMBOL_VOCABULARY = 384
"""Bytes, special tokens, symbols, and a few that are left over."""


@functools.cache
def tiny_config(*, num_query_heads=4, num_kv_heads=2, layers=2, vocab_size=64, width=32, feed_forward=64):
    """A small Qwen3-type config; weights of standard deviation 0.3 make its attention far from flat."""
    fields = {
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": num_query_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return parse_config(fields, source="tests")


@functools.cache
def tiny_model(**kwargs):
    """A model of `tiny_config`, on one device."""
    return models.randomise(models.Transformer(tiny_config(**kwargs)), jax.random.key(0), std=0.3)


@functools.cache
def sharp_model(**kwargs):
    """A model of one layer whose queries look at a few tokens each, as those of models that were trained do."""
    model = models.randomise(models.Transformer(tiny_config(layers=1, **kwargs)), jax.random.key(0), std=0.3)
    norm = model.layers[0].attention.query_norm
    norm.scale = norm.scale.replace(norm.scale[...] * 4)
    return model


def place(model, mesh):
    """The same model on a mesh."""
    placement = Placement(mesh)
    placed = models.Transformer(model.config, placement=placement)
    graph, state = nnx.split(placed)
    values = [
        (path, variable.replace(placement.put(variable[...], variable.axes)))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    ]
    return nnx.merge(graph, nnx.from_flat_state(values))


@jax.jit
def _padded_pass(model, tokens, positions):
    hidden, _ = model(tokens, positions=positions)
    return model.logits(hidden)[0]


def whole_pass(model, tokens):
    """Logits of every position in one pass without a cache, `T V`; padded so that few shapes compile."""
    length = len(tokens)
    padded = np.zeros((1, -(-length // 64) * 64), np.int32)
    padded[0, :length] = tokens
    positions = np.where(np.arange(padded.shape[1]) < length, np.arange(padded.shape[1]), -1)[None]
    return np.asarray(_padded_pass(model, jnp.asarray(padded), jnp.asarray(positions)))[:length]


def write_checkpoint(folder, *, symbols=SYMBOLS):
    """A checkpoint of one random layer, exact in float32, whose tokens are bytes and symbols; gives its model."""
    model = tiny_model(layers=1, vocab_size=SYMBOL_VOCABULARY)
    save_checkpoint(model, folder, dtype="float32")
    write_byte_tokenizer(folder, vocab_size=SYMBOL_VOCABULARY, max_positions=512, symbols=symbols)
    return model
