"""Examples of tasks as prompts: the same ones as in evaluations, where answers end, and what is said of them."""

import pytest

from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.errors import UserError
from kvjax.evaluation import make_cell
from kvjax.material import material_for
from kvjax.posing import check_posable, pose
from kvjax.symbols import SYMBOLS
from kvjax.task_grammar import parse_task
from kvjax.text import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("symbols")
    write_byte_tokenizer(folder, vocab_size=384, max_positions=512, symbols=SYMBOLS)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", ["dfs(nodes=5,tokens=60)", "needle(tokens=90)", "niah(tokens=400)"])
def test_a_number_names_the_example_of_an_evaluation(tokenizer, name):
    """That of `kvjax.evaluate` with its default seed, question inside."""
    task = parse_task(name)
    material = material_for(task, tokenizer, chat=False)
    cell = make_cell(task, "inside", tokenizer=tokenizer, material=material, num_examples=3, seed=2)
    posed = [pose(task, tokenizer, index=index, chat=False) for index in range(3)]
    assert [one.tokens for one in posed] == cell.prompts
    assert [one.example for one in posed] == list(cell.examples)
    assert len({one.text for one in posed}) == 3


def test_symbols_end_an_answer_and_right_answers_are_right(tokenizer):
    posed = pose(parse_task("dfs(nodes=3,tokens=40)"), tokenizer, index=4, chat=False)
    assert posed.name == "dfs(tokens=40,nodes=3), example 4"
    assert len(posed.tokens) == 40
    assert tokenizer.decode(posed.stop_tokens) == "[END]"
    answer = posed.example.answer
    assert posed.score(answer) == 1.0
    assert posed.verdict(1.0) == "right"
    assert posed.verdict(posed.score("[IN]")) == f"wrong, expected {answer}"
    assert posed.verdict(0.0, says_expected=False) == "wrong"
    assert posed.verdict(0.5, says_expected=False) == "partly right (0.50)"
    assert posed.record() == {"name": posed.task.name, "example": 4, "expected": answer}


def test_what_cannot_be_posed(tokenizer, tmp_path):
    write_byte_tokenizer(tmp_path, vocab_size=300, max_positions=512)
    with pytest.raises(UserError, match="has no token"):
        pose(parse_task("dfs"), load_tokenizer(tmp_path), index=0, chat=False)
    with pytest.raises(UserError, match="scores a text that is given, so there is nothing to decode"):
        check_posable(parse_task("ppl"), index=0)
    with pytest.raises(UserError, match="config.task_example is -1; it must be at least 0"):
        check_posable(parse_task("dfs"), index=-1)
