"""The definition of the operation in plain jax.numpy, and its path on CPUs.

x = y A^T + mean                                  what is stored, y `B k S R`, and the keys `B K S D`
row . x = (row A) . y + row . mean                so the first term needs no key, only what is stored
length[f] = sqrt(x[f]^2 + x[f + D/2]^2)           of the pair of numbers that RoPE turns together
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.coded import Coded, Parts, Rotated, read_parts
from kernels_pallas.decode_attention.reference import Segment


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("parts", "positions", "basis", "mean", "owners"),
    meta_fields=("num_kv_heads",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredKeys:
    """Keys of some slots as they are stored, and how they are turned back.

    Attributes:
      parts: of `B k S R`, k a divisor of K: neighbouring heads may share what is stored.
      positions: `B K S` int32, or `B 1 S` where all heads hold the same tokens; -1 is an empty slot, of which nothing
        matters, NaN included.
      num_kv_heads: K.
      basis: A, `D R`, `K D R` or `B K D R`; None where keys are stored as they are.
      mean: added after that, `K D` or `B K D`; None for nothing.
      owners: `B 1 S` int32 where heads share one pool of slots (k is then 1): the head that alone has a slot. None
        where each head has slots of its own.
    """

    parts: Parts
    positions: Any
    num_kv_heads: int
    basis: Any = None
    mean: Any = None
    owners: Any = None

    @classmethod
    def of_array(cls, keys: Any, positions: Any) -> "StoredKeys":
        """Plain keys."""
        return cls(parts=(Coded(planes=(keys,)),), positions=positions, num_kv_heads=keys.shape[1])

    @property
    def turned(self) -> bool:
        """Whether keys are from before RoPE, and turned when they are read."""
        return any(isinstance(part, Rotated) for part in self.parts)

    def held(self) -> Bool[Array, "B #K S"]:
        """Which slots of each head hold a key."""
        held = self.positions >= 0
        if self.owners is None:
            return held
        heads = jnp.arange(self.num_kv_heads, dtype=jnp.int32)[None, :, None]
        return held & (self.owners == heads)

    def read(self) -> Float[Array, "B K S D"]:
        """The keys in float32; anything in empty slots."""
        keys = self.back(read_parts(self.parts, self.positions))
        return jnp.repeat(keys, self.num_kv_heads // keys.shape[1], axis=1)

    def back(self, numbers: Float[Array, "B k S R"]) -> Float[Array, "B _ S D"]:
        """Keys of what is stored, of k heads if these are the same for all that share it, or of K."""
        if self.basis is not None and self.basis.ndim == 2:
            numbers = jnp.matmul(numbers, self.basis.T, precision=jax.lax.Precision.HIGHEST)
        elif self.basis is not None:
            repeated = jnp.repeat(numbers, self.num_kv_heads // numbers.shape[1], axis=1)
            columns = jnp.broadcast_to(self.basis, (numbers.shape[0], *self.basis.shape[-3:]))
            numbers = jnp.einsum("BKSR,BKDR->BKSD", repeated, columns, precision=jax.lax.Precision.HIGHEST)
        if self.mean is None:
            return numbers
        numbers = jnp.repeat(numbers, self.num_kv_heads // numbers.shape[1], axis=1)
        return numbers + (self.mean if self.mean.ndim == 3 else self.mean[None])[:, :, None]

    def segment(self, queries: Any, bias: Any = None) -> Segment:
        """What attention reads of them, without values; queries are as what is stored wants them."""
        return Segment(
            queries=queries,
            keys=self.parts,
            values=(),
            positions=self.positions,
            bias=bias,
            owners=self.owners,
            num_kv_heads=self.num_kv_heads,
        )

    def asked(self, queries: Float[Array, "B T N D"]) -> Segment:
        """The same for queries as they meet the keys themselves."""
        batch, tokens, heads, size = queries.shape
        stored, bias = self.for_stored(jnp.swapaxes(queries, 1, 2).reshape(batch, heads * tokens, size))

        def by_token(array: jax.Array) -> jax.Array:
            return jnp.swapaxes(array.reshape(batch, heads, tokens, *array.shape[2:]), 1, 2)

        return self.segment(by_token(stored), None if bias is None else by_token(bias))

    def for_stored(self, rows: Float[Array, "B N D"]) -> tuple[Float[Array, "B N R"], Float[Array, "B N"] | None]:
        """Rows as what is stored wants them, and what is added to their products."""
        grouped = by_head(rows, self.num_kv_heads)
        bias = None
        if self.mean is not None:
            mean = jnp.broadcast_to(self.mean, (rows.shape[0], *self.mean.shape[-2:]))
            bias = jnp.einsum("BKGD,BKD->BKG", grouped, mean, precision=jax.lax.Precision.HIGHEST)
            bias = bias.reshape(rows.shape[:2])
        if self.basis is None:
            return rows, bias
        basis = self.basis if self.basis.ndim > 2 else self.basis[None]
        columns = jnp.broadcast_to(basis, (rows.shape[0], self.num_kv_heads, *basis.shape[-2:]))
        turned = jnp.einsum("BKGD,BKDR->BKGR", grouped, columns, precision=jax.lax.Precision.HIGHEST)
        return turned.reshape(*rows.shape[:2], -1), bias


def score(
    keys: StoredKeys, *, rows: Float[Array, "B N D"] | None, weights: Float[Array, "#B N half"] | None
) -> Float[Array, "B N S"]:
    """See `api.score`."""
    numbers = read_parts(keys.parts, keys.positions)  # B k S R
    scores = jnp.zeros((), jnp.float32)
    if rows is not None:
        stored, bias = keys.for_stored(rows)
        scores = jnp.einsum("BkQR,BkSR->BkQS", by_head(stored, numbers.shape[1]), numbers)
        scores = scores.reshape(*rows.shape[:2], numbers.shape[2])
        scores = scores if bias is None else scores + bias[..., None]
    if weights is not None:
        lengths = lengths_of(keys.back(numbers))  # B _ S half
        grouped = by_head(jnp.broadcast_to(weights, (numbers.shape[0], *weights.shape[1:])), lengths.shape[1])
        found = jnp.einsum("BKGf,BKSf->BKGS", grouped, lengths)
        scores = scores + found.reshape(found.shape[0], weights.shape[1], found.shape[3])
    num_heads = (weights if rows is None else rows).shape[1]
    held = keys.held()
    return jnp.where(jnp.repeat(held, num_heads // held.shape[1], axis=1), scores, 0.0)


def by_head(array: Float[Array, "B N ..."], heads: int) -> Float[Array, "B k G ..."]:
    """Query heads by the head that they share."""
    return array.reshape(array.shape[0], heads, -1, *array.shape[2:])


def lengths_of(keys: Float[Array, "B K S D"]) -> Float[Array, "B K S half"]:
    """Lengths of all bands."""
    first, second = jnp.split(keys, 2, axis=-1)
    squares = first**2 + second**2
    return squares * jax.lax.rsqrt(squares + 1e-30)  # a third of the time of a square root on CPUs
