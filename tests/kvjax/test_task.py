"""Tasks have names as people type them, and examples that seed and number decide."""

import dataclasses

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.lessons import TEST, TRAIN
from kvjax.task import TASKS, Example, Task, check_fits, example_of
from kvjax.tasks.hops import Hops
from kvjax.tasks.needle import Needle
from tests.puzzles import MATERIAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw(Task):
    """Its example is a random number and the arguments that it came with."""

    def example(self, rng, material, *, index=0, more=0):
        return Example(context=str(rng.random()), question="", answer="", facts={"index": index, "more": more})


def test_a_name_holds_the_arguments_that_are_not_the_defaults():
    assert Needle().name == "needle"
    assert Needle(depth=0.5).name == "needle(depth=0.5)"
    assert Hops(chains=2, tokens=100).name == "hops(tokens=100,chains=2)"


def test_unknown_tasks_are_refused_and_the_nearest_is_named():
    with pytest.raises(UserError, match="Unknown task 'neddle'. Did you mean 'needle'"):
        TASKS.get("neddle")


def test_seed_and_number_decide_an_example():
    drawn = {(seed, index): example_of(Draw(), MATERIAL, seed=seed, index=index) for seed in (0, 7) for index in (0, 3)}
    assert len({example.context for example in drawn.values()}) == 4
    assert drawn[7, 3] == example_of(Draw(), MATERIAL, seed=7, index=3)
    assert drawn[7, 3].facts == {"index": 3, "more": 0}


def test_random_numbers_of_examples_are_not_those_of_rows_to_learn_from():
    examples = {example_of(Draw(), MATERIAL, seed=0, index=index).context for index in range(5)}
    rows = {str(np.random.default_rng((0, *rest)).random()) for rest in [(TRAIN, 0), (TRAIN, 1), (TEST, 0), (TEST, 1)]}
    assert not examples & rows


def test_pieces_that_take_more_than_the_tokens_are_refused():
    check_fits(Needle(tokens=20), 20)
    with pytest.raises(
        UserError, match=r"^needle\(tokens=20\) has 20 tokens, and what it holds takes 21: raise tokens\.$"
    ):
        check_fits(Needle(tokens=20), 21)


def test_what_a_task_need_not_say_and_what_it_must():
    """Endless examples and generated answers are the rule; all else a task must define."""
    task = Task()
    assert (task.num_examples, task.forced, task.stop, task.symbols) == (None, False, "", ())
    example = Example(context="a", question="b", answer="c")
    for call in (lambda: task.new_tokens, lambda: example_of(task, MATERIAL, seed=0, index=0)):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(NotImplementedError):
        task.score("c", example)
