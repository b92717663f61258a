"""The definition of the operation in plain jax.numpy.

The k-th best is found without sorting: scores become unsigned integers of the same order, and the threshold that k of
them reach is built two bits at a time, from the highest. Among those that equal it, a second search finds the newest.

    float  bits s eeeeeeee mmm...      positive: set the sign bit        negative: flip all bits
    key    0          never kept: empty, or -inf and not protected
           2**32 - 1  protected

32 passes of comparing and counting cost a tenth of a sort on a CPU, vectorise on every chip, and give the same slots
everywhere, ties included. All rows go through them together: a caller with several layers stacks them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_PROTECTED = 0xFFFFFFFF  # above the key of +inf
_SIGN = -(2**31)


def thresholds(
    keys: UInt32[Array, "*rows S"], recency: Int[Array, "*rows S"], wanted: Int[Array, "*rows 1"]
) -> tuple[UInt32[Array, "*rows 1"], Int[Array, "*rows 1"]]:
    """What slots must surpass, or equal and be as new as.

    Args:
      keys: of the slots, 0 for those that are never kept.
      recency: of the slots; not negative where keys are not 0.
      wanted: slots of each row, at least 1.

    Returns:
      A key and an age: `wanted` slots, or all if there are fewer, have a higher key, or this one and at least this age.
    """
    best, exact = _reached_by(keys, wanted)

    def newest_of_ties() -> jax.Array:
        left = wanted - jnp.sum(keys > best, axis=-1, keepdims=True, dtype=jnp.int32)
        ages = jax.lax.bitcast_convert_type(jnp.where(keys == best, recency + 1, 0), jnp.uint32)
        return jax.lax.bitcast_convert_type(_reached_by(ages, left)[0], jnp.int32) - 1

    return best, jax.lax.cond(jnp.all(exact), lambda: jnp.zeros(wanted.shape, jnp.int32), newest_of_ties)


def by_signed(
    search: Callable[..., Any],
    keys: UInt32[Array, "*rows S"],
    recency: Int[Array, "*rows S"],
    wanted: Int[Array, "*rows 1"],
) -> tuple[UInt32[Array, "*rows 1"], Int[Array, "*rows 1"]]:
    """`thresholds` by a search of one axis of rows; its keys have a sign, and -2**31 is never kept."""
    *rows, _ = keys.shape
    signed = jax.lax.bitcast_convert_type(keys, jnp.int32) ^ jnp.int32(_SIGN)
    best, newest = search(*(array.reshape(-1, array.shape[-1]) for array in (signed, recency, wanted)))
    best = jax.lax.bitcast_convert_type(best ^ jnp.int32(_SIGN), jnp.uint32)
    return best.reshape(*rows, 1), newest.reshape(*rows, 1)


def select(
    scores: Float[Array, "*rows S"],
    *,
    protected: Bool[Array, "*rows S"],
    recency: Int[Array, "*rows S"],
    budgets: Int[Array, "*rows"],
    search: Callable[..., Any] = thresholds,
) -> Bool[Array, "*rows S"]:
    """See `api.select`; `search` is `thresholds`, or what gives the same."""
    recency = recency.astype(jnp.int32)
    keys = jnp.where(protected, jnp.uint32(_PROTECTED), ordered(scores))
    keys = jnp.where((recency >= 0) & (protected | ~(scores == -jnp.inf)), keys, jnp.uint32(0))
    best, newest = search(keys, recency, jnp.maximum(budgets, 1).astype(jnp.int32)[..., None])
    kept = (keys > best) | ((keys == best) & (recency >= newest))
    return kept & (keys > 0) & (budgets > 0)[..., None]


def ordered(scores: Float[Array, "*rows S"]) -> UInt32[Array, "*rows S"]:
    """Unsigned integers in the order of the floats; 0 and -0 are equal, and NaN is the lowest finite number."""
    scores = jnp.where(jnp.isnan(scores), jnp.finfo(jnp.float32).min, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == _SIGN, 0, bits)  # -0; that XLA takes x + 0.0 for x leaves it as it is
    flipped = jnp.where(bits < 0, ~bits, bits | jnp.int32(_SIGN))
    return jax.lax.bitcast_convert_type(flipped, jnp.uint32)


def _reached_by(
    keys: UInt32[Array, "*rows S"], wanted: Int[Array, "*rows 1"]
) -> tuple[UInt32[Array, "*rows 1"], Bool[Array, "*rows 1"]]:
    """A threshold that at least `wanted` keys reach, and where it is reached by no more.

    It is the largest one in rows where more reach it (keys that tie); 0 if there are fewer keys that are not 0.
    """

    def count(threshold: jax.Array) -> jax.Array:
        return jnp.sum(keys >= threshold, axis=-1, keepdims=True, dtype=jnp.int32)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        place, _, exact = carry
        return (place >= 0) & ~jnp.all(exact)

    def try_bits(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        place, threshold, exact = carry
        best = threshold
        for digit in (1, 2, 3):
            raised = threshold | jnp.left_shift(jnp.uint32(digit), place.astype(jnp.uint32))
            reached = count(raised)
            taken = (reached >= wanted) & ~exact
            best = jnp.where(taken, raised, best)
            exact |= taken & (reached == wanted)
        return place - 2, best, exact

    zero = jnp.zeros(wanted.shape, jnp.uint32)
    start = (jnp.int32(30), zero, count(jnp.ones_like(zero)) <= wanted)
    _, threshold, exact = jax.lax.while_loop(unfinished, try_bits, start)
    return threshold, exact
