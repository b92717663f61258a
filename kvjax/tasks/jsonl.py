"""JSONL: prompts and answers of one's own, one object a line.

{"prompt": "...", "answer": "..."}     {"context": "...", "question": "...", "answer": ["...", "..."], "id": "a7"}

Where an answer is a list, each of its strings is right. A question comes an empty line behind its context. A prompt is
all context, and nothing more is asked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvjax.answers import contains_words, final_number, plain_words, without_thoughts
from kvjax.errors import UserError, check_between, check_choice, unknown
from kvjax.records import read_records, record_at, record_field
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import fitting_prompt

_EXAMPLE = '{"prompt": "...", "answer": "..."}'
_FIELDS = ("prompt", "context", "question", "answer", "id")
_MATCHES = ("exact", "contains", "number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsonl(Task):
    """Asks what a file says, in its order.

    Attributes:
      tokens: most of context and question together, chat template included; a prompt that takes more is an error.
      new_tokens: most tokens of an answer.
      file: objects with "prompt" (or "context" and "question"), "answer", and an "id" if one likes.
      match: "exact": output and answer are the same words, whatever their case, punctuation and articles (SQuAD's
        exact match, arXiv 1606.05250, but a hyphen parts words and a minus stays); "contains": the answer's words stand
        in the output; "number": the number that the output gives as its answer, or ends in, has the answer's value.
    """

    tokens: int = 1 << 17
    new_tokens: int = 128
    file: str = ""
    match: str = "exact"

    def __post_init__(self):
        if not self.file:
            raise UserError("The task jsonl needs a file: jsonl(file=problems.jsonl).")
        check_between("jsonl(new_tokens)", self.new_tokens, 1, 1 << 20)
        check_choice("jsonl(match)", self.match, _MATCHES)

    @property
    def num_examples(self) -> int:
        """Objects of the file."""
        return len(self._records())

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        where, record = record_at(self._records(), index, self.name)
        context, question = _prompt_fields(record, where)
        answers = _answers(record, where)
        if self.match == "number" and any(final_number(answer, anywhere=True) is None for answer in answers):
            raise UserError(f"{where}: the answer is no number, which match=number compares.")
        prompt = fitting_prompt(self, material, context, question, lead="")
        name = record_field(record, "id", (str, int), where) if "id" in record else index
        return Example(
            context=prompt[0], question=prompt[1], answer=answers[0], accepted=answers[1:], facts={"id": name}
        )

    def score(self, output: str, example: Example) -> float:
        """1 for one of the right answers."""
        output = without_thoughts(output).strip()
        return float(any(self._is(output, answer) for answer in (example.answer, *example.accepted)))

    def _is(self, output: str, answer: str) -> bool:
        match self.match:
            case "number":
                return final_number(output, anywhere=True) == final_number(answer, anywhere=True)
            case "contains":
                return contains_words(output, answer)
            case _:
                # Signs alone have no words to compare.
                return output == answer.strip() or plain_words(output) == plain_words(answer) != ""

    def _records(self) -> tuple:
        return read_records(self.file, kind="file of problems", example=_EXAMPLE)


def _prompt_fields(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    for name in record:
        if name not in _FIELDS:
            raise UserError(f"{where}: {unknown('field', name, _FIELDS)}")
    if ("prompt" in record) == ("context" in record) or ("context" in record) != ("question" in record):
        raise UserError(f'{where}: give either "prompt", or "context" and "question".')
    names = ("prompt",) if "prompt" in record else ("context", "question")
    texts = [record_field(record, name, str, where) for name in names]
    if not "".join(texts).strip():
        raise UserError(f"{where}: the prompt is empty.")
    if len(texts) == 1:
        return texts[0], ""
    return texts[0] + ("" if texts[0][-1:].isspace() else "\n\n"), texts[1]


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = record_field(record, "answer", (str, int, float, list), where)
    answers = tuple(map(str, found)) if isinstance(found, list) else (str(found),)
    if not answers or not all(answer.strip() for answer in answers):
        raise UserError(f"{where}: there is no answer, or an empty one.")
    return answers


TASKS.register("jsonl", Jsonl)
