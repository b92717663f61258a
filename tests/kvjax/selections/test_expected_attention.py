"""expected_attention: the weight that expected queries give a token, times its value's length."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.evidence import QueryMoments
from kvjax.rope import Llama3Scaling, Rope, YarnScaling
from tests.fitted import normal
from tests.views import (
    check_scores,
    check_slots_and_rows,
    expected,
    fitted,
    golden_view,
    random_view,
    scores_of,
    shape_of,
    softmax,
)

ROPES = [
    Rope(head_size=16, theta=1e6),
    Rope(
        head_size=16,
        theta=5e5,
        scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=256),
    ),
    Rope(head_size=16, scaling=YarnScaling(factor=4.0, original_max_positions=64)),
]


def rotation(rope, first, future):
    """The mean of the D x D rotations at `future` positions, the attention factor in it, float64."""
    total = np.zeros((rope.head_size,) * 2)
    for position in range(first, first + future):
        angles = position * rope.frequencies().astype(np.float64)
        cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
        total += np.block([[cos, -sin], [sin, cos]])
    return rope.attention_factor() * total / future


def by_formula(view, mean, second, *, future, covariance, epsilon):
    """Scores in float64, `B K S`; moments `B N D` and `B N D D`."""

    def score(tokens):
        turn, size = rotation(view.shape.rope, tokens.num_seen, future), view.shape.head_size
        total = np.zeros(len(tokens.slots))
        if tokens.scorable.any():
            for head in tokens.query_heads:
                centre = mean[tokens.row, head].astype(np.float64)
                spread = turn @ (second[tokens.row, head] - np.outer(centre, centre)) @ turn.T
                logits = tokens.keys @ (turn @ centre) / np.sqrt(size)
                if covariance:
                    logits += np.einsum("SD,DR,SR->S", tokens.keys, spread, tokens.keys) / (2 * size)
                total[tokens.scorable] += softmax(logits[tokens.scorable]) / view.group
        return (total + epsilon) * np.linalg.norm(tokens.values, axis=1)

    return expected(view, score)


def plain_moments(view, queries):
    """Moments of the queries `B N S D` from the fifth on, before RoPE, float32."""
    half = queries.shape[3] // 2
    angles = np.arange(queries.shape[2])[:, None] * view.shape.rope.frequencies().astype(np.float64)
    bands = (queries[..., :half] + 1j * queries[..., half:]) * np.exp(-1j * angles)
    plain = np.concatenate([bands.real, bands.imag], axis=-1)[:, :, 4:]
    count = np.full(queries.shape[0], plain.shape[2], np.float32)
    second = np.einsum("BNTD,BNTR->BNDR", plain, plain) / plain.shape[2]
    return QueryMoments(count=count, mean=plain.mean(axis=2).astype(np.float32), second=second.astype(np.float32))


@pytest.mark.parametrize("model", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("expected_attention", {"covariance": 1}), ("expected_attention_mean", {"covariance": 0, "epsilon": 1e-2})],
)
def test_equals_kvpress(golden, model, name, arguments):
    view, arrays = golden_view(golden, model, sinks=4)
    view = dataclasses.replace(view, moments=plain_moments(view, arrays["queries"].astype(np.float64)))
    selection, _ = fitted("expected_attention", shape=view.shape, future=64, **arguments)
    check_scores(scores_of(selection, view), arrays[name], where=view.scorable)


@pytest.mark.parametrize("rope", ROPES, ids=["plain", "llama3", "yarn"])
@pytest.mark.parametrize("covariance", [0, 1])
def test_equals_the_formula(rope, covariance):
    view = random_view(moments=True, queries=0, shape=shape_of(rope=rope))
    arguments = dict(future=48, covariance=covariance, epsilon=0.02)
    selection, arrays = fitted("expected_attention", shape=view.shape, **arguments)
    wanted = by_formula(view, view.moments.mean, view.moments.second, **arguments)
    check_scores(scores_of(selection, view), wanted)
    assert (selection.wants_moments, arrays) == (True, {})


@pytest.mark.parametrize("covariance", [0, 1])
def test_slots_and_rows(covariance):
    view = random_view(moments=True, queries=0)
    check_slots_and_rows(fitted("expected_attention", covariance=covariance, epsilon=0.02)[0], view)


def test_statistics_of_the_model_serve_all_rows():
    samples = normal(4, 40, 16) + 0.3
    mean, second = samples.mean(axis=1), np.einsum("NTD,NTR->NDR", samples, samples) / 40
    statistics = SimpleNamespace(queries=SimpleNamespace(mean=mean, second=second))
    selection, arrays = fitted("expected_attention", statistics=statistics, of="calibration")
    view = random_view(queries=0, arrays=arrays)
    wanted = by_formula(view, mean[None].repeat(3, 0), second[None].repeat(3, 0), future=512, covariance=1, epsilon=0)
    check_scores(scores_of(selection, view), wanted)
    assert not selection.wants_moments
    check_slots_and_rows(selection, view)


def test_errors():
    with pytest.raises(UserError, match="needs statistics of the model's queries"):
        fitted("expected_attention", of="calibration")
    without = SimpleNamespace(queries=SimpleNamespace(mean=np.zeros((4, 16)), second=None))
    with pytest.raises(UserError, match="needs statistics of the model's second moments of queries"):
        fitted("expected_attention", of="calibration", statistics=without)
    with pytest.raises(UserError, match="needs a model that rotates its queries and keys"):
        fitted("expected_attention", shape=dataclasses.replace(shape_of(), rope=None))
    for arguments in ({"of": "text"}, {"future": 0}, {"covariance": 2}, {"epsilon": -1.0}):
        with pytest.raises(UserError, match=rf"expected_attention\({next(iter(arguments))}\) is"):
            fitted("expected_attention", **arguments)
