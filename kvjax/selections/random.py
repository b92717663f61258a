"""Random eviction, the null hypothesis (arXiv 2609.03430): a selection that does not beat it has shown nothing.

In every round all candidates draw anew, each key/value head for itself, so that a token's chance to stay falls with the
rounds that it has met. A draw depends on the seed, the layer, the head, the token's position and the tokens seen, never
on the row: a row alone is evicted as it is in any batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from kvjax.errors import check_between
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Selection):
    """Keeps tokens at random.

    Attributes:
      seed: of the draws.
    """

    seed: int = 0

    def __post_init__(self):
        check_between("random(seed)", self.seed, 0, 2**32 - 1)

    def score(self, view: View) -> Scores:
        """Uniform in [0, 1)."""
        heads = jnp.arange(view.positions.shape[1], dtype=jnp.uint32)[None, :, None]
        mixed = _mix(view.positions.astype(jnp.uint32) ^ _mix(heads + np.uint32(1 + (self.layer << 12))))
        mixed = _mix(mixed ^ _mix(view.num_seen.astype(jnp.uint32)[:, None, None] + np.uint32(self.seed)))
        return _to_unit(mixed)


def _mix(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: every input bit changes every output bit half of the time."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _to_unit(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.convert_element_type(bits >> 8, jnp.float32) * np.float32(2.0**-24)


SELECTIONS.register("random", Random)
