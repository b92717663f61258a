"""The public function of the operation, and the choice of its implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, device_kind, on_each_device, spread, unspread
from kernels_pallas.decode_attention.api import attention_mass
from kernels_pallas.score import mosaic_tpu, reference, triton_gpu
from kernels_pallas.score.reference import StoredKeys

IMPLEMENTATIONS = ("mosaic_tpu", "triton_gpu", "reference")
"""Best first."""


def score(
    keys: StoredKeys,
    *,
    rows: Float[Array, "B N D"] | None = None,
    weights: Float[Array, "#B N half"] | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B N S"]:
    """What each query head thinks of each stored key: a product with a row, and the weighted lengths of its bands.

        score[n, s] = rows[n] . x[k, s]  +  sum_f weights[n, f] sqrt(x[k, s, f]^2 + x[k, s, f + D/2]^2)

    x is the key that is stored in slot s of head k = n // (N / K). Codes are read once, for both terms and all G heads.
    TriAttention (arXiv 2604.04921) is such a score; rows alone give the logits of queries, unscaled.

    Args:
      keys: as they are stored.
      rows: `B N D` float32, for keys as attention sees them; None leaves the first term out.
      weights: `B N D/2` float32, or `1 N D/2` for all sequences; None leaves the second term out.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.
      mesh: over which the arrays lie: axis "data" has sequences, "model" heads, each where it divides them. None for
        the device that JAX runs on; with several, None chooses what the compiler can spread itself.

    Returns:
      float32; 0 in empty slots. A kernel's lengths are within 5e-3 of the reference's: it has A in 16 bits.

    Raises:
      ValueError: rows and weights are both None, or the implementation is unknown or cannot serve this.
    """
    if rows is None and weights is None:
        raise ValueError("score wants rows, or weights, or both.")
    num_heads = (weights if rows is None else rows).shape[1]
    chosen = choose(keys, num_heads, implementation=implementation, mesh=mesh)
    with jax.named_scope("score"):
        if chosen.name == "reference":
            return reference.score(keys, rows=rows, weights=weights)
        return _over_mesh(chosen.name, keys, rows, weights, mesh)


def window_mass(
    pieces: tuple[StoredKeys, ...],
    queries: Float[Array, "B T N D"],
    *,
    query_positions: Int[Array, "B T"],
    scale: float,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B K S"], ...]:
    """What the attention of some queries comes to, over keys as they are stored: what SnapKV and TOVA keep by.

        mass[k, s] = sum over t, mean over the heads n of k, of softmax_s(scale queries[t, n] . x[k, s])

    The softmax is over all pieces, of what a query's position lets it see. See `decode_attention.attention_mass`.

    Args:
      pieces: the keys, piece by piece along S.
      queries: as they meet keys.
      query_positions: int32; -1 is no query.
      scale: D**-0.5.
      implementation: one of `decode_attention`'s; None chooses the best for each piece.
      mesh: as for `score`.

    Returns:
      Of each piece; 0 where a head has no key.

    Raises:
      ValueError: the implementation is unknown or cannot serve a piece.
    """
    segments = tuple(keys.asked(queries) for keys in pieces)
    given = {"query_positions": query_positions, "scale": scale, "implementation": implementation, "mesh": mesh}
    found = attention_mass(segments, **given)
    return tuple(jnp.where(keys.held(), one, 0.0) for keys, one in zip(pieces, found, strict=True))


def _over_mesh(
    name: str, keys: StoredKeys, rows: Any, weights: Any, mesh: Mesh | None, interpret: Any = False
) -> jax.Array:
    """A kernel, on each device for what that has."""
    run = functools.partial(triton_gpu.score, interpret=interpret)
    if name == "mosaic_tpu":
        run = functools.partial(mosaic_tpu.score, device=device_kind(mesh), interpret=interpret)
    batch, heads = spread(mesh, keys.positions.shape[0], keys.parts[0].num_heads)
    parts = 1 if heads is None else mesh.shape[heads]

    def on_one(fields: dict[str, Any], rows: Any, weights: Any) -> jax.Array:
        return run(StoredKeys(**fields, num_kv_heads=keys.num_kv_heads // parts), rows, weights)

    def of_rows(array: jax.Array) -> PartitionSpec:
        """Of `B ... ...`, either of length 1 where all share it."""
        return PartitionSpec(batch if array.shape[0] > 1 else None, heads if array.shape[1] > 1 else None)

    def of_heads(array: Any, ndim: int) -> Any:
        """Of an array that has no batch axis if it has so many axes, and none of heads if it has fewer."""
        if array is None:
            return None
        return (
            PartitionSpec(batch, heads) if array.ndim > ndim else PartitionSpec(heads if array.ndim == ndim else None)
        )

    fields = {name: getattr(keys, name) for name in ("parts", "positions", "basis", "mean", "owners")}
    specs = {name: jax.tree.map(of_rows, fields[name]) for name in ("parts", "positions", "owners")}
    specs |= {"basis": of_heads(keys.basis, 3), "mean": of_heads(keys.mean, 2)}
    in_specs = specs, jax.tree.map(of_rows, rows), jax.tree.map(of_rows, weights)
    out_specs = PartitionSpec(batch, heads)
    return on_each_device(on_one, (fields, rows, weights), mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def choose(keys: StoredKeys, num_heads: int, *, implementation: str | None = None, mesh: Mesh | None = None) -> Choice:
    """What scores keys: a question of shapes, dtypes and devices alone.

    Args:
      keys: arrays, or their shapes.
      num_heads: N.
      implementation: the only one that may, or None.
      mesh: as for `score`.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the keys.
    """
    spread = unspread(mesh, implementation)
    return choose_for(keys, num_heads, device_kind(mesh), implementation=implementation, spread=spread)


def choose_for(
    keys: StoredKeys, num_heads: int, device: str, *, implementation: str | None = None, spread: str | None = None
) -> Choice:
    """The same for a kind of device that may not be there, e.g. "TPU v6 lite".

    Args:
      keys: arrays, or their shapes.
      num_heads: N.
      device: the kind.
      implementation: the only one that may, or None.
      spread: why kernels are out of the question wherever arrays lie, or None.
    """
    reasons = {
        "mosaic_tpu": mosaic_tpu.unsupported(keys, num_heads, device) or spread,
        "triton_gpu": triton_gpu.unsupported(keys, num_heads, device) or spread,
        "reference": None,
    }
    return _dispatch.choose("score", reasons, implementation=implementation)


def chosen_implementation(mesh: Mesh | None = None) -> str:
    """The name of what the automatic choice runs for many slots of bfloat16 on a mesh."""
    positions = jax.ShapeDtypeStruct((1, 1, 4096), jnp.int32)
    keys = StoredKeys.of_array(jax.ShapeDtypeStruct((1, 8, 4096, 128), jnp.bfloat16), positions)
    return choose(keys, 32, mesh=mesh).name
