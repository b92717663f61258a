"""Both caches on the same prompts: where texts part, KL step by step against `kvjax.forcing`, and what is summed up."""

import copy

import numpy as np
import pytest

import models
from configs.base import decode_config
from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.comparison import Comparison
from kvjax.decoder import Decoder
from kvjax.forcing import divergence
from kvjax.grammar import parse_policy
from kvjax.token_loop import PADDING
from kvjax.walk import follow
from tests.tiny import tiny_model

NEW = 12
BATCH = 3
HARSH = "streaming(budget=8)+exact(sinks=2,window=4,round=8)"
PROMPTS = [list(row) for row in np.random.default_rng(0).integers(32, 127, (2, 24)).tolist()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    models.save_checkpoint(tiny_model(layers=1, vocab_size=300), folder)
    write_byte_tokenizer(folder, vocab_size=300, max_positions=512)
    return folder


def make(checkpoint, policy, **sampling):
    """A decoder that stops at no token."""
    config = decode_config(str(checkpoint))
    config.policy, config.max_new_tokens, config.stop_at_end = policy, NEW, False
    config.sampling.update(sampling)
    return Decoder(config, quiet=True)


def write(decoder, prompts=PROMPTS):
    """What the decoder generates."""
    blocks = list(decoder.stream(prompts, seeds=range(len(prompts)), batch=BATCH))
    return [row[row != PADDING].tolist() for row in np.concatenate(blocks, axis=1)]


def compare(decoder, written, prompts=PROMPTS):
    comparison = Comparison(decoder)
    how = {"seeds": range(len(prompts)), "batch": BATCH, "after": prompts}
    return comparison, comparison.compare(prompts, written, **how)


@pytest.fixture(scope="module")
def harsh(checkpoint):
    """A cache of eight tokens: decoder, what it generated, and its comparison."""
    decoder = make(checkpoint, HARSH)
    written = write(decoder)
    return decoder, written, *compare(decoder, written)


@pytest.fixture(scope="module")
def full(harsh):
    """The same decoder, and what it compiled, with the uncompressed cache."""
    decoder = copy.copy(harsh[0])
    decoder.policy = parse_policy("full")
    written = write(decoder)
    return decoder, written, *compare(decoder, written)


def test_the_uncompressed_cache_does_not_differ_from_itself(full):
    _, written, comparison, found = full
    for one, tokens in zip(found, written, strict=True):
        assert (one.tokens, one.full_tokens, one.first, one.agreement) == (tokens, tokens, None, 1.0)
        assert one.text == one.full_text
        assert not one.nats.any()
        assert one.same_top.all()
        assert one.lines()[0] == f"the same {NEW} tokens with both caches"
    report = comparison.report()
    assert (report["prompts"], report["same"], report["agreement"], report["kl_mean"]) == (2, 2, 1.0, 0.0)
    assert report["cache_bytes"] == report["full_cache_bytes"]
    assert "2 of 2 texts the same, agreement 100.0%" in comparison.summary()


def test_the_first_difference_is_that_of_two_generations(harsh):
    decoder, written, comparison, found = harsh
    policies = parse_policy(HARSH), parse_policy("full")
    generators = [decoder.generator(PROMPTS, batch=BATCH, policy=policy) for policy in policies]
    rows = [one.generate(PROMPTS, max_new_tokens=NEW, seeds=(0, 1)) for one in generators]
    assert rows[0] == written
    for one, ours, theirs in zip(found, *rows, strict=True):
        differs = np.flatnonzero(np.asarray(ours) != np.asarray(theirs))
        assert (one.tokens, one.full_tokens, one.first) == (ours, theirs, differs[0])
        assert one.agreement == differs[0] / NEW
        assert one.lines()[0].startswith(f"differs from full at token {differs[0]}: ")
    report = comparison.report()
    assert report["same"] == 0
    assert 4 * report["cache_bytes"] < report["full_cache_bytes"]


def test_kl_is_that_of_both_caches_along_the_compressed_ones_tokens(harsh):
    decoder, written, comparison, found = harsh
    base, other = (
        follow(
            decoder.model, parse_policy(policy), [*PROMPTS, PROMPTS[0]], answers=[*written, written[0]], max_tokens=128
        )
        for policy in ("full", HARSH)
    )
    expected = divergence(base, other)[:2]
    same_top = base.log_probabilities.argmax(-1) == other.log_probabilities.argmax(-1)
    for row, one in enumerate(found):
        np.testing.assert_allclose(one.nats, expected[row], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(one.same_top, same_top[row])
        record = one.record()
        assert record["kl_max"] == pytest.approx(expected[row].max())
        assert record["kl_max_at"] == expected[row].argmax()
    # Greedily, both take the likeliest token of the same text up to the first difference.
    assert all(one.same_top[: one.first].all() and not one.same_top[one.first] for one in found)
    assert comparison.report()["kl_mean"] == pytest.approx(expected.mean())
    assert expected.mean() > 0.01


def test_one_prompt_is_reported_step_by_step_and_an_end_is_a_difference(full, capsys):
    """The text that is compared is the start of what the uncompressed cache writes."""
    decoder, written, _, _ = full
    comparison, [one] = compare(decoder, [written[0][:5]], PROMPTS[:1])
    assert (one.first, one.agreement, len(one.nats)) == (5, 5 / NEW, 5)
    assert one.lines()[0].startswith("differs from full at token 5: the end instead of ")
    report = comparison.report()
    assert (report["first_difference"], report["full_new_tokens"]) == (5, NEW)
    assert (report["text"], report["full_text"]) == (one.text, one.full_text)
    assert report["kl_per_step"] == one.nats.tolist() == [0.0] * 5
    comparison.show(one, verdict="right")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- full"
    assert "--- right" in lines
    assert not any("sampled" in line for line in lines)
    assert "1.00 times as many" in comparison.sizes()


def test_sampled_texts_follow_the_same_seeds(checkpoint, capsys):
    """No difference is chance: the uncompressed cache draws what it drew before."""
    decoder = make(checkpoint, "full", temperature=1.0)
    comparison, found = compare(decoder, write(decoder))
    assert [one.first for one in found] == [None, None]
    assert comparison.report()["sampled"]
    changed = [[*one.tokens[:3], (one.tokens[3] + 1) % 256] for one in found]
    comparison, found = compare(decoder, changed)
    assert [one.first for one in found] == [3, 3]
    comparison.show(found[0])
    assert "each text follows from its own tokens" in capsys.readouterr().out
