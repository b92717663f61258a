"""Totals of all weights, written out, and masses compared with the reference's."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.coded import read_parts
from kernels_pallas.decode_attention import reference


def totals_of(segment, query_positions):
    """What the weights of all slots come to, from probabilities written out."""
    width, heads = segment.queries.shape[3], segment.queries.shape[2]
    group = heads // segment.keys[0].num_heads
    keys = np.repeat(np.nan_to_num(np.asarray(read_parts(segment.keys))), group, axis=1)
    scores = np.einsum("btnr,bnsr->bnts", np.asarray(segment.queries, np.float32), keys) * width**-0.5
    if segment.bias is not None:
        scores = scores + np.swapaxes(np.asarray(segment.bias), 1, 2)[..., None] * width**-0.5
    positions = np.asarray(segment.positions)[:, :, None]
    visible = (positions >= 0) & (positions <= np.asarray(query_positions)[:, None, :, None])
    visible = np.repeat(visible, heads // visible.shape[1], axis=1)
    if segment.owners is not None:
        own = np.repeat(np.arange(segment.num_kv_heads), heads // segment.num_kv_heads)
        visible &= np.asarray(segment.owners)[:, 0, None, None] == own[None, :, None, None]
    scores = np.where(visible, scores, -1e30)
    maximum = scores.max(axis=-1)
    total = np.where(visible, np.exp(scores - maximum[..., None]), 0.0).sum(axis=-1)
    as_floats = (jnp.asarray(one, jnp.float32) for one in (maximum, total, visible.sum(axis=-1)))
    return reference.Totals(*as_floats)


def assert_near(ours, theirs, tolerance, kind):
    """The same within a tolerance of the largest mass."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    # A share near 1 / seen may fall on either side, and is then off by one head's.
    off = ~(np.abs(ours - theirs) <= tolerance * np.abs(theirs).max())
    assert off.mean() <= (5e-3 if kind == "low" else 0), (kind, off.mean())
