"""Keys as they are stored, rows and weights, and the score written out in float64."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.score import StoredKeys
from tests.kernels_pallas.decode_attention.parts import made, of_floats


def rotation(*shape, seed=0):
    """Orthogonal matrices `... D D`."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(np.linalg.qr(numbers)[0], jnp.float32)


def given(make_keys, *, basis=None, mean=None, heads=None, stored=2, group=4, size=32, slots=512, pool=False, **more):
    """Keys of which a tenth of the slots is empty, NaN where that can be; rows `B N D` and weights `1 N D/2`.

    What makes keys is a function as in `parts.py`. Of a pool, or where heads share what is stored, there are `heads`.
    """
    segment, _ = made(make_keys, of_floats("float32"), stored=stored, group=1, size=size, slots=slots, **more)
    heads, generator = heads or stored, np.random.default_rng(7)
    batch, num_heads = segment.positions.shape[0], heads * group
    owners = jnp.asarray(generator.integers(0, heads, (batch, 1, slots)), jnp.int32) if pool else None
    keys = StoredKeys(
        parts=segment.keys,
        positions=segment.positions,
        num_kv_heads=heads,
        basis=basis,
        mean=None if mean is None else jnp.asarray(generator.normal(size=mean), jnp.float32),
        owners=owners,
    )
    width = size if basis is None else basis.shape[-2]
    rows = jnp.asarray(generator.normal(size=(batch, num_heads, width)), jnp.float32)
    weights = jnp.asarray(generator.uniform(0, 2, size=(1, num_heads, width // 2)), jnp.float32)
    return keys, rows, weights


def written_out(keys, rows, weights):
    """The score of every query head and slot, a key at a time."""
    numbers = [np.asarray(part.read(keys.positions), np.float64) for part in keys.parts]
    numbers, heads = np.nan_to_num(np.concatenate(numbers, axis=3)), keys.num_kv_heads
    batch, stored, slots, _ = numbers.shape
    group = (weights if rows is None else rows).shape[1] // heads
    found = np.zeros((batch, heads * group, slots))
    for row, head, slot in np.ndindex(batch, heads, slots):
        own = head if keys.positions.shape[1] > 1 else 0
        if keys.positions[row, own, slot] < 0 or (keys.owners is not None and keys.owners[row, 0, slot] != head):
            continue
        key = numbers[row, head * stored // heads, slot]
        if keys.basis is not None:
            key = key @ np.asarray(_of(keys.basis, row, head, 2), np.float64).T
        if keys.mean is not None:
            key = key + np.asarray(_of(keys.mean, row, head, 1), np.float64)
        lengths = np.abs(key[: len(key) // 2] + 1j * key[len(key) // 2 :])
        for query in range(head * group, head * group + group):
            if rows is not None:
                found[row, query, slot] += np.asarray(rows[row, query], np.float64) @ key
            if weights is not None:
                found[row, query, slot] += np.asarray(weights[row % len(weights), query], np.float64) @ lengths
    return found


def _of(array, row, head, ndim):
    """What belongs to a head of a sequence, of an array that has axes for these or not."""
    array = array if array.ndim == ndim else array[..., head, :] if ndim == 1 else array[..., head, :, :]
    return array if array.ndim == ndim else array[row]


def assert_close(ours, theirs, tolerance):
    """Within a part of the largest score."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
