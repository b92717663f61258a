"""What is kept of the candidates, the same for every selection: pinned ones first, then those that a term or the method
itself favours, then by score, then the newest.

A codec whose neighbouring slots share scales keeps or drops them together: a unit's score is the mean of its tokens',
it is pinned if one of them is, and favoured by the method if half of them are. Heads that share their storage keep the
same tokens. With `heads(adaptive)` the scores of a layer's heads compete for one budget.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax import axes
from kvjax._kernels import select
from kvjax.eviction import Candidates, units_of
from kvjax.selection import Scores


@dataclasses.dataclass(frozen=True)
class _Request:
    """What `select` takes, of one layer: `B K units` and budgets `B K`."""

    scores: Any
    protected: Any
    recency: Any
    budgets: Any


def kept_units(candidates: list[Candidates], scores: list[jax.Array]) -> list[jax.Array]:
    """The units `B K units` that each layer keeps of its candidates, from scores `B K S` of its whole view."""
    requests = [_request(one, layer_scores) for one, layer_scores in zip(candidates, scores, strict=True)]
    mesh = candidates[0].view.placement.mesh if candidates else None
    if not requests or not candidates[0].plan.pooled:
        return _select_all(requests, mesh)
    return _select_pooled(candidates, requests, mesh)


def _request(candidates: Candidates, scores: Scores) -> _Request:
    """Scores, protections and ages of a layer's units."""
    unit, cut = candidates.plan.unit, candidates.cut
    stored_heads = math.lcm(*(codec.stored_heads for codec in candidates.policy.all_codecs))
    first = _first(candidates, scores)
    held = cut(candidates.view.positions) >= 0
    held &= cut(candidates.view.scorable) | candidates.protected | _or_none(candidates.preferred, held)
    scores = jnp.where(held, cut(scores), 0.0)
    if unit > 1:
        scores = units_of(scores, unit, jnp.sum) / jnp.maximum(units_of(held, unit, jnp.sum), 1).astype(jnp.float32)
    # Above every finite score and below what is pinned; what is never to be kept stays so.
    scores = jnp.where(first & (scores > -jnp.inf), jnp.inf, scores)
    recency = units_of(jnp.where(held, cut(candidates.view.positions), axes.EMPTY), unit, jnp.max)
    protected = units_of(candidates.protected, unit, jnp.any)
    budgets = candidates.totals // unit
    if stored_heads > 1:
        scores, protected = _agree(scores, stored_heads, jnp.max), _agree(protected, stored_heads, jnp.any)
        budgets = _agree(budgets, stored_heads, jnp.max)
    return _Request(scores, protected, recency, budgets)


def _first(candidates: Candidates, scores: Scores) -> jax.Array:
    """Units that are kept first of those that are not pinned: by the policy's term, or by the method's own rule."""
    unit = candidates.plan.unit
    favoured = candidates.policy.selection.favoured(candidates.view, scores)
    none = jnp.zeros(candidates.protected.shape, jnp.bool_)
    wanted = none if favoured is None else candidates.cut(favoured & candidates.view.scorable)
    by_method = wanted if unit == 1 else units_of(wanted, unit, jnp.sum) * 2 >= unit
    return by_method | units_of(_or_none(candidates.preferred, none), unit, jnp.any)


def _or_none(array: jax.Array | None, like: jax.Array) -> jax.Array:
    """The array, or all False."""
    return jnp.zeros(like.shape, jnp.bool_) if array is None else array


def _agree(array: jax.Array, heads: int, reduce: Any) -> jax.Array:
    """One value for neighbouring heads, `B K ...`."""
    grouped = array.reshape(array.shape[0], -1, heads, *array.shape[2:])
    return jnp.repeat(reduce(grouped, axis=2), heads, axis=1)


def _select_all(requests: list[_Request], mesh: Mesh | None) -> list[jax.Array]:
    """`select` for every layer, those of one shape together: each of its passes has a price of its own."""
    kept: dict[int, jax.Array] = {}
    for shape in {request.scores.shape for request in requests}:
        same = [index for index, request in enumerate(requests) if request.scores.shape == shape]

        def stack(name: str, same: list[int] = same) -> jax.Array:
            return jnp.stack([getattr(requests[index], name) for index in same])

        scores, protected, recency, budgets = map(stack, ("scores", "protected", "recency", "budgets"))
        found = select(scores, protected=protected, recency=recency, budgets=budgets, mesh=mesh)
        kept |= {index: found[place] for place, index in enumerate(same)}
    return [kept[index] for index in range(len(requests))]


def _select_pooled(candidates: list[Candidates], requests: list[_Request], mesh: Mesh | None) -> list[jax.Array]:
    """Scores compete across the heads of a layer; each head's best are safe up to a floor."""

    def with_floor(one: Candidates, request: _Request) -> _Request:
        pinned = request.budgets - one.plan.quota // one.plan.unit
        return dataclasses.replace(
            request, budgets=pinned + int(one.policy.heads.floor * one.plan.quota) // one.plan.unit
        )

    def flat(one: Candidates, request: _Request, safe: jax.Array) -> _Request:
        batch, heads, count = request.scores.shape
        # Of equal scores the newest token is kept, and of one token's heads the first.
        ages = request.recency * heads + (heads - 1 - jnp.arange(heads, dtype=jnp.int32))[None, :, None]
        row = (batch, 1, heads * count)
        return _Request(
            scores=request.scores.reshape(row),
            protected=(request.protected | safe).reshape(row),
            recency=jnp.where(request.recency >= 0, ages, axes.EMPTY).reshape(row),
            budgets=jnp.minimum(jnp.sum(request.budgets, axis=1, keepdims=True), one.plan.slots // one.plan.unit),
        )

    pairs = list(zip(candidates, requests, strict=True))
    safe = _select_all([with_floor(*pair) for pair in pairs], mesh)
    kept = _select_all([flat(*pair, one) for pair, one in zip(pairs, safe, strict=True)], mesh)
    return [one.reshape(request.scores.shape) for one, request in zip(kept, requests, strict=True)]
