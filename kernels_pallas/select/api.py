"""The public function of the operation, and the choice of its implementation."""

import functools

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, device_kind, on_each_device, spread, unspread
from kernels_pallas.select import mosaic_tpu, reference, triton_gpu

IMPLEMENTATIONS = ("mosaic_tpu", "triton_gpu", "reference")
"""Best first."""


def select(
    scores: Float[Array, "*rows S"],
    *,
    protected: Bool[Array, "*rows S"],
    recency: Int[Array, "*rows S"],
    budgets: Int[Array, "*rows"],
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Bool[Array, "*rows S"]:
    """The slots of each row that are kept: protected ones first, then by score, then the newest.

    Args:
      scores: float32, higher is kept. -inf is kept only if protected, even where there is room; NaN counts as the
        lowest finite score.
      protected: kept before all others, whatever their score.
      recency: int32, distinct within a row; of equal scores the higher is kept. Negative: an empty slot, never kept.
      budgets: int32, most slots that are kept; may be traced, so that one compilation serves every budget.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.
      mesh: over which the arrays lie: axis "data" has the last but one of the rows' axes (sequences), "model" the last
        (heads), each where it divides them. None for the device that JAX runs on; with several, None chooses what the
        compiler can spread itself.

    Returns:
      True where a slot is kept; at most `budgets` of a row. All implementations give the same.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the rows.
    """
    chosen = choose(scores.shape, implementation=implementation, mesh=mesh)
    known = {"mosaic_tpu": mosaic_tpu, "triton_gpu": triton_gpu, "reference": reference}
    function = functools.partial(_select, search=known[chosen.name].thresholds)
    with jax.named_scope("select"):
        mesh = None if chosen.name == "reference" else mesh
        spec = _spec(budgets.shape, mesh)
        arrays = scores, protected, recency, budgets
        return on_each_device(function, arrays, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)


def _select(
    scores: jax.Array, protected: jax.Array, recency: jax.Array, budgets: jax.Array, **how: object
) -> jax.Array:
    return reference.select(scores, protected=protected, recency=recency, budgets=budgets, **how)


def _spec(rows: tuple[int, ...], mesh: Mesh | None) -> PartitionSpec:
    """How rows lie over a mesh."""
    if len(rows) < 2:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (len(rows) - 2), *spread(mesh, *rows[-2:]))


def choose(shape: tuple[int, ...], *, implementation: str | None = None, mesh: Mesh | None = None) -> Choice:
    """What runs for scores `*rows S`: a question of shapes and devices alone.

    Args:
      shape: of the scores.
      implementation: the only one that may, or None.
      mesh: as for `select`.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the rows.
    """
    unsaid = unspread(mesh, implementation)
    return choose_for(shape, device_kind(mesh), implementation=implementation, spread=unsaid)


def choose_for(
    shape: tuple[int, ...], device: str, *, implementation: str | None = None, spread: str | None = None
) -> Choice:
    """The same for a kind of device that may not be there, e.g. "TPU v6 lite".

    Args:
      shape: of the scores.
      device: the kind.
      implementation: the only one that may, or None.
      spread: why kernels are out of the question wherever arrays lie, or None.
    """
    unsupported = {
        "mosaic_tpu": mosaic_tpu.unsupported(shape, device) or spread,
        "triton_gpu": triton_gpu.unsupported(shape, device) or spread,
        "reference": None,
    }
    return _dispatch.choose("select", unsupported, implementation=implementation)


def chosen_implementation(mesh: Mesh | None = None) -> str:
    """The name of what the automatic choice runs for rows of common length on a mesh."""
    return choose((1,), mesh=mesh).name
