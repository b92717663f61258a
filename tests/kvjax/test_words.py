"""Prompts of word tasks: chat templates, lengths, names, needles, words found."""

import gzip
import shutil

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.filler import sentences_of_tokens
from kvjax.task import Material, Task, example_of
from kvjax.task_grammar import parse_task
from kvjax.text import load_tokenizer
from kvjax.words import (
    draw_names,
    filler_sentences,
    fitting_prompt,
    longest_prompt,
    prompt_of,
    share_found,
    weave,
)
from tests.wordings import CHAT, MATERIAL


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("context", "question", "expected"),
    [
        ("Facts.\n\n", "What?", ("<user> Facts.\n\n", "What? <assistant> ")),
        (" \n Facts.\n\n", "What? ", ("<user> Facts.\n\n", "What? <assistant> ")),
        ("", "What?", ("<user> ", "What? <assistant> ")),
        ("Facts.\n", "", ("<user> Facts.", " <assistant> ")),
        ("a ", "a", ("<user> a ", "a <assistant> ")),
    ],
)
def test_a_chat_template_is_cut_where_the_question_begins(context, question, expected):
    assert prompt_of(CHAT, context, question) == expected


def test_without_a_template_a_lead_begins_the_answer():
    assert prompt_of(MATERIAL, "Facts.\n\n", "What?") == ("Facts.\n\n", "What?\nAnswer:")
    assert prompt_of(MATERIAL, "Facts.\n\n", "What?", lead="") == ("Facts.\n\n", "What?")


def test_a_template_that_changes_words_is_refused():
    loud = Material(filler=MATERIAL.filler, count=MATERIAL.count, chat=str.upper)
    with pytest.raises(UserError, match="chat template writes other words than the user's"):
        prompt_of(loud, "facts ", "what")


def test_prompts_that_do_not_fit_are_refused():
    assert fitting_prompt(parse_task("niah(tokens=4)"), MATERIAL, "a b ", "c d", lead="") == ("a b ", "c d")
    with pytest.raises(UserError, match=r"niah\(tokens=3\) has 3 tokens, and what it holds takes 4"):
        fitting_prompt(parse_task("niah(tokens=3)"), MATERIAL, "a b ", "c d", lead="")


@pytest.mark.parametrize("each", [1, 3, 40])
@pytest.mark.parametrize("tokens", [10, 11, 49, 300])
def test_the_longest_prompt(each, tokens):
    """Pieces of one size: not one more would fit."""
    task = Task(tokens=tokens)
    pieces, prompt = longest_prompt(task, MATERIAL, lambda n: ("w " * each * n, "w " * 10), 1000)
    assert pieces == (tokens - 10) // each
    assert prompt == ("w " * each * pieces, "w " * 10)


def test_pieces_of_many_sizes_fill_a_prompt_and_never_run_over():
    for seed in range(50):
        sizes = rng(seed).integers(1, 30, size=400)
        task = Task(tokens=int(rng(seed).integers(10, 3000)))
        build = lambda n, sizes=sizes: ("w " * int(sizes[:n].sum()), "w " * 10)  # noqa: E731
        pieces, prompt = longest_prompt(task, MATERIAL, build, len(sizes))
        taken = MATERIAL.count("".join(prompt))
        assert taken <= task.tokens
        assert taken > task.tokens - 90 or pieces == 400


def test_a_prompt_with_all_pieces_and_one_without_room(caplog):
    assert longest_prompt(Task(tokens=99), MATERIAL, lambda n: ("w " * n, "q"), 7)[0] == 7
    assert longest_prompt(Task(tokens=1), MATERIAL, lambda n: ("w " * n, "q"), 0) == (0, ("", "q"))
    with pytest.raises(UserError, match="niah.* what it holds takes 3: raise tokens"):
        longest_prompt(parse_task("niah(tokens=2)"), MATERIAL, lambda n: ("w " * n, "q q q"), 7)


def test_filler_comes_as_whole_sentences_more_than_fit():
    found = filler_sentences(rng(), MATERIAL, 300)
    assert all(piece.endswith(". ") and piece.count(".") == 1 for piece in found)
    assert MATERIAL.count("".join(found)) > 300


@pytest.mark.parametrize(("count", "words"), [(0, 2), (50, 2), (2226, 2), (2227, 3), (5000, 3)])
def test_names_differ_and_none_is_part_of_another(count, words):
    names = draw_names(rng(), count)
    assert len(set(names)) == len(names) == count
    assert {len(name.split("-")) for name in names} <= {words}
    assert all(len(set(name.split("-"))) == words for name in names)


def test_there_are_only_so_many_names():
    with pytest.raises(UserError, match="There are 91266 names for things, and 91267 are wanted: ask for fewer tokens"):
        draw_names(rng(), 91267)


def test_needles_lie_at_their_depths():
    sentences = [f"{index}. " for index in range(10)]
    assert weave(sentences, ["a. "], [0.0]).startswith("a. 0. ")
    assert weave(sentences, ["a. "], [1.0]).endswith("9. a. ")
    assert weave(sentences, ["a. ", "b. ", "c. "], [0.52, 0.1, 0.48]) == "0. b. 1. 2. 3. 4. a. c. 5. 6. 7. 8. 9. "
    assert weave([], ["a. ", "b. "], [0.9, 0.1]) == "a. b. "


def test_words_found():
    assert share_found("The codes are 12, 345 and BIG-lamp.", ["12", "345", "big-lamp", "67"]) == 0.75
    wrong = ["123", "312", "lamp", "big", "old-big-lamp"]
    assert share_found("It is 1123 or 3124; a very-big-lamp-post.", wrong) == 0.0
    assert share_found("", ["1"]) == 0.0
    assert share_found("a.b", ["a.b", "axb"]) == 0.5


@pytest.fixture(scope="module")
def qwen3(shared_data, tmp_path_factory):
    source, folder = shared_data / "qwen3-tokenizer", tmp_path_factory.mktemp("qwen3")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copy(source / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", ["niah(tokens=2048)", "niah(tokens=2048,haystack=needles)", "vt(tokens=2048)", "cwe"])
def test_prompts_of_a_real_tokenizer_are_as_long_as_asked_for(qwen3, name):
    def count(text):
        return len(qwen3.encode(text, add_special_tokens=False))

    def chat(words):
        return qwen3.chat([{"role": "user", "content": words}])

    task = parse_task(name)
    material = Material(filler=sentences_of_tokens(count), count=count, chat=chat)
    example = example_of(task, material, seed=0, index=0)
    apart, together = count(example.context) + count(example.question), count(example.context + example.question)
    assert apart == together == example.facts["tokens"]
    assert task.tokens - 40 < together <= task.tokens
    assert example.context.startswith("<|im_start|>user\n")
    assert example.question.endswith("<|im_end|>\n<|im_start|>assistant\n")
