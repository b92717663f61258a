"""triattention: what a key expects of queries to come, from the centres of each head's queries."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.rope import Llama3Scaling, Rope, YarnScaling
from kvjax.triattention_file import load_triattention
from tests.fitted import normal
from tests.libtpu import needs_libtpu, run
from tests.views import (
    call,
    check_scores,
    check_slots_and_rows,
    expected,
    fitted,
    random_view,
    scores_of,
    shape_of,
    view_of,
)

SIZE = 128
ROPES = {
    "plain": Rope(head_size=SIZE, theta=1e6),
    "llama3": Rope(
        head_size=SIZE,
        theta=5e5,
        scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192),
    ),
    "yarn": Rope(head_size=SIZE, theta=1e6, scaling=YarnScaling(factor=4.0, original_max_positions=32768)),
}


def bands_of(vectors):
    """Pairs (f, f + D/2) as complex numbers, complex128."""
    vectors = np.asarray(vectors, np.float64)
    half = vectors.shape[-1] // 2
    return vectors[..., :half] + 1j * vectors[..., half:]


def statistics_of(shape, seed=30):
    """Random centres, and mean lengths that are larger than the centres'."""
    mean = normal(shape.num_query_heads, shape.head_size, seed=seed)
    spread = np.random.default_rng(seed).uniform(1.05, 2, (shape.num_query_heads, shape.head_size // 2))
    return SimpleNamespace(
        queries=SimpleNamespace(mean=mean, second=None),
        queries_norm=(np.abs(bands_of(mean)) * spread).astype(np.float32),
    )


def one_by_one(view, statistics, *, offsets=65536, trig=1, norm=1, rounded=True):
    """The score of every query head in float64, `B N S`: keys are turned back, and each offset is taken for itself.

    The phase of the next position is rounded to float32 as that of every rotation here is (kvjax/rope.py), unless
    `rounded` is False.
    """
    rope = view.shape.rope
    factor, frequencies = rope.attention_factor(), rope.frequencies().astype(np.float64)
    distances = [2**power for power in range(int(np.log2(offsets)) + 1)]
    centres, lengths = bands_of(statistics.queries.mean), np.asarray(statistics.queries_norm, np.float64)
    batch, _, slots = view.positions.shape
    scores = np.zeros((batch, view.shape.num_query_heads, slots))
    for row in range(batch):
        seen = view.num_seen[row]
        phase = (np.float32(seen) * rope.frequencies()).astype(np.float64) if rounded else seen * frequencies
        for head in range(view.shape.num_query_heads):
            own = head // view.group
            turns = np.exp(1j * view.positions[row, own][:, None] * frequencies)  # S D/2
            plain = bands_of(view.keys[row, own]) / (factor * turns)
            for distance in distances:
                query = factor * centres[head] * np.exp(1j * (phase + distance * frequencies))
                products = query * np.conj(factor * plain * turns)
                scores[row, head] += trig * np.sum(products.real, axis=1) / len(distances)
            rest = factor**2 * (lengths[head] - np.abs(centres[head]))
            scores[row, head] += norm * np.abs(plain) @ rest
    return scores


def far_view(shape, *, seen=(200_000, 131_073, 777), slots=24, arrays=None, seed=31):
    """Rows of keys anywhere before the next position."""
    random = np.random.default_rng(seed)
    places = [random.choice(count, (shape.num_kv_heads, slots)) for count in seen]
    keys = normal(len(seen), shape.num_kv_heads, slots, shape.head_size, seed=seed)
    return view_of(
        keys,
        positions=np.array(places, np.int32),
        num_seen=np.array(seen, np.int32),
        shape=shape,
        arrays=arrays,
    )


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("offsets", [65536, 4096])
def test_the_collapsed_score_is_the_one_of_all_offsets(rope, offsets):
    shape = shape_of(head_size=SIZE, rope=ROPES[rope])
    statistics = statistics_of(shape)
    selection, arrays = fitted("triattention", shape=shape, statistics=statistics, offsets=offsets)
    view = far_view(shape, arrays=arrays)
    found = call(selection, "query_scores", view)
    check_scores(found, one_by_one(view, statistics, offsets=offsets))
    # A float32 phase of 200,000 is off by up to 0.008; in the mean over offsets fast bands count little.
    check_scores(found, one_by_one(view, statistics, offsets=offsets, rounded=False), tolerance=3e-4)


def test_a_position_within_float32_needs_no_rounding():
    shape = shape_of(head_size=SIZE, rope=ROPES["yarn"])
    statistics = statistics_of(shape)
    selection, arrays = fitted("triattention", shape=shape, statistics=statistics)
    view = far_view(shape, seen=(4096, 100, 1), arrays=arrays)
    check_scores(call(selection, "query_scores", view), one_by_one(view, statistics, rounded=False))


@pytest.mark.parametrize(("trig", "norm"), [(1, 0), (0, 1), (0, 0)])
def test_either_term_alone(trig, norm):
    shape = shape_of(head_size=SIZE, rope=ROPES["yarn"])
    statistics = statistics_of(shape)
    selection, arrays = fitted("triattention", shape=shape, statistics=statistics, trig=trig, norm=norm)
    view = far_view(shape, arrays=arrays)
    check_scores(call(selection, "query_scores", view), one_by_one(view, statistics, trig=trig, norm=norm))


@pytest.mark.parametrize("layer", [0, 17, 35])
def test_published_statistics(shared_data, layer):
    path = shared_data / "triattention-stats" / "qwen3_8b.aime24.pt"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not part of the tree")
    shape = ModelShape(
        num_layers=36,
        num_query_heads=32,
        num_kv_heads=8,
        head_size=128,
        dtype="bfloat16",
        vocab_size=151_936,
        rope=Rope(head_size=128, theta=1e6),
    )
    statistics = load_triattention(path, shape).layers[layer]
    selection, arrays = fitted("triattention", shape=shape, layer=layer, statistics=statistics)
    assert (arrays["spread"] >= -1e-6).all()
    view = far_view(shape, seen=(32_768,), slots=16, arrays=arrays)
    check_scores(call(selection, "query_scores", view), one_by_one(view, statistics))


def test_standardised_over_tokens_that_may_go_and_the_largest_of_a_group():
    shape = shape_of()
    statistics = statistics_of(shape)
    selection, arrays = fitted("triattention", statistics=statistics)
    view = random_view(queries=0, arrays=arrays)
    heard = one_by_one(view, statistics)

    def score(tokens):
        best = np.full(len(tokens.slots), -np.inf)
        for head in tokens.query_heads:
            own = heard[tokens.row, head, tokens.slots]
            counted = own[tokens.scorable]
            best = np.maximum(best, (own - counted.mean()) / max(counted.std(), 1e-6))
        return best

    check_scores(scores_of(selection, view), expected(view, score))


@pytest.mark.parametrize("arguments", [{}, {"trig": 0}, {"norm": 0}])
def test_slots_and_rows(arguments):
    selection, arrays = fitted("triattention", statistics=statistics_of(shape_of()), **arguments)
    check_slots_and_rows(selection, random_view(queries=0, arrays=arrays))


def test_no_token_that_may_go_gives_no_nan():
    selection, arrays = fitted("triattention", statistics=statistics_of(shape_of()))
    view = random_view(queries=0, arrays=arrays)
    nothing = dataclasses.replace(view, scorable=np.zeros_like(view.scorable))
    assert np.isfinite(scores_of(selection, nothing)).all()


@pytest.mark.parametrize(
    ("mode", "shares", "waits"), [("layer", "none", False), ("head", "layers", True), ("union", "all", True)]
)
def test_what_agrees_on_one_set(mode, shares, waits):
    selection, _ = fitted("triattention", statistics=statistics_of(shape_of()), mode=mode)
    assert (selection.shares, selection.waits) == (shares, waits)
    assert (selection.num_queries, selection.numbers, selection.wants_moments) == (0, (), False)


def test_errors():
    with pytest.raises(UserError, match="needs statistics of the model's queries"):
        fitted("triattention")
    with pytest.raises(UserError, match="needs a model that rotates its queries and keys"):
        fitted("triattention", shape=dataclasses.replace(shape_of(), rope=None))
    for arguments in ({"mode": "heads"}, {"offsets": 0}, {"trig": 2}, {"norm": -1}):
        with pytest.raises(UserError, match=rf"triattention\({next(iter(arguments))}\) is"):
            fitted("triattention", **arguments)


ON_TPUS = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kvjax._kernels import Coded, StoredKeys
from kvjax.model_shape import ModelShape
from kvjax.rope import Rope
from kvjax.selection import View
from kvjax.selections.triattention import TriAttention
from kvjax.sharding import Placement

devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
placement = Placement(mesh)

def shaped(axes, *sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=placement.sharding(axes, sizes))

B, K, N, D, S = 4, 8, 32, 128, 4096
def exact(count):
    keys = shaped("B K S D", B, K, count, D, dtype=jnp.bfloat16)
    return StoredKeys.of_array(keys, shaped("B one S", B, 1, count, dtype=jnp.int32))

codes = shaped("B K S D", B, K, S // 2, D, dtype=jnp.int8)
part = Coded(planes=(codes,), scale=shaped("B K S", B, K, S, dtype=jnp.float16), bits=4, shift=0.5)
places = shaped("B K S", B, K, S, dtype=jnp.int32)
body = StoredKeys(parts=(part,), positions=places, num_kv_heads=K, basis=shaped("D R", D, D))
total = 4 + S + 256
view = View(
    keys=shaped("B K S D", B, K, total, D),
    stored=(exact(4), body, exact(128), exact(128)),
    values=shaped("B K S D", B, K, total, D),
    positions=shaped("B K S", B, K, total, dtype=jnp.int32),
    scorable=shaped("B K S", B, K, total, dtype=jnp.bool_),
    num_seen=shaped("B", B, dtype=jnp.int32),
    quotas=shaped("B K", B, K, dtype=jnp.int32),
    numbers={}, queries=None, query_positions=None, moments=None,
    arrays={name: shaped("N D", N, D // 2) for name in ("real", "imaginary", "spread")},
    shape=ModelShape(num_layers=2, num_query_heads=N, num_kv_heads=K, head_size=D, dtype="bfloat16", vocab_size=64,
                     rope=Rope(head_size=D)),
    placement=placement,
)
text = jax.jit(lambda view: TriAttention().score(view)).lower(view).compile().as_text()
print("KERNELS", text.count("tpu_custom_call"), "COLLECTIVES", sum(" all-" in line for line in text.splitlines()))
"""


@needs_libtpu
def test_on_a_mesh_of_tpus_each_chip_runs_the_kernel_on_its_body():
    done = run(ON_TPUS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "KERNELS 1 COLLECTIVES 0" in done.stdout
