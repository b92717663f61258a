"""What several selections need: means over tokens, groups of query heads, neighbours, weights of the last queries."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax._kernels import window_mass as mass_of
from kvjax.errors import check_between, check_choice
from kvjax.selection import Scores, Selection, View


def mean_over(numbers: Float[Array, "B K S ..."], counted: Bool[Array, "B K S"]) -> Float[Array, "B K ..."]:
    """Mean over the slots that count, 0 if none does; what others hold cannot matter."""
    mask = counted.reshape(*counted.shape, *(1,) * (numbers.ndim - 3))
    total = jnp.sum(jnp.where(mask, numbers, 0.0), axis=2)
    return total / jnp.maximum(jnp.sum(mask, axis=2), 1).astype(jnp.float32)


def group_mean(numbers: Float[Array, "B N S"], view: View) -> Scores:
    """Mean over the query heads of each key/value head."""
    return jnp.mean(by_group(numbers, view), axis=2)


def group_max(numbers: Float[Array, "B N S"], view: View) -> Scores:
    """The largest over the query heads of each key/value head."""
    return jnp.max(by_group(numbers, view), axis=2)


def by_group(numbers: Float[Array, "B N ..."], view: View) -> Float[Array, "B K G ..."]:
    """Query heads by their key/value head."""
    return numbers.reshape(numbers.shape[0], view.shape.num_kv_heads, view.group, *numbers.shape[2:])


def in_order(positions: Int[Array, "B K S"], counted: Bool[Array, "B K S"]) -> tuple[Array, Array]:
    """Slots of the tokens that count by position, the others behind them; and each slot's place in that order.

    Tokens lie in slots in any order: what neighbours mean to a selection goes by positions.
    """
    order = jnp.argsort(jnp.where(counted, positions, jnp.iinfo(jnp.int32).max), axis=2)
    return order, jnp.argsort(order, axis=2)


def window_mass(view: View, *, window: int) -> Scores:
    """Attention weights of the last `window` queries over all tokens held, each query at its own position.

    Their sum over these queries, mean over the query heads of each key/value head.
    """
    queries, positions = view.queries[:, -window:], view.query_positions[:, -window:]
    scale = 1.0 / math.sqrt(view.shape.head_size)
    found = mass_of(view.pieces, queries, query_positions=positions, scale=scale, mesh=view.placement.mesh)
    return jnp.concatenate(found, axis=2)


def window_logits(view: View, queries: Float[Array, "B w N D"]) -> Float[Array, "B N w S"]:
    """Scaled products of queries and keys, no mask; empty slots give 0."""
    grouped = by_group(jnp.swapaxes(queries, 1, 2), view)  # B K G w D
    products = jnp.einsum("BKGwD,BKSD->BKGwS", grouped, view.keys) / jnp.sqrt(jnp.float32(view.shape.head_size))
    return products.reshape(products.shape[0], -1, *products.shape[3:])


def pooled(
    numbers: Float[Array, "B K S"],
    positions: Int[Array, "B K S"],
    counted: Bool[Array, "B K S"],
    *,
    kernel: int,
    kind: str,
) -> Scores:
    """Average ("avg", zeros beyond the ends count) or largest ("max") of `kernel` neighbouring tokens that count."""
    if kernel == 1:
        return numbers
    order, places = in_order(positions, counted)
    ordered = jnp.take_along_axis(jnp.where(counted, numbers, 0.0), order, axis=2)
    window, padding = (1, 1, kernel), ((0, 0), (0, 0), (kernel // 2, kernel // 2))
    if kind == "avg":
        smoothed = jax.lax.reduce_window(ordered, 0.0, jax.lax.add, window, (1, 1, 1), padding) / kernel
    else:
        inside = jnp.arange(ordered.shape[2], dtype=jnp.int32)[None, None] < jnp.sum(counted, axis=2, keepdims=True)
        ordered = jnp.where(inside, ordered, -jnp.inf)
        smoothed = jax.lax.reduce_window(ordered, -jnp.inf, jax.lax.max, window, (1, 1, 1), padding)
    return jnp.take_along_axis(smoothed, places, axis=2)


def before_window(view: View, *, window: int) -> tuple[Bool[Array, "B K S"], Int[Array, "B"]]:
    """Tokens held that came before the last `window` queries, and how many of these a row has had."""
    positions = view.query_positions[:, -window:]
    first = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1)
    return view.held & (view.positions < first[:, None, None]), jnp.sum(positions >= 0, axis=1)


def observed_window(view: View, *, window: int, kernel: int, pool: str) -> Scores:
    """SnapKV's score (arXiv 2404.14469): mean weight of the last queries, smoothed along the tokens before the window.

        s_j = pool( mean over the last w queries of A_ij )        mean over the query heads of the group

    Tokens of the window itself get 0. The authors score each query head for itself; the mean over a group is kvpress's.
    """
    before, heard = before_window(view, window=window)
    mean = window_mass(view, window=window) / jnp.maximum(heard, 1).astype(jnp.float32)[:, None, None]
    scores = jnp.where(before, mean, 0.0)
    return jnp.where(before, pooled(scores, view.positions, before, kernel=kernel, kind=pool), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservedWindow(Selection):
    """Keeps the tokens that the last queries attend to: SnapKV, and those that spread its budgets differently.

    Attributes:
      queries: w, last queries that vote.
      kernel: tokens that are smoothed together, odd.
      pool: "avg" or "max".
    """

    name: ClassVar[str]

    queries: int = 64
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self):
        check_between(f"{self.name}(queries)", self.queries, 1, 1024)
        check_choice(f"{self.name}(kernel)", self.kernel, range(1, 64, 2))
        check_choice(f"{self.name}(pool)", self.pool, ("avg", "max"))

    @property
    def num_queries(self) -> int:
        """W."""
        return self.queries

    def score(self, view: View) -> Scores:
        """The smoothed mean weight."""
        return observed_window(view, window=self.queries, kernel=self.kernel, pool=self.pool)
