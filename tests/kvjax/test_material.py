"""What examples are made of for a tokenizer, and whether it has a task's symbols."""

import numpy as np
import pytest

from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.errors import UserError
from kvjax.filler import sentences
from kvjax.material import check_symbols, material_for
from kvjax.symbols import SYMBOLS, num_tokens
from kvjax.task import TASKS, example_of
from kvjax.task_grammar import parse_task
from kvjax.text import load_tokenizer
from tests.contract.tasks import ARGUMENTS, task_of

OF_SYMBOLS = [name for name in TASKS.names() if TASKS.get(name).symbols]


def tokenizer_with(folder, symbols):
    write_byte_tokenizer(folder, vocab_size=384, max_positions=512, symbols=symbols)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def symbolic(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("symbolic"), SYMBOLS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("plain"), ())


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_in_symbols_have_characters_for_filler_and_no_conversation(symbolic, chat):
    material = material_for(parse_task("needle"), symbolic, chat=chat)
    assert (material.filler, material.count, material.chat) == (sentences, num_tokens, None)


@pytest.mark.parametrize("name", OF_SYMBOLS)
def test_their_tokens_are_the_tokenizers(symbolic, name):
    """What a task counts is what a model reads."""
    task = task_of(name)
    example = example_of(task, material_for(task, symbolic, chat=False), seed=0, index=0)
    assert len(symbolic.encode(example.context + example.question, add_special_tokens=False)) == task.tokens


def test_tasks_in_words_are_counted_by_the_tokenizer(plain):
    material = material_for(parse_task("niah"), plain, chat=False)
    assert material.count("a violin, ö") == len("a violin, ö".encode())
    assert material.chat is None
    text = material.filler(np.random.default_rng(0), 300)
    assert 200 < material.count(text) <= 300
    assert text.endswith(". ")


def test_a_conversation_is_that_of_the_tokenizers_template(plain):
    material = material_for(parse_task("niah"), plain, chat=True)
    assert material.chat("Which code?") == plain.chat([{"role": "user", "content": "Which code?"}])
    assert material.chat("Which code?").startswith("<|im_start|>user\nWhich code?")


def test_whoever_has_the_symbols_may_have_every_task(symbolic):
    for name in TASKS.names():
        check_symbols(task_of(name), symbolic)


def test_tasks_in_words_need_no_symbols(plain):
    for name in set(ARGUMENTS) - set(OF_SYMBOLS):
        check_symbols(task_of(name), plain)
    check_symbols(parse_task("niah"), plain)


@pytest.mark.parametrize("name", OF_SYMBOLS)
def test_a_tokenizer_without_them_is_refused(plain, name):
    task = task_of(name)
    with pytest.raises(UserError) as caught:
        check_symbols(task, plain)
    message = str(caught.value)
    assert message.startswith(f"The task '{task.name}' is written in symbols, and the model's tokenizer has no token '")
    assert message.endswith("use models/tiny, or a task in words such as niah.")
    assert "\n" not in message


def test_one_symbol_that_is_missing_is_named(tmp_path):
    tokenizer = tokenizer_with(tmp_path, [one for one in SYMBOLS if one != "<57>"])
    with pytest.raises(UserError, match="has no token '<57>'"):
        check_symbols(parse_task("needle"), tokenizer)
