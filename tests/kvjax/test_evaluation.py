"""One cell of a table: its tokens in both regimes, and what comes of policies on a tiny random model."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.companions import with_companions
from kvjax.errors import UserError
from kvjax.evaluation import Evaluator, make_cell
from kvjax.grammar import parse_policy
from kvjax.material import material_for
from kvjax.symbols import SYMBOLS
from kvjax.task_grammar import parse_task
from kvjax.text import load_tokenizer
from tests.contract.tasks import PROBLEMS
from tests.tiny import SYMBOL_VOCABULARY, sharp_model, whole_pass

model = functools.partial(sharp_model, vocab_size=SYMBOL_VOCABULARY)
POLICY = "streaming(budget=34)+exact(sinks=2,window=8,round=8)"
COPY = "copy(tokens=90,length=24)"
OWN = f'jsonl(file="{PROBLEMS / "own.jsonl"}")'
TEXT = "ppl(tokens=50,scored=30,file=LICENSE,held_out=1.0)"


@pytest.fixture(scope="module", autouse=True)
def let_go():
    """Many compiled functions that serve no other test."""
    yield
    jax.clear_caches()


def tokenizer_with(folder, symbols):
    write_byte_tokenizer(folder, vocab_size=SYMBOL_VOCABULARY, max_positions=512, symbols=symbols)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("tokenizer"), SYMBOLS)


def cell_of(tokenizer, task, question="inside", *, count=5, seed=2, chat=False):
    task = parse_task(task)
    given = {"tokenizer": tokenizer, "material": material_for(task, tokenizer, chat=chat)}
    return make_cell(task, question, **given, num_examples=count, seed=seed)


def test_a_question_inside_is_part_of_the_prompt(tokenizer):
    cell = cell_of(tokenizer, COPY)
    assert cell.name == f"{COPY}, inside"
    assert [len(prompt) for prompt in cell.prompts] == [90] * 5
    assert cell.then == []
    for prompt, answer, example in zip(cell.prompts, cell.answers, cell.examples, strict=True):
        assert tokenizer.decode(prompt) == example.context + "[OUT]"
        assert tokenizer.decode(answer) == example.answer
        assert len(answer) == 25
    assert cell.max_tokens == 128


def test_a_question_after_comes_when_the_context_has_been_compressed(tokenizer):
    inside, after = (cell_of(tokenizer, "recall(tokens=90,facts=12)", place) for place in ("inside", "after"))
    assert after.name == "recall(tokens=90,facts=12), after"
    assert [one + more for one, more in zip(after.prompts, after.then, strict=True)] == inside.prompts
    assert [len(more) for more in after.then] == [6] * 5  # [ASK], four keys, [ANS]
    assert (after.answers, after.examples, after.max_tokens) == (inside.answers, inside.examples, inside.max_tokens)


def test_problems_without_a_question_of_their_own_have_one_regime(tokenizer):
    inside = cell_of(tokenizer, OWN)
    assert not all(example.question for example in inside.examples)
    assert [tokenizer.decode(prompt) for prompt in inside.prompts] == [
        one.context + one.question for one in inside.examples
    ]
    with pytest.raises(UserError, match=r"^jsonl.* has problems whose question is not apart: use --questions=inside\."):
        cell_of(tokenizer, OWN, "after")
    assert len(cell_of(tokenizer, OWN, "after", count=2).then) == 2


def test_room_is_in_steps_that_tasks_of_about_one_size_share(tokenizer):
    """An answer takes three tokens; a question that comes after the context is counted as well."""
    assert cell_of(tokenizer, "needle(tokens=125)").max_tokens == 128
    for place in ("inside", "after"):
        assert cell_of(tokenizer, "needle(tokens=128)", place).max_tokens == 256


def test_examples_follow_from_seed_and_number(tokenizer):
    five, three = cell_of(tokenizer, COPY), cell_of(tokenizer, COPY, count=3)
    assert five.examples[:3] == three.examples
    assert len({example.answer for example in five.examples}) == 5
    other = cell_of(tokenizer, COPY, seed=1)
    assert not {example.answer for example in five.examples} & {example.answer for example in other.examples}


def test_a_file_gives_as_many_examples_as_it_has(tokenizer):
    assert len(cell_of(tokenizer, OWN, count=10_000).examples) == parse_task(OWN).num_examples


def test_words_go_through_the_chat_template(tokenizer):
    cell = cell_of(tokenizer, "niah(tokens=600)", chat=True)
    text = tokenizer.decode(cell.prompts[0], skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_text_is_cut_into_prompt_and_scored_tokens(tokenizer):
    cell = cell_of(tokenizer, TEXT)
    for prompt, answer, example in zip(cell.prompts, cell.answers, cell.examples, strict=True):
        assert (len(prompt), len(answer)) == (50, 30)
        assert example.context.startswith(tokenizer.decode(prompt + answer))
    assert cell.then == []


def test_a_tokenizer_without_symbols_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="'copy.*' is written in symbols, and the model's tokenizer has no token") as e:
        cell_of(tokenizer_with(tmp_path, ()), COPY)
    assert "\n" not in str(e.value)


def run(tokenizer, cell, policies, *, batch=4, **wanted):
    """Rows and outputs by policy."""
    evaluator = Evaluator(model(), tokenizer, statistics=None, batch=batch, **{"speed": False, **wanted})
    return {str(policy): evaluator.evaluate(cell, policy) for policy in policies}


FULL, RANDOM, STREAMING, ORACLE = with_companions([parse_policy(POLICY)])


@pytest.fixture(scope="module")
def found(tokenizer):
    """Policies on five examples, four at a time, in both regimes, by place."""
    asked = {"inside": [FULL, RANDOM, STREAMING, ORACLE], "after": [FULL, STREAMING, ORACLE]}
    return {place: run(tokenizer, cell_of(tokenizer, COPY, place), policies) for place, policies in asked.items()}


@pytest.mark.parametrize("place", ["inside", "after"])
def test_full_agrees_with_itself(found, place):
    row, outputs = found[place]["full"]
    assert (row["task"], row["question"], row["policy"], row["examples"]) == (COPY, place, "full", 5)
    assert (row["agreement"], row["top1_agreement"], row["kl_mean"], row["kl_p999"]) == (1.0, 1.0, 0.0, 0.0)
    assert (row["perplexity_change"], row["evicted"], row["max_tokens"]) == (0.0, 0, 128)
    assert row["accuracy"] == np.mean(row["scores"]) == np.mean([one["score"] for one in outputs])
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert row["full_cache_bytes"] == 2 * 4 * 2 * 128 * 16 * 4  # keys and values, rows, heads, tokens, numbers, bytes


def test_answers_are_kept_beside_what_was_expected(found, tokenizer):
    cell = cell_of(tokenizer, COPY)
    _, outputs = found["inside"]["full"]
    assert [one["expected"] for one in outputs] == [example.answer for example in cell.examples]
    assert all({"score", "expected", "output", "facts"} == one.keys() for one in outputs)
    scores = [cell.task.score(one["output"], example) for one, example in zip(outputs, cell.examples, strict=True)]
    assert [one["score"] for one in outputs] == scores


def test_without_divergences_all_else_is_the_same(found, tokenizer):
    plain = run(tokenizer, cell_of(tokenizer, COPY), [FULL, STREAMING], divergence=False)
    for policy, (row, outputs) in plain.items():
        whole, answers = found["inside"][policy]
        assert outputs == answers
        assert "kl_mean" not in row
        assert row == {name: whole[name] for name in row}


def test_answers_are_those_of_passes_over_everything(found, tokenizer):
    cell = cell_of(tokenizer, COPY)
    tokens = list(cell.prompts[4])  # alone in the last batch
    stops = {*tokenizer.encode("[END]", add_special_tokens=False), *tokenizer.stop_tokens}
    while len(tokens) < 90 + 25 and tokens[-1] not in stops:
        tokens.append(int(whole_pass(model(), tokens)[-1].argmax()))
    assert found["inside"]["full"][1][4]["output"] == tokenizer.decode(tokens[90:])


@pytest.mark.parametrize("place", ["inside", "after"])
def test_a_smaller_cache_moves_distributions_and_the_oracle_moves_them_least(found, place):
    full, *others = [row for row, _ in found[place].values()]
    for row in others:
        assert row["kl_mean"] > 1e-3
        assert row["top1_agreement"] < 1.0
        assert row["evicted"] > 0
        assert row["tokens"] == full["tokens"]  # all are led along the same answers
        assert row["ratio_to_dtype"] > 2
    *blind, oracle = [row["kl_mean"] for row in others]
    assert oracle < min(blind)


def test_companions_have_the_same_bytes(found):
    rows = [found["inside"][str(policy)][0] for policy in (RANDOM, STREAMING, ORACLE)]
    for name in ("cache_bytes", "device_bytes", "ratio_to_dtype", "full_cache_bytes"):
        assert len({row[name] for row in rows}) == 1, name


def test_a_partial_last_batch_counts_each_example_once(found, tokenizer):
    """Five at a time give what four and one gave."""
    whole = run(tokenizer, cell_of(tokenizer, COPY), [FULL, ORACLE], batch=5)
    for policy, (theirs, expected) in whole.items():
        ours, outputs = found["inside"][policy]
        assert outputs == expected
        for name in ("tokens", "scores", "accuracy", "agreement", "examples"):
            assert ours[name] == theirs[name]
        for name in ("kl_mean", "perplexity", "perplexity_change", "top1_agreement"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_the_same_numbers_come_twice_whatever_was_asked_first(found, tokenizer):
    """A policy that is evaluated alone has full's answers to be compared with all the same."""
    again = run(tokenizer, cell_of(tokenizer, COPY), [ORACLE])
    assert again[str(ORACLE)] == found["inside"][str(ORACLE)]


@pytest.fixture(scope="module")
def of_text(tokenizer):
    """Three pieces of text, two at a time."""
    cell = cell_of(tokenizer, TEXT, count=3)
    policies = [FULL, parse_policy("turboquant(bits=1)+exact(sinks=2,window=8,round=8)")]
    return cell, run(tokenizer, cell, policies, batch=2, speed=True)


def test_perplexity_is_that_of_one_pass_over_each_text(of_text):
    cell, rows = of_text
    row, outputs = rows["full"]
    logs = [
        log_softmax(whole_pass(model(), prompt + answer).astype(np.float64), axis=-1)[49:-1][np.arange(30), answer]
        for prompt, answer in zip(cell.prompts, cell.answers, strict=True)
    ]
    assert row["perplexity"] == pytest.approx(np.exp(-np.mean(logs)), rel=1e-4)
    assert (row["tokens"], row["examples"], outputs) == (90, 3, [])
    assert not {"accuracy", "agreement", "scores"} & row.keys()


def test_codecs_are_compared_along_the_text(of_text):
    _, rows = of_text
    (full, _), (coded, outputs) = rows.values()
    assert coded["kl_mean"] > 1e-3
    assert coded["perplexity"] == pytest.approx(full["perplexity"] * (1 + coded["perplexity_change"]), rel=1e-6)
    assert coded["key_bits"] == 1 + 16 / 16  # and the length of each key
    assert full["key_bits"] == 32
    assert outputs == []


def test_speed_is_measured_where_that_is_asked_for(of_text, found):
    assert all(row["tokens_per_second"] > 0 for row, _ in of_text[1].values())
    assert "tokens_per_second" not in found["inside"]["full"][0]
