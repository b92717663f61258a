"""What a cache holds while text comes: kept positions of layers and heads, every few tokens.

[ prompt: prefilled, compressed | then: a question | answer ]
                                ^ first moment  ^       ^       ^ ...
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.accounting import kept_positions
from kvjax.companions import frame_of, is_oracle
from kvjax.decoding import LanguageModel, compressed_decode, init_cache, prefill
from kvjax.errors import UserError, check_between
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.statistics import Statistics
from kvjax.token_loop import padded_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Kept positions over time.

    Attributes:
      policy: its string.
      task: what was read, for people.
      prompt_tokens: tokens that were prefilled.
      seen: tokens seen at each moment; the first is `prompt_tokens`.
      layers: numbers of the layers shown.
      heads: numbers of their key/value heads shown.
      kept: `moments layers heads positions` bool.
    """

    policy: str
    task: str = ""
    prompt_tokens: int
    seen: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kept: np.ndarray

    def record(self) -> dict[str, Any]:
        """For a file. What is gone stays gone, so it holds how many moments each position was there for."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "kept": self.kept.sum(axis=0).tolist()}


def trace_of(record: dict[str, Any]) -> Trace:
    """The trace that gave a record."""
    seen = np.asarray(record["seen"])
    lasted = np.asarray(record["kept"], np.int64)  # layers heads positions
    came = np.searchsorted(seen, np.arange(lasted.shape[2]), side="right")  # the moment that first has seen it
    moments = np.arange(len(seen))[:, None, None, None]
    kept = (moments >= came) & (moments < came + lasted)
    tuples = {name: tuple(record[name]) for name in ("seen", "layers", "heads")}
    return Trace(**{**record, **tuples, "kept": kept})


def first_evicting(policies: Sequence[Policy]) -> Policy | None:
    """The first policy that evicts; `random` and `streaming` beside others only if there is no such other."""
    evicting = [policy for policy in policies if frame_of(policy) and not is_oracle(policy)]
    beside = {f"{name}{frame_of(policy)}" for policy in evicting for name in ("random", "streaming")}
    return next((policy for policy in evicting if str(policy) not in beside), next(iter(evicting), None))


def evenly(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of the numbers below `count`, the first and the last among them."""
    return tuple(np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist())


def trace_kept(
    model: LanguageModel,
    policy: str | Policy,
    tokens: Sequence[int],
    *,
    then: Sequence[int] = (),
    answer: Sequence[int],
    max_tokens: int,
    statistics: Statistics | None = None,
    every: int = 4,
    most: int = 4,
) -> Trace:
    """Leads a policy along one text and looks into its cache.

    Args:
      model: the model.
      policy: what the cache keeps.
      tokens: of the prompt, at least one; prefilled.
      then: tokens that come when the prompt has been compressed.
      answer: tokens that come after them, as they would be decoded.
      max_tokens: room of the cache.
      statistics: of the model, for policies that need them.
      every: tokens from one moment to the next.
      most: layers and heads that are shown; of more, some that are spread evenly.

    Raises:
      UserError: the prompt is empty, the text does not fit, or a number is below 1.
    """
    check_between("every", every, 1, 1 << 30)
    check_between("most", most, 1, 1 << 30)
    rest = [*then, *answer]
    total = len(tokens) + len(rest)
    if not tokens:
        raise UserError("The prompt is empty; give at least one token.")
    if total > max_tokens:
        raise UserError(f"The text has {total} tokens and the cache room for {max_tokens}: raise max_tokens.")
    policy = parse_policy(policy)
    layers, heads = (evenly(count, most) for count in (model.cache_shape.num_layers, model.cache_shape.num_kv_heads))
    put = model.placement.put
    cache = init_cache(model, policy, batch=1, max_tokens=max_tokens, statistics=statistics)
    prompt, lengths = padded_rows([tokens], batch=1, most=max_tokens)
    _, cache = prefill(model, cache, put(prompt, "B T"), lengths=put(lengths, "B"))
    seen, moments = [len(tokens)], [kept_positions(cache)]
    for start in range(0, len(rest), every):
        piece = rest[start : start + every]
        chunk = put(np.asarray([piece + [0] * (every - len(piece))], np.int32), "B T")
        _, cache = compressed_decode(model, cache, chunk, lengths=jnp.asarray([len(piece)], jnp.int32))
        seen.append(seen[-1] + len(piece))
        moments.append(kept_positions(cache))
    kept = np.zeros((len(seen), len(layers), len(heads), total), np.bool_)
    for moment, row, column in np.ndindex(kept.shape[:3]):
        kept[moment, row, column, moments[moment][layers[row]][heads[column]]] = True
    facts = {"policy": str(policy), "prompt_tokens": len(tokens), "seen": tuple(seen)}
    return Trace(**facts, layers=layers, heads=heads, kept=kept)
