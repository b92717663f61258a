"""Generation: stop tokens, unequal prompts, seeds, blocks, one compile, errors."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accounting import kept_positions
from kvjax.errors import UserError
from kvjax.generation import Generator
from kvjax.grammar import parse_policy
from kvjax.oracle import oracle_of, with_future
from kvjax.sampling import Sampling
from kvjax.token_loop import PADDING, decode_block
from tests.tiny import tiny_model, whole_pass

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [13]]


def greedy_by_hand(model, prompt, count):
    """Argmax of a whole pass over everything so far, each time."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(whole_pass(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_generation_equals_passes_over_everything():
    model = tiny_model()
    expected = [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert kvjax.generate(model, PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize("steps_per_dispatch", [1, 5, 16])
def test_block_size_does_not_matter(steps_per_dispatch):
    model = tiny_model()
    generator = Generator(model, batch=4, max_tokens=40, steps_per_dispatch=steps_per_dispatch)
    blocks = list(generator.stream(PROMPTS, max_new_tokens=12))
    assert [block.shape[0] for block in blocks] == [3] * len(blocks)  # the idle fourth row is not shown
    assert blocks[0].shape[1] == 1
    assert max(block.shape[1] for block in blocks) <= steps_per_dispatch
    rows = np.concatenate(blocks, axis=1)
    assert rows.shape == (3, 12)
    assert rows.tolist() == kvjax.generate(model, PROMPTS, max_new_tokens=12)


def test_a_stop_token_ends_its_row_alone():
    model = tiny_model()
    free = kvjax.generate(model, PROMPTS, max_new_tokens=12)
    stop = free[1][4]
    stopped = kvjax.generate(model, PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    for ours, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert ours == whole[:end]


def test_the_loop_ends_when_all_rows_have_stopped():
    model = tiny_model()
    first = kvjax.generate(model, PROMPTS, max_new_tokens=3)
    stops = {token for row in first for token in row}
    generator = Generator(model, batch=3, max_tokens=200, stop_tokens=stops, steps_per_dispatch=64)
    blocks = list(generator.stream(PROMPTS, max_new_tokens=100))
    assert sum(block.shape[1] for block in blocks) <= 3
    assert generator.timing.decode_steps <= 2


def test_rows_draw_by_their_own_seed_whatever_stands_beside_them():
    model = tiny_model()
    rule = Sampling(temperature=1.5, top_p=0.9)
    generator = Generator(model, batch=3, max_tokens=40, sampling=rule)
    together = generator.generate(PROMPTS, max_new_tokens=10, seeds=[5, 6, 7])
    alone = generator.generate([PROMPTS[1]], max_new_tokens=10, seeds=[6])
    assert together[1] == alone[0]
    assert generator.generate(PROMPTS, max_new_tokens=10, seeds=[5, 6, 7]) == together
    assert generator.generate(PROMPTS, max_new_tokens=10, seeds=[8, 9, 10]) != together


def test_500_tokens_compile_one_block():
    model = tiny_model()
    decode_block.clear_cache()
    generator = Generator(model, batch=1, max_tokens=520)
    first = generator.generate([[1, 2, 3]], max_new_tokens=500)
    assert len(first[0]) == 500
    assert sorted(map(str, generator._compiled)) == ["(16, 0)", "block"]
    assert generator.timing.decode_steps == 499
    memory = generator.memory()
    assert memory["aliased_bytes"] >= kvjax.device_bytes(generator.cache.layers)
    assert generator.timing.compile_seconds > 0
    generator.generate([[4, 5]], max_new_tokens=50)
    assert generator.timing.compile_seconds == 0


def test_padding_never_reaches_the_caller():
    rows = kvjax.generate(tiny_model(), PROMPTS, max_new_tokens=7, stop_tokens=[0, 1, 2, 3])
    assert all(PADDING not in row for row in rows)


def test_what_comes_then_makes_no_difference_to_the_full_cache():
    generator = Generator(tiny_model(), batch=4, max_tokens=40)
    then = [[20, 21], [22], [23, 24, 25]]
    whole = [prompt + more for prompt, more in zip(PROMPTS, then, strict=True)]
    expected = generator.generate(whole, max_new_tokens=12)
    assert generator.generate(PROMPTS, max_new_tokens=12, then=then) == expected
    np.testing.assert_array_equal(generator.cache.num_seen, [len(row) + 11 for row in whole] + [0])
    assert generator.generate(PROMPTS, max_new_tokens=12) != expected


def test_what_comes_then_finds_the_prompt_compressed():
    """As if the question had been decoded behind the prompt, and not as if it had been part of it."""
    model, random = tiny_model(), np.random.default_rng(0)
    policy = "turboquant(bits=1)+exact(sinks=2,window=8,round=8)"
    prompts, then = random.integers(0, 64, (2, 60)).tolist(), random.integers(0, 64, (2, 3)).tolist()
    cache = kvjax.init_cache(model, policy, batch=2, max_tokens=96)
    _, cache = kvjax.prefill(model, cache, jnp.asarray(prompts))
    logits, cache = kvjax.compressed_decode(model, cache, jnp.asarray(then))
    expected = []
    for _ in range(10):
        expected.append(jnp.argmax(logits[:, -1], axis=-1))
        logits, cache = kvjax.compressed_decode(model, cache, expected[-1][:, None])
    generator = Generator(model, policy=policy, batch=2, max_tokens=96)
    found = generator.generate(prompts, max_new_tokens=10, then=then)
    assert found == np.stack(expected, axis=1).tolist()
    whole = [prompt + more for prompt, more in zip(prompts, then, strict=True)]
    assert generator.generate(whole, max_new_tokens=10) != found


def test_questions_compile_once_a_bucket_of_lengths():
    generator = Generator(tiny_model(), batch=1, max_tokens=64)
    for count in (1, 16, 17):
        generator.generate([[1, 2]], max_new_tokens=2, then=[[3] * count])
    generator.generate([[1, 2]], max_new_tokens=2)
    assert sorted(map(str, generator._compiled)) == ["(16, 0)", "(16, 16)", "(16, 32)", "block"]


def test_a_question_behind_a_pinned_prompt_is_not_pinned():
    policy = "streaming(budget=18)+exact(sinks=2,window=8,round=8)+prompt(20)"
    generator = Generator(tiny_model(), policy=policy, batch=1, max_tokens=64)
    assert len(generator.generate([[1] * 20], max_new_tokens=2, then=[[2] * 5])[0]) == 2
    with pytest.raises(UserError, match=r"Prompt 0 has 21 tokens, and the policy '.*' can pin 20: give prompt\(21\)"):
        generator.generate([[1] * 21], max_new_tokens=2, then=[[2] * 5])


def test_the_empty_cache_may_be_prepared():
    """Whoever prepares it is given an empty one for the whole batch; what comes back is used."""
    frame, given = "(budget=18)+exact(sinks=2,window=8,round=8)", []
    policy = oracle_of(parse_policy(f"streaming{frame}"), text=f"oracle{frame}")
    future = np.zeros((2, 4, 2, 64), np.float32)
    future[..., 10:18] = 1.0

    def prepare(cache):
        given.append(cache.num_seen.tolist())
        return with_future(cache, [jnp.asarray(future) for _ in cache.layers])

    generator = Generator(tiny_model(), policy=policy, batch=2, max_tokens=64)
    generator.generate([[1] * 50], max_new_tokens=4, prepare=prepare)
    assert given == [[0, 0]]
    for layer in kept_positions(generator.cache):
        for head in layer:
            assert set(range(10, 18)) <= set(head.tolist())


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ([[1], []], "Every row needs at least one token in `then`"),
        ([[1], [2] * 29], "Prompt 1 has 30 tokens; with max_new_tokens=4 it needs max_tokens of at least 33"),
        ([[1], [64]], "Prompt 1 has the token 64, and the model's vocabulary ends at 63"),
    ],
)
def test_refusals_of_what_comes_then(then, message):
    generator = Generator(tiny_model(), batch=2, max_tokens=32)
    with pytest.raises(UserError, match=message):
        next(generator.stream([[1], [2]], max_new_tokens=4, then=then))


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1], []], 4, "Prompt 1 is empty"),
        ([[1] * 30], 4, "Prompt 0 has 30 tokens; with max_new_tokens=4 it needs max_tokens of at least 33"),
        ([[1]], 0, "max_new_tokens is 0"),
        ([[1]] * 3, 4, "3 prompts came; expected 1 to 2"),
        ([[1, 64]], 4, "Prompt 0 has the token 64, and the model's vocabulary ends at 63"),
        ([[-1]], 4, "Prompt 0 has the token -1"),
    ],
)
def test_refusals(prompts, max_new_tokens, message):
    generator = Generator(tiny_model(), batch=2, max_tokens=32)
    with pytest.raises(UserError, match=message):
        next(generator.stream(prompts, max_new_tokens=max_new_tokens))


def test_a_prompt_that_just_fits_is_taken():
    generator = Generator(tiny_model(), batch=1, max_tokens=32)
    assert len(generator.generate([[1] * 29], max_new_tokens=4)[0]) == 4


def test_seeds_out_of_range_are_refused():
    generator = Generator(tiny_model(), batch=2, max_tokens=32)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="at least 0 and below 2"):
            generator.generate([[1]], max_new_tokens=1, seeds=[seed])


def test_memory_needs_a_compiled_loop():
    generator = Generator(tiny_model(), batch=1, max_tokens=32)
    generator.generate([[1]], max_new_tokens=1)
    with pytest.raises(UserError, match="not compiled yet"):
        generator.memory()
