"""Pages of a body, for selections that keep all tokens and choose what is read (Quest, arXiv 2406.10774).

    body       [ page | page | page | ... ]      `page` neighbouring slots each
    summary      lowest and highest number of each channel of the page's keys

For a query, sum_c max(q_c low_c, q_c high_c) is an upper bound of its product with every key of the page. The best
pages are read, with the newest one always; the exact segment is read in any case.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from kvjax import axes
from kvjax._kernels import Segment, select
from kvjax.compaction import index_of, take_numbers, write_rows
from kvjax.evidence import Evidence


def add_pages(
    state: Evidence | None, keys: Float[Array, "B K S D"], *, starts: Int[Array, "B"], due: Bool[Array, "B"]
) -> Evidence | None:
    """Evidence with the summaries of tokens that are appended to the body.

    Args:
      state: evidence; as it is where no pages are wanted.
      keys: of the tokens, whole pages.
      starts: slots of each row that are filled already.
      due: rows that get them.
    """
    if state is None or state.pages is None:
        return state
    size = state.selection.page
    grouped = keys.reshape(*keys.shape[:2], -1, size, keys.shape[3])

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return write_rows(old, new.astype(old.dtype), starts // size, due, axis=2)

    low, high = state.pages
    return dataclasses.replace(
        state, pages=(write(low, jnp.min(grouped, axis=3)), write(high, jnp.max(grouped, axis=3)))
    )


def page_bounds(
    queries: Float[Array, "B N D"], low: Float[Array, "B K pages D"], high: Float[Array, "B K pages D"]
) -> Float[Array, "B N pages"]:
    """Upper bounds of each query's product with the keys of each page."""
    batch, num_heads, size = queries.shape
    grouped = queries.astype(jnp.float32).reshape(batch, low.shape[1], -1, size)
    up, down = jnp.maximum(grouped, 0.0), jnp.minimum(grouped, 0.0)
    bounds = jnp.einsum("BKGD,BKpD->BKGp", up, high.astype(jnp.float32))
    bounds += jnp.einsum("BKGD,BKpD->BKGp", down, low.astype(jnp.float32))
    return bounds.reshape(batch, num_heads, -1)


def best_pages(
    segment: Segment, state: Evidence, queries: Float[Array, "B 1 N D"], *, count: int, mesh: Mesh | None = None
) -> Segment:
    """The part of a body that one token reads: `count` pages of each key/value head, where they are stored.

    Args:
      segment: the whole body.
      state: its evidence.
      queries: rotated, as keys before a codec's transform meet them.
      count: pages.
      mesh: over which the arrays lie, as in `Placement`.
    """
    size = state.selection.page
    low, high = state.pages
    heads, num_pages = low.shape[1], low.shape[2]
    if count >= num_pages:
        return segment
    bounds = page_bounds(queries[:, 0], low, high)
    by_head = jnp.max(bounds.reshape(bounds.shape[0], heads, -1, num_pages), axis=2)  # B K pages
    firsts = jnp.broadcast_to(segment.positions[:, :, ::size], by_head.shape)
    newest = (firsts >= 0) & (firsts == jnp.max(firsts, axis=2, keepdims=True))
    budgets = jnp.full(by_head.shape[:2], count, jnp.int32)
    chosen = select(by_head, protected=newest, recency=firsts, budgets=budgets, mesh=mesh)
    whole = 8 // math.gcd(8, size)  # pages fill bytes together, some of them perhaps none
    index = index_of(chosen, -(-count // whole) * whole)
    positions = jnp.broadcast_to(segment.positions, (*by_head.shape[:2], segment.positions.shape[2]))
    return dataclasses.replace(
        segment,
        positions=take_numbers(positions, index, unit=size, empty=axes.EMPTY),
        pages=index,
        page=size,
    )
