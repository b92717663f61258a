"""Views of made-up tokens, their scores, and what must hold for the scores of every selection.

random_view     three rows of tokens in mixed slots, with empty slots, protected tokens and evicted positions
golden_view     the tokens of `tests/golden/kvpress.npz`
expected        a reference written for one head's tokens in order, spread over the slots of a view
"""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np

from kvjax.evidence import QueryMoments
from kvjax.model_shape import ModelShape
from kvjax.rope import Rope
from kvjax.selection import SELECTIONS, View
from kvjax.stages.facts import LayerFacts
from tests.fitted import QUICK, normal

SINKS, WINDOW = 4, 8
SEEN = (60, 37, 6)
"""Tokens that each row of `random_view` has seen; the last row holds them all."""


def shape_of(*, head_size=16, kv_heads=2, query_heads=4, layers=3, rope=None):
    """A model."""
    return ModelShape(
        num_layers=layers,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        dtype="float32",
        vocab_size=64,
        rope=rope or Rope(head_size=head_size),
    )


def fitted(name, *, shape=None, layer=0, statistics=None, **arguments):
    """A selection for one layer of a model, and its arrays."""
    facts = LayerFacts(shape=shape or shape_of(), layer=layer, role="keys", statistics=statistics)
    return SELECTIONS.get(name)(**arguments).fit(facts)


def view_of(keys, values=None, *, positions=None, scorable=None, num_seen=None, shape=None, **more):
    """A view of keys `B K S D`; by default all tokens are there in order, and all may go."""
    batch, heads, slots, size = keys.shape
    if positions is None:
        positions = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, heads, slots))
    scorable = positions >= 0 if scorable is None else scorable
    given = dict(
        keys=keys,
        values=np.zeros_like(keys) if values is None else values,
        positions=positions,
        scorable=scorable,
        num_seen=np.max(positions, axis=(1, 2)) + 1 if num_seen is None else num_seen,
        quotas=np.sum(scorable, axis=2, dtype=np.int32),
        numbers={},
        queries=None,
        query_positions=None,
        moments=None,
        arrays={},
        shape=shape or shape_of(head_size=size, kv_heads=heads, query_heads=2 * heads),
    )
    return View(**(given | more))


def random_view(*, seed=0, slots=40, queries=8, numbers=(), moments=False, arrays=None, shape=None):
    """Three rows; in the second, fewer queries have been heard; the third is younger than the window of queries."""
    shape, random = shape or shape_of(), np.random.default_rng([seed, 7])
    sizes = (len(SEEN), shape.num_kv_heads, slots)
    positions = np.full(sizes, -1, np.int32)
    for row, seen in enumerate(SEEN):
        middle = np.arange(SINKS, max(seen - WINDOW, SINKS))
        ends = np.setdiff1d(np.arange(seen), middle)
        for head in range(shape.num_kv_heads):
            kept = random.choice(middle, size=min(len(middle), 22 + head), replace=False)
            held = np.concatenate([ends, kept])
            positions[row, head, random.choice(slots, size=len(held), replace=False)] = held
    held, seen = positions >= 0, np.array(SEEN, np.int32)
    newest = seen[:, None, None] - WINDOW
    heard = seen[:, None] - np.arange(queries, 0, -1, dtype=np.int32)[None]
    heard[1, : queries // 2] = -1
    size = shape.head_size
    made = None
    if moments:
        samples = normal(len(SEEN), shape.num_query_heads, 3 * size, size, seed=seed + 3) + 0.5
        mean, second = np.mean(samples, axis=2), np.einsum("BNTD,BNTR->BNDR", samples, samples) / samples.shape[2]
        made = QueryMoments(count=np.full(len(SEEN), 48, np.float32), mean=mean, second=second.astype(np.float32))
    return view_of(
        *(normal(*sizes, size, seed=seed + index) * held[..., None].astype(np.float32) for index in (0, 1)),
        positions=positions,
        scorable=held & (positions >= SINKS) & ((positions < newest) | (seen[:, None, None] < 2 * WINDOW)),
        num_seen=seen,
        shape=shape,
        queries=2 * normal(len(SEEN), queries, shape.num_query_heads, size, seed=seed + 2) if queries else None,
        query_positions=np.maximum(heard, -1) if queries else None,
        numbers={name: random.uniform(0.1, 3, sizes).astype(np.float32) * held for name in numbers},
        moments=made,
        arrays=arrays or {},
    )


def golden_view(golden, model, *, window=0, sinks=0, numbers=None, arrays=None):
    """The view of one model's tokens, and all arrays of that model.

    Args:
      golden: the folder.
      model: "llama" or "qwen3".
      window: last queries that the view has; the tokens of the window may not go.
      sinks: first tokens that may not go.
      numbers: of tokens.
      arrays: of the selection.
    """
    with np.load(golden / "kvpress.npz") as file:
        found = {name.split("/")[1]: file[name] for name in file.files if name.startswith(model)}
    keys, batch = found["keys"], found["keys"].shape[0]
    count, places = keys.shape[2], found["positions"]
    rope = Rope(head_size=keys.shape[3], theta=float(found["theta"]))
    may_go = (places >= sinks) & (places < count - window)
    view = view_of(
        keys,
        found["values"],
        scorable=np.broadcast_to(may_go, keys.shape[:3]),
        shape=shape_of(
            head_size=keys.shape[3], kv_heads=keys.shape[1], query_heads=found["queries"].shape[1], rope=rope
        ),
        queries=np.swapaxes(found["queries"], 1, 2)[:, count - window :] if window else None,
        query_positions=np.broadcast_to(places[count - window :], (batch, window)) if window else None,
        numbers=numbers or {},
        arrays=arrays or {},
    )
    return view, found


@jax.jit(static_argnums=(0, 1, 2), compiler_options=QUICK)
def _call(selection, method, facts, fields, *more):
    return getattr(selection, method)(View(**dict(facts), **fields), *more)


def call(selection, method, view, *more):
    """What a method of a selection makes of a view, compiled, as numpy arrays."""
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    facts = tuple((name, fields.pop(name)) for name in ("shape", "placement"))
    return jax.tree.map(np.asarray, _call(selection, method, facts, fields, *more))


def scores_of(selection, view):
    """The scores of a view, `B K S`."""
    return call(selection, "score", view)


def moved(view, order):
    """The view with the slots of each head in another order, `B K S`; -1 is an empty slot."""

    def move(array, empty):
        index = np.maximum(order, 0).reshape(*order.shape, *(1,) * (array.ndim - 3))
        taken = np.take_along_axis(array, index, axis=2)
        return np.where((order >= 0).reshape(index.shape), taken, np.asarray(empty, array.dtype))

    return dataclasses.replace(
        view,
        keys=move(view.keys, 0),
        values=move(view.values, 0),
        positions=move(view.positions, -1),
        scorable=move(view.scorable, False),
        numbers={name: move(array, 0) for name, array in view.numbers.items()},
    )


def row_of(view, row):
    """One row of a view."""

    def cut(array):
        return array[row : row + 1]

    names = ("keys", "values", "positions", "scorable", "num_seen", "quotas", "queries", "query_positions")
    names += ("numbers", "moments")
    return dataclasses.replace(view, **{name: jax.tree.map(cut, getattr(view, name)) for name in names})


def check_slots_and_rows(selection, view, *, tolerance=1e-5):
    """The order of slots, empty slots and other rows change no token's score."""
    random, held = np.random.default_rng(5), view.positions >= 0
    batch, heads, slots = held.shape
    scores = scores_of(selection, view)
    largest = np.max(np.abs(scores), where=held & np.isfinite(scores), initial=1e-30)

    def check(found, wanted, where):
        np.testing.assert_allclose(found[where], wanted[where], rtol=0, atol=tolerance * largest)

    order = random.permuted(np.broadcast_to(np.arange(slots), held.shape), axis=2)
    check(scores_of(selection, moved(view, order)), np.take_along_axis(scores, order, axis=2), _at(held, order))
    padded = np.concatenate([np.arange(slots), np.full(9, -1)])
    order = random.permuted(np.broadcast_to(padded, (batch, heads, slots + 9)), axis=2)
    wanted = np.take_along_axis(scores, np.maximum(order, 0), axis=2)
    check(scores_of(selection, moved(view, order)), wanted, _at(held, order))
    for row in range(batch):
        check(scores_of(selection, row_of(view, row)), scores[row : row + 1], held[row : row + 1])


def _at(held, order):
    return (order >= 0) & np.take_along_axis(held, np.maximum(order, 0), axis=2)


def tokens_of(view, row, head):
    """One head's tokens by position, in float64, and the slots that they lie in."""
    slots = np.flatnonzero(view.positions[row, head] >= 0)
    slots = slots[np.argsort(view.positions[row, head, slots])]
    keys, values = (np.asarray(array[row, head, slots], np.float64) for array in (view.keys, view.values))
    return SimpleNamespace(
        row=row,
        head=head,
        slots=slots,
        keys=keys,
        values=values,
        positions=view.positions[row, head, slots],
        scorable=view.scorable[row, head, slots],
        numbers={name: np.asarray(array[row, head, slots], np.float64) for name, array in view.numbers.items()},
        query_heads=range(head * view.group, (head + 1) * view.group),
        num_seen=int(view.num_seen[row]),
    )


def expected(view, function):
    """A reference `B K S`: `function` gives the scores of one head's tokens; NaN in empty slots."""
    result = np.full(view.positions.shape, np.nan)
    for row in range(result.shape[0]):
        for head in range(result.shape[1]):
            tokens = tokens_of(view, row, head)
            result[row, head, tokens.slots] = function(tokens)
    return result


def check_scores(found, wanted, *, where=None, tolerance=1e-5):
    """Scores are those expected, relative to the largest; where the reference is NaN or `where` is False, any."""
    where = ~np.isnan(wanted) & (True if where is None else where)
    assert where.any()
    finite = where & np.isfinite(wanted)
    largest = np.max(np.abs(wanted), where=finite, initial=1e-30)
    np.testing.assert_allclose(found[where], wanted[where], rtol=0, atol=tolerance * largest)


def softmax(numbers):
    """Of the last axis, in float64."""
    powers = np.exp(numbers - np.max(numbers, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


def heard_by(view, tokens, window):
    """Attention weights of the last `window` queries of one head's tokens, `G heard tokens`, and their positions."""
    places = view.query_positions[tokens.row, -window:]
    heard = np.flatnonzero(places >= 0)
    weights = np.zeros((len(tokens.query_heads), len(heard), len(tokens.slots)))
    for index, name in enumerate(tokens.query_heads):
        for line, query in enumerate(heard):
            vector = view.queries[tokens.row, -window:][query, name].astype(np.float64)
            seen = tokens.positions <= places[query]
            if seen.any():
                logits = tokens.keys[seen] @ vector / np.sqrt(tokens.keys.shape[1])
                weights[index, line, seen] = softmax(logits)
    return weights, places[heard]


def neighbours(numbers, kernel, kind):
    """Average (zeros beyond the ends) or largest of `kernel` neighbours of a list of numbers."""
    half = kernel // 2
    found = []
    for place in range(len(numbers)):
        near = numbers[max(place - half, 0) : place + half + 1]
        found.append(np.sum(near) / kernel if kind == "avg" else np.max(near))
    return np.array(found)


def observed(view, *, window, kernel, kind):
    """SnapKV's scores of a view in float64: 0 in the window."""

    def score(tokens):
        weights, places = heard_by(view, tokens, window)
        before = tokens.positions < np.min(places)
        scores = np.zeros(len(tokens.slots))
        if before.any():
            scores[before] = neighbours(np.mean(weights, axis=(0, 1))[before], kernel, kind)
        return scores

    return expected(view, score)
