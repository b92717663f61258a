"""Eviction: what a selection looks at, and which tokens compete for the body, in one place for all selections.

    view        [ sinks | body | U tokens that move | W newest ]           or a whole prompt
    candidates          [ body | U tokens that move ]                      what the body may hold after this round
    order       pinned prompt, then protected values, then score, then the newest      (kvjax/keeping.py)

Candidates are kept in units: neighbouring slots that share a codec's scales, 1 for codecs that work token by token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import axes
from kvjax._kernels import StoredKeys, select
from kvjax.cache import LayerCache, PromptTokens
from kvjax.compaction import seen_body, spread_heads
from kvjax.evidence import last_queries
from kvjax.policy import BodyPlan, Policy
from kvjax.selection import View
from kvjax.sharding import Placement


@functools.partial(jax.tree_util.register_dataclass, data_fields=("num_seen", "num_pinned"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of the rows of a batch beside what a layer holds.

    Attributes:
      num_seen: `B` int32.
      num_pinned: `B` int32.
    """

    num_seen: Any
    num_pinned: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("keys", "values", "positions", "numbers"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """Tokens that leave the exact segment together.

    Attributes:
      keys: `B K U D`, rotated.
      values: `B K U D`.
      positions: `B U`; -1 in rows where no round is due.
      numbers: evidence of these tokens, name -> `B K U`.
    """

    keys: Any
    values: Any
    positions: Any
    numbers: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("view", "protected", "preferred", "totals"),
    meta_fields=("start", "count", "plan", "policy"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """A view, and the part of it from which the body is filled.

    Attributes:
      view: of the layer.
      start: the first candidate's slot in the view.
      count: candidates.
      protected: `B K count`, the pinned prompt: kept before all others.
      totals: `B K` int32, candidates that a head keeps at most (an even share of the pool).
      plan: sizes of the body.
      policy: the cache's.
      preferred: `B K count`, kept before all but these (`protect(...)`), or None.
    """

    view: View
    start: int
    count: int
    protected: Any
    totals: Any
    plan: BodyPlan
    policy: Policy
    preferred: Any = None

    def cut(self, array: jax.Array) -> jax.Array:
        """The candidates' part of an array `B K S ...`."""
        return array[:, :, self.start : self.start + self.count]


def round_candidates(layer: LayerCache, moved: Moved, newest: Moved, *, row: Row, placement: Placement) -> Candidates:
    """The candidates of a round.

    Args:
      layer: its ring is full in the rows that are due.
      moved: the U oldest tokens of the ring.
      newest: the W others, which stay exact.
      row: counts of the batch's rows.
      placement: where arrays live.
    """
    exact, state, shape = layer.exact, layer.state, layer.site.shape
    stored, values, positions, numbers = seen_body(layer.body, state, shape)
    sinks = exact.num_sinks

    def spread(array: jax.Array) -> jax.Array:
        return spread_heads(array, shape.num_kv_heads)

    def join(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate([array.astype(jnp.float32) for array in arrays], axis=2)

    all_positions = jnp.concatenate(
        [spread(exact.positions[:, :sinks]), positions, spread(moved.positions), spread(newest.positions)], axis=2
    )
    gathered = {
        name: join(state.exact[name][:, :, :sinks], numbers[name], moved.numbers[name], newest.numbers[name])
        for name in numbers
    }
    # What lies in empty slots is masked where keys and values are joined, which copies them anyway.
    held = (positions >= 0)[..., None]
    first = StoredKeys.of_array(exact.keys[:, :, :sinks], exact.positions[:, None, :sinks])
    last = (StoredKeys.of_array(tokens.keys, tokens.positions[:, None]) for tokens in (moved, newest))
    return _candidates(
        keys=join(exact.keys[:, :, :sinks], jnp.where(held, stored.read(), 0.0), moved.keys, newest.keys),
        stored=tuple(piece for piece in (first, stored, *last) if piece.positions.shape[2]),
        values=join(exact.values[:, :, :sinks], jnp.where(held, values, 0.0), moved.values, newest.values),
        positions=all_positions,
        numbers=gathered,
        start=sinks,
        candidate_positions=jnp.concatenate([positions, spread(moved.positions)], axis=2),
        layer=layer,
        row=row,
        placement=placement,
    )


def prompt_candidates(
    layer: LayerCache,
    prompt: PromptTokens,
    positions: Int[Array, "B S"],
    *,
    row: Row,
    placement: Placement,
) -> Candidates:
    """The candidates of a whole prompt.

    Args:
      layer: empty but for its evidence.
      prompt: its tokens, uncompressed.
      positions: of the candidates, those after the sinks that the exact segment will not hold; -1 for others.
      row: counts of the batch's rows, the prompt seen.
      placement: where arrays live.
    """
    heads = layer.site.shape.num_kv_heads
    held = (prompt.positions >= 0)[:, None, :, None]
    return _candidates(
        keys=jnp.where(held, prompt.keys, 0.0).astype(jnp.float32),
        stored=(StoredKeys.of_array(prompt.keys, prompt.positions[:, None]),),
        values=jnp.where(held, prompt.values, 0.0).astype(jnp.float32),
        positions=spread_heads(prompt.positions, heads),
        numbers=prompt.numbers,
        start=layer.exact.num_sinks,
        candidate_positions=spread_heads(positions, heads),
        layer=layer,
        row=row,
        placement=placement,
    )


def _candidates(
    *,
    keys: jax.Array,
    stored: tuple[StoredKeys, ...],
    values: jax.Array,
    positions: jax.Array,
    numbers: dict[str, jax.Array],
    start: int,
    candidate_positions: jax.Array,
    layer: LayerCache,
    row: Row,
    placement: Placement,
) -> Candidates:
    """The view, with what is protected taken out of what may go."""
    state, policy, plan = layer.state, layer.site.policy, layer.site.plan
    held = candidate_positions >= 0
    count = candidate_positions.shape[2]
    pinned = held & (candidate_positions < row.num_pinned[:, None, None])
    preferred = None
    if policy.outliers:
        norms = jnp.linalg.norm(values[:, :, start : start + count], axis=3)
        most = jnp.full(held.shape[:2], round(policy.outliers * plan.quota), jnp.int32)
        recency = jnp.where(held & ~pinned, candidate_positions, axes.EMPTY)
        none = jnp.zeros_like(held)
        preferred = select(norms, protected=none, recency=recency, budgets=most, mesh=placement.mesh)
    inside = policy.prompt is not None and policy.prompt.inside
    num_pinned = units_of(pinned, plan.unit, jnp.any).sum(axis=2, dtype=jnp.int32) * plan.unit
    totals = plan.quota + (jnp.zeros_like(num_pinned) if inside else num_pinned)
    taken = pinned if preferred is None else pinned | preferred
    scorable = jnp.zeros(positions.shape, jnp.bool_).at[:, :, start : start + count].set(held & ~taken)
    queries = query_positions = None
    if state.queries is not None:
        queries, query_positions = last_queries(state)
    view = View(
        keys=keys,
        stored=stored,
        values=values,
        positions=positions,
        scorable=scorable,
        num_seen=row.num_seen,
        quotas=totals - jnp.sum(taken, axis=2, dtype=jnp.int32),
        numbers=numbers,
        queries=queries,
        query_positions=query_positions,
        moments=state.moments,
        arrays=state.arrays,
        shape=layer.site.shape,
        placement=placement,
    )
    sizes = {"start": start, "count": count, "plan": plan, "policy": policy}
    return Candidates(view=view, protected=pinned, preferred=preferred, totals=totals, **sizes)


def units_of(array: jax.Array, unit: int, reduce: Any) -> jax.Array:
    """`B K S` reduced over units of neighbouring slots."""
    return array if unit == 1 else reduce(array.reshape(*array.shape[:2], -1, unit), axis=3)


def agree(scores: dict[int, jax.Array], layers: tuple[LayerCache, ...]) -> dict[int, jax.Array]:
    """Scores by layer, made one where the selection has layers, or all heads, agree on one set of tokens.

    The same heads of all layers agree on their mean; all heads of all layers on their maximum.
    """
    if not scores:
        return scores
    shares = layers[next(iter(scores))].state.selection.shares
    if shares == "none":
        return scores
    stacked = jnp.stack(list(scores.values()))  # L B K S
    one = jnp.mean(stacked, axis=0) if shares == "layers" else jnp.max(stacked, axis=(0, 2))[:, None]
    one = jnp.broadcast_to(one, stacked.shape[1:])
    return dict.fromkeys(scores, one)
