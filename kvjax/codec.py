"""Codecs: how a kept key or value is stored. A codec is a pipeline of stages, and every published one is a point in it.

    key or value  x   B K S D
      1 undo RoPE           keys only, where asked for; they are turned again when they are read
      2 take off a mean     per head, calibrated or of the first tokens stored
      3 linear transform    rotation, principal components, choice of channels      kvjax/stages/linear.py
      4 quantise and pack   codes, scales, offsets                                   kvjax/stages/quantise.py

Stages 2 and 3 are undone on the query and on the output, once a step, never on the stored tokens:

    q . x = (q A) . y + q . mean              sum w x = (sum w y) A^T + (sum w) mean

A codec is static and hashable; the arrays that it needs are of two kinds. *Fitted* ones are made before decoding, from
statistics of the model, and have no batch axis. *Chosen* ones are settled by the first tokens of a row that are stored,
and then stay.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kvjax import axes
from kvjax._kernels import Parts, Rotated, StoredKeys, read_parts
from kvjax.errors import UserError, check_choice
from kvjax.registry import Registry
from kvjax.rope import turns_at, unrotate
from kvjax.stages.facts import Arrays, LayerFacts
from kvjax.stages.linear import Linear, backward, forward, transform_queries
from kvjax.stages.quantise import Exact, Quantiser

CODECS: Registry = Registry("codec", package="kvjax.codecs")
"""Name -> function of role and arguments that gives a `Codec`; see `kvjax/codecs/`."""

MEANS = ("none", "calibrated", "prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSizes:
    """Tokens that stay in the model's dtype.

    Attributes:
      sinks: P, the first tokens of a sequence.
      window: W, the newest tokens that are exact at least.
      round: U, tokens that move to the body together; up to U more than W are exact.
    """

    sinks: int = 4
    window: int = 128
    round: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    """How keys, or values, of one layer are stored.

    Attributes:
      role: "keys" or "values".
      quantiser: stage 4; None stores the model's dtype.
      linear: stage 3, or None.
      mean: stage 2, one of `MEANS`: what is taken off.
      before_rope: stage 1, whether keys are stored as they were before RoPE.
      exact: the exact segment that suits it, where a policy says nothing.
      shape: of the model; settled by `fit`.
    """

    role: str
    quantiser: Quantiser | None = None
    linear: Linear | None = None
    mean: str = "none"
    before_rope: bool = False
    exact: ExactSizes = ExactSizes()
    shape: Any = None

    @property
    def granule(self) -> int:
        """Neighbouring slots that share one unit: 1 for codecs that work token by token."""
        return 1 if self.quantiser is None else self.quantiser.granule

    @property
    def stored_heads(self) -> int:
        """Neighbouring heads whose numbers are stored as one."""
        return 1 if self.linear is None else self.linear.heads

    @property
    def mixes_heads(self) -> bool:
        """Whether a stored slot can only be read by one who knows which head it is."""
        turned = self.before_rope and (self.linear is not None or self.mean != "none")
        return self.stored_heads > 1 or turned

    def fit(self, facts: LayerFacts, *, device: jax.Device | None = None) -> tuple["Codec", Arrays]:
        """The codec for one layer and device, with its fitted arrays.

        Raises:
          UserError: the model does not suit it, or it needs statistics and there are none.
        """
        shape, arrays, linear = facts.shape, {}, self.linear
        if self.before_rope and shape.rope is None:
            raise UserError("rope=pre needs a model that rotates its keys; use rope=post.")
        facts = dataclasses.replace(facts, before_rope=self.before_rope, centred=self.mean != "none")
        if self.mean == "calibrated":
            arrays["mean"] = facts.moments.mean.astype(np.float32)  # K D
        if linear is not None:
            linear, more = linear.fit(facts)
            arrays |= more
        quantiser = Exact(shape.dtype) if self.quantiser is None else self.quantiser.settle(shape.head_size, device)
        return dataclasses.replace(self, linear=linear, quantiser=quantiser, shape=shape), arrays

    def choose(
        self,
        vectors: Float[Array, "B K S D"],
        *,
        positions: Int[Array, "B S"],
        queries: Float[Array, "B T N D"] | None,
        arrays: Arrays,
    ) -> Arrays:
        """What the first stored tokens settle: a mean, channels. Arrays start `B K`.

        Args:
          vectors: keys or values of the tokens.
          positions: theirs; -1 does not count.
          queries: the prompt's last queries, zeros where there are fewer; None if there was no prompt.
          arrays: the fitted ones.
        """
        chosen: Arrays = {}
        vectors, valid = self._plain(vectors, positions), positions >= 0
        if self.mean == "prompt":
            counted = jnp.where(valid[:, None, :, None], vectors, 0.0)
            chosen["mean"] = (
                jnp.sum(counted, axis=2) / jnp.maximum(jnp.sum(valid, axis=1), 1).astype(jnp.float32)[:, None, None]
            )
        if self.linear is not None:
            centred = self._centre(vectors, {**arrays, **chosen})
            chosen |= self.linear.choose(centred, valid, queries)
        return chosen

    def encode(
        self,
        vectors: Float[Array, "B K S D"],
        *,
        positions: Int[Array, "B S"],
        arrays: Arrays,
        mesh: Mesh | None = None,
    ) -> Parts:
        """Stores vectors; S is a multiple of the granule and of 8; `mesh` is where they live, as in `Placement`."""
        numbers = self._centre(self._plain(vectors, positions), arrays)
        if self.linear is None:
            return self.quantiser.encode(numbers, mesh=mesh)
        matrix = self.linear.matrix(arrays)
        if self.linear.heads > 1:
            return self.quantiser.encode(forward(numbers, matrix, heads=self.linear.heads), mesh=mesh)
        return self.quantiser.encode(numbers, matrix, mesh=mesh)

    def decode(self, parts: Parts, *, positions: Int[Array, "B #K S"], arrays: Arrays) -> Float[Array, "B K S D"]:
        """What the stored parts stand for; attention never needs it, selections do."""
        if self.before_rope:
            return read_parts(self.readable(parts, arrays), positions)
        numbers = self.quantiser.collapse(read_parts(parts))
        if self.linear is not None:
            numbers = backward(numbers, self.linear.matrix(arrays), heads=self.linear.heads)
        mean = _mean_of(arrays)
        return numbers if mean is None else numbers + mean[:, :, None]

    def stored(
        self, parts: Parts, *, positions: Int[Array, "B #K S"], owners: Int[Array, "B 1 S"] | None, arrays: Arrays
    ) -> StoredKeys:
        """Keys as `encode` stored them, or a pool's with their owners, and all that it takes to read them."""
        basis, mean = (None, None) if self.before_rope else (self._basis(parts, arrays), _mean_of(arrays))
        return StoredKeys(
            parts=self.readable(parts, arrays),
            positions=positions,
            num_kv_heads=self.shape.num_kv_heads,
            basis=basis,
            mean=mean if mean is None or mean.shape[0] > 1 else mean[0],
            owners=owners,
        )

    def _basis(self, parts: Parts, arrays: Arrays) -> jax.Array | None:
        """What takes stored numbers back to vectors, transposed: `... D R`; None for nothing."""
        stored = jnp.eye(sum(part.planes[0].shape[3] for part in parts), dtype=jnp.float32)
        collapsed = self.quantiser.collapse(stored)
        matrix = None if self.linear is None else jnp.asarray(self.linear.matrix(arrays), jnp.float32)
        if collapsed is stored:
            return matrix
        return collapsed.T if matrix is None else jnp.matmul(matrix, collapsed.T, precision=jax.lax.Precision.HIGHEST)

    def readable(self, parts: Parts, arrays: Arrays) -> Parts:
        """The parts as attention reads them."""
        if not self.before_rope:
            return parts
        rope = self.shape.rope
        basis = None
        if self.linear is not None:
            matrix = jnp.asarray(self.linear.matrix(arrays), jnp.float32)
            if matrix.ndim == 2:
                matrix = jnp.broadcast_to(matrix, (self.shape.num_kv_heads, *matrix.shape))
            basis = jnp.swapaxes(matrix, -1, -2)
        frequencies = tuple(rope.frequencies().tolist())
        factor = rope.attention_factor()
        return (Rotated(parts=parts, basis=basis, mean=arrays.get("mean"), frequencies=frequencies, factor=factor),)

    def prepare_query(self, queries: axes.Queries, arrays: Arrays) -> tuple[jax.Array, jax.Array | None]:
        """Queries `B T N R` as the stored keys want them, and what is added to each query's products, or None."""
        if self.before_rope:
            return queries, None
        mean, bias = _mean_of(arrays), None
        if mean is not None:
            bias = transform_queries(queries, mean[..., None], num_kv_heads=self.shape.num_kv_heads)[..., 0]
        if self.linear is not None:
            matrix = self.linear.matrix(arrays)
            queries = transform_queries(queries, matrix, num_kv_heads=self.shape.num_kv_heads)
        return self.quantiser.expand_queries(queries), bias

    def finish_output(self, output: jax.Array, weight: jax.Array, arrays: Arrays) -> Float[Array, "B T N D"]:
        """Weighted sums of stored values, `B T N R`, to sums of values; `weight` is the sum of the weights."""
        output = self.quantiser.collapse(output)
        num_kv_heads = self.shape.num_kv_heads
        if self.linear is not None:
            matrix = self.linear.matrix(arrays)
            output = transform_queries(output, matrix, transposed=True, num_kv_heads=num_kv_heads)
        mean = _mean_of(arrays)
        if mean is None:
            return output
        by_head = jnp.repeat(mean, output.shape[2] // num_kv_heads, axis=1)  # B|1 N D
        return output + weight[..., None] * by_head[:, None]

    def layout(self, fitted: Arrays, *, batch: int, num_slots: int) -> tuple[Parts, Arrays]:
        """Shapes of what `encode` and `choose` return for that many slots; of a fitted codec."""
        shape = self.shape
        heads = (batch, shape.num_kv_heads, num_slots, shape.head_size)
        window = (batch, 1, shape.num_query_heads, shape.head_size)
        vectors, queries = (jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in (heads, window))
        positions = jax.ShapeDtypeStruct((batch, num_slots), jnp.int32)

        def store(vectors: jax.Array, queries: jax.Array, positions: jax.Array, fitted: Arrays) -> tuple:
            chosen = self.choose(vectors, positions=positions, queries=queries, arrays=fitted)
            return self.encode(vectors, positions=positions, arrays={**fitted, **chosen}), chosen

        return jax.eval_shape(store, vectors, queries, positions, fitted)

    def bits_per_element(self, fitted: Arrays) -> float:
        """Stored bits per number of the uncompressed vectors, every scale and offset counted; of a fitted codec."""
        slots = 128 * self.granule
        parts, _ = self.layout(fitted, batch=1, num_slots=slots)
        bits = sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(parts))
        return bits / (self.shape.num_kv_heads * slots * self.shape.head_size)

    def _plain(self, vectors: jax.Array, positions: jax.Array) -> jax.Array:
        """The vectors in float32, taken back to before RoPE where they are stored so."""
        wide = vectors.astype(jnp.float32)
        if not self.before_rope:
            return wide
        turns = turns_at(self.shape.rope, positions)  # B S 1 D/2
        return jnp.swapaxes(unrotate(jnp.swapaxes(wide, 1, 2), turns), 1, 2)

    def _centre(self, vectors: jax.Array, arrays: Arrays) -> jax.Array:
        mean = _mean_of(arrays)
        return vectors if mean is None else vectors - mean[:, :, None]


def _mean_of(arrays: Arrays) -> jax.Array | None:
    """The mean as `B|1 K D`."""
    mean = arrays.get("mean")
    if mean is None:
        return None
    wide = jnp.asarray(mean, jnp.float32)
    return wide[None] if wide.ndim == 2 else wide


def pipeline(
    role: str,
    quantiser: Quantiser | None,
    linear: Linear | None = None,
    *,
    mean: str = "none",
    rope: str = "post",
    exact: ExactSizes = ExactSizes(),
) -> Codec:
    """A codec of these stages; the arguments `mean` and `rope` that most codecs share are checked here.

    Args:
      role: "keys" or "values".
      quantiser: stage 4, None for the model's dtype.
      linear: stage 3, or None.
      mean: one of `MEANS`.
      rope: "post" stores keys as they are cached, "pre" as they were before RoPE; for values it means nothing.
      exact: the exact segment that suits the codec.

    Raises:
      UserError: an argument is not one of its choices.
    """
    check_choice("mean", mean, MEANS)
    check_choice("rope", rope, ("post", "pre"))
    before_rope = rope == "pre" and role == "keys"
    return Codec(role=role, quantiser=quantiser, linear=linear, mean=mean, before_rope=before_rope, exact=exact)
