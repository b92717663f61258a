"""The definition of the operation in plain jax.numpy.

The k-th best is found without sorting: scores become unsigned integers of the same order, and the threshold that k of
them reach is built two bits at a time, from the highest. Among those that equal it, a second search finds the newest.

    float  bits s eeeeeeee mmm...      positive: set the sign bit        negative: flip all bits

32 passes of comparing and counting cost a tenth of a sort on a CPU, vectorise on every chip, and give the same slots
everywhere, ties included. All rows go through them together: a caller with several layers stacks them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_PROTECTED = 0xFFFFFFFF  # above the key of +inf
_SIGN = -(2**31)


def select(
    scores: Float[Array, "*rows S"],
    *,
    protected: Bool[Array, "*rows S"],
    recency: Int[Array, "*rows S"],
    budgets: Int[Array, "*rows"],
) -> Bool[Array, "*rows S"]:
    """See `api.select`."""
    scores = jnp.where(jnp.isnan(scores), jnp.finfo(jnp.float32).min, scores.astype(jnp.float32))
    candidate = (recency >= 0) & (protected | (scores > -jnp.inf))
    keys = jnp.where(protected, jnp.uint32(_PROTECTED), ordered(scores))
    wanted = budgets[..., None]
    threshold, exact = _reached_by(keys, candidate, wanted)
    reached = candidate & (keys >= threshold)

    def without_older_ties() -> jax.Array:
        better, equal = candidate & (keys > threshold), candidate & (keys == threshold)
        left = wanted - jnp.sum(better, axis=-1, keepdims=True, dtype=jnp.int32)
        ages = jax.lax.bitcast_convert_type(recency.astype(jnp.int32), jnp.uint32)
        return better | (equal & (ages >= _reached_by(ages, equal, left)[0]))

    kept = jax.lax.cond(jnp.all(exact), lambda: reached, without_older_ties)
    return jnp.where(wanted > 0, kept, False)


def ordered(scores: Float[Array, "*rows S"]) -> UInt32[Array, "*rows S"]:
    """Unsigned integers in the order of the floats; 0 and -0 are equal."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == _SIGN, 0, bits)  # -0; that XLA takes x + 0.0 for x leaves it as it is
    flipped = jnp.where(bits < 0, ~bits, bits | jnp.int32(_SIGN))
    return jax.lax.bitcast_convert_type(flipped, jnp.uint32)


def _reached_by(
    keys: UInt32[Array, "*rows S"], candidate: Bool[Array, "*rows S"], wanted: Int[Array, "*rows 1"]
) -> tuple[UInt32[Array, "*rows 1"], Bool[Array, "*rows 1"]]:
    """A threshold that at least `wanted` candidates reach, and where it is reached by no more.

    It is the largest one in rows where more reach it (candidates that tie); 0 if there are fewer candidates.
    """

    def count(threshold: jax.Array) -> jax.Array:
        return jnp.sum(candidate & (keys >= threshold), axis=-1, keepdims=True, dtype=jnp.int32)

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
    start = (jnp.int32(30), zero, count(zero) <= wanted)
    _, threshold, exact = jax.lax.while_loop(unfinished, try_bits, start)
    return threshold, exact
