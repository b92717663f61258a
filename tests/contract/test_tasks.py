"""What holds for every task, whatever its file: the list of them is the registry's, and none can opt out."""

import dataclasses

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.symbols import SYMBOLS
from kvjax.task import TASKS, example_of
from tests.contract.tasks import example, material_of, task_of
from tests.puzzles import numbers

NAMES = TASKS.names()
ENDLESS = [name for name in NAMES if task_of(name).num_examples is None]
"""Tasks that make their problems; the others read them from a file."""
IN_SYMBOLS = [name for name in NAMES if TASKS.get(name).symbols]
GENERATED = [name for name in NAMES if not TASKS.get(name).forced]
"""Tasks that ask for an answer; the others give a text."""
LEARNED = [name for name in NAMES if hasattr(TASKS.get(name), "sized")]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_static_hashable_and_named(name):
    task = task_of(name)
    assert task == task_of(name)
    assert hash(task) == hash(task_of(name))
    assert task.name.split("(")[0] == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.tokens = 3


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_says_what_its_arguments_are(name):
    described = TASKS.get(name).__doc__ or ""
    missing = [field.name for field in dataclasses.fields(TASKS.get(name)) if f" {field.name}: " not in described]
    assert not [field for field in missing if field != "tokens"]  # `Task` says what tokens are


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_and_number_give_the_same_example(name):
    assert example(name, seed=5, index=2) == example_of(task_of(name), material_of(name), seed=5, index=2)


@pytest.mark.parametrize("name", NAMES)
def test_examples_differ(name):
    """From number to number, and where problems are made rather than read also from seed to seed."""
    seeds = (0, 5) if name in ENDLESS else (0,)
    found = [example(name, seed=seed, index=index) for seed in seeds for index in range(3)]
    assert len({one.context + one.question for one in found}) == len(found)


@pytest.mark.parametrize("name", GENERATED)
def test_the_right_answer_scores_and_others_do_not(name):
    task, this = task_of(name), example(name)
    assert task.score(this.answer, this) == 1.0
    assert task.score("", this) == 0.0
    others = [other for other in (example(name, index=index) for index in range(1, 9)) if other.answer != this.answer]
    assert others
    assert all(0.0 <= task.score(other.answer, this) < 1.0 for other in others)


@pytest.mark.parametrize("name", sorted({*ENDLESS} & {*GENERATED}))
def test_context_and_question_fit_the_tokens(name):
    for index in range(5):
        one = example(name, index=index)
        assert material_of(name).count(one.context + one.question) <= task_of(name).tokens


@pytest.mark.parametrize("name", sorted({*ENDLESS} & {*GENERATED}))
def test_too_few_tokens_are_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        example_of(task_of(name, tokens=3), material_of(name), seed=0, index=0)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", IN_SYMBOLS)
def test_token_counts_of_symbols_are_exact(name):
    task, count = task_of(name), material_of(name).count
    assert set(task.symbols) <= set(SYMBOLS)
    for index in range(5):
        one = example(name, index=index)
        assert count(one.context + one.question) == task.tokens
        if name == "dfs":  # as long as the tree has inner nodes
            assert task.new_tokens // 2 < count(one.answer) <= task.new_tokens
        else:
            assert count(one.answer) == task.new_tokens
        assert one.answer.endswith(task.stop)
        assert one.answer.count(task.stop) == 1


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("room", [24, 31, 64, 100, 257, 1024])
def test_random_settings_fit_their_room(name, room):
    for seed in range(5 if room > 100 else 40):
        rng = np.random.default_rng((seed, room))
        task = TASKS.get(name).sized(rng, room)
        one = task.example(rng, material_of(name), more=3)
        count = material_of(name).count
        assert count(one.context + one.question + one.answer) <= room
        assert count(one.context + one.question) == task.tokens
        assert len(one.more) in (0, 3)


@pytest.mark.parametrize("name", LEARNED)
def test_further_questions_leave_the_example_as_it_is(name):
    """The filler may be cut elsewhere."""
    plain, more = (task_of(name).example(np.random.default_rng(4), material_of(name), more=count) for count in (0, 3))
    assert (plain.question, plain.answer) == (more.question, more.answer)
    assert sorted(numbers(plain.context)) == sorted(numbers(more.context))
