"""duo: whole heads keep their tokens, the others sinks and window alone."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.selections.duo import read_pattern
from tests.views import check_slots_and_rows, fitted, random_view, scores_of, shape_of

TABLE = [[0.9, 0.1], [0.2, 0.3], [0.0, 1.0]]


@pytest.fixture
def pattern(tmp_path):
    path = tmp_path / "pattern.tsv"
    np.savetxt(path, TABLE, delimiter="\t")
    return str(path)


def real_shape(layers, heads):
    return ModelShape(
        num_layers=layers, num_query_heads=4 * heads, num_kv_heads=heads, head_size=16, dtype="float32", vocab_size=8
    )


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [
        ("duo.llama-3.1-8b-instruct.tsv", 32, 8),
        ("duo.llama-3-8b-gradient-1048k.tsv", 32, 8),
        ("duo.mistral-7b-v0.3.tsv", 32, 8),
        ("kvzip.qwen2.5-7b-scbench_qa_eng-0.pt", 28, 4),
        ("kvzip.llama3.1-8b-scbench_qa_eng-0.pt", 32, 8),
        ("kvzip.qwen2.5-14b-scbench_qa_eng-0.pt", 48, 8),
        ("kvzip.duo-scbench_qa_eng-0.pt", 32, 8),
    ],
)
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_published_patterns(shared_data, name, layers, heads, sparsity):
    """Of all heads, as many look back as `sparsity` leaves; those of largest numbers."""
    path = str(shared_data / "head-patterns" / name)
    table = read_pattern(path)
    assert table.shape == (layers, heads)
    assert np.isfinite(table).all()
    assert table.std() > 0.01
    made = [
        fitted("duo", shape=real_shape(layers, heads), layer=layer, pattern=path, sparsity=sparsity)
        for layer in (0, layers // 2, layers - 1)
    ]
    for selection, arrays in made:
        np.testing.assert_array_equal(arrays["looks_back"], selection.looks_back(selection.layer))
    looks_back = np.stack([made[0][0].looks_back(layer) for layer in range(layers)])
    assert table[looks_back].min() > table[~looks_back].max()
    assert np.mean(looks_back) == pytest.approx(1 - sparsity, abs=0.02)
    shares = [made[0][0].head_share(layer) for layer in range(layers)]
    np.testing.assert_allclose(shares, looks_back.mean(axis=1))


def test_the_numbers_of_a_published_text_file(shared_data):
    path = shared_data / "head-patterns" / "duo.llama-3.1-8b-instruct.tsv"
    lines = [[float(number) for number in line.split()] for line in path.read_text().splitlines()]
    np.testing.assert_array_equal(read_pattern(str(path)), np.array(lines, np.float32))


@pytest.mark.parametrize(("layer", "looks_back"), [(0, [True, False]), (1, [False, True]), (2, [False, True])])
def test_newer_is_higher_in_heads_that_look_back(pattern, layer, looks_back):
    selection, arrays = fitted("duo", layer=layer, pattern=pattern)
    view = random_view(arrays=arrays)
    scores = scores_of(selection, view)
    for head, back in enumerate(looks_back):
        wanted = view.positions[:, head] if back else np.full(view.positions[:, head].shape, -np.inf)
        held = view.positions[:, head] >= 0
        np.testing.assert_array_equal(scores[:, head][held], wanted[held])
    assert selection.head_share(layer) == 0.5
    check_slots_and_rows(selection, view, tolerance=0)


@pytest.mark.parametrize(("sparsity", "share"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_sparsity(pattern, sparsity, share):
    selection, _ = fitted("duo", pattern=pattern, sparsity=sparsity)
    assert np.mean([selection.head_share(layer) for layer in range(3)]) == pytest.approx(share)
    assert (selection.heads, selection.needs_pool, selection.budget) == ("adaptive", True, 1.0)


def test_a_pattern_of_another_model(pattern):
    with pytest.raises(UserError, match="is for 3 layers of 2 key/value heads; the model has 3 of 4"):
        fitted("duo", shape=shape_of(kv_heads=4), pattern=pattern)
    with pytest.raises(UserError, match="is for 3 layers of 2 key/value heads; the model has 2 of 2"):
        fitted("duo", shape=shape_of(layers=2), pattern=pattern)
    with pytest.raises(UserError, match="has 3 layers; the model has more"):
        fitted("duo", pattern=pattern)[0].looks_back(3)


@pytest.mark.parametrize("content", ["", "no numbers here\n", "1 2\n3\n", "0.1\tnan\n0.2\t0.3\n", "0.1\tinf\n"])
def test_a_file_without_a_table(tmp_path, content):
    path = tmp_path / "pattern.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"pattern\.tsv is no head-pattern file"):
        fitted("duo", pattern=str(path))


def test_torch_files_without_a_table(shared_data, tmp_path):
    with pytest.raises(UserError, match="is no head-pattern file: it must hold one table of finite numbers"):
        fitted("duo", pattern=str(shared_data / "triattention-stats" / "qwen3_8b.aime24.pt"))
    (tmp_path / "broken.pt").write_bytes(b"not a zip archive")
    with pytest.raises(UserError, match=r"broken\.pt"):
        fitted("duo", pattern=str(tmp_path / "broken.pt"))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"duo needs the file with the importance of each head: duo\(pattern=FILE\)"):
        fitted("duo")
    with pytest.raises(UserError, match="There is no head-pattern file '.*missing.tsv'"):
        fitted("duo", pattern=str(tmp_path / "missing.tsv"))


@pytest.mark.parametrize("sparsity", [-0.1, 1.1])
def test_shares_that_are_none(pattern, sparsity):
    with pytest.raises(UserError, match=rf"duo\(sparsity\) is {sparsity}; it must be at least 0\.0 and at most 1\.0\."):
        fitted("duo", pattern=pattern, sparsity=sparsity)
