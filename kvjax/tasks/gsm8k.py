"""GSM8K: word problems of a few steps of arithmetic (Cobbe et al., arXiv 2110.14168), solved in a chain of thought.

The authors' scorer takes the text behind the first "####", drops its commas and compares it letter by letter. Ours
compares numbers (18.00 is 18), passes over what a model thought before `</think>`, and without a "####" takes a number
that is boxed or said to be the answer. The prompt shows no solved problems.
"""

import dataclasses

import numpy as np

from kvjax.answers import final_number
from kvjax.errors import UserError, check_between
from kvjax.records import read_records, record_at, record_field
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import fitting_prompt

_EXAMPLE = '{"question": "...", "answer": "... #### 18"}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8k(Task):
    """Asks the problems of a file, in its order.

    Attributes:
      tokens: most of context and question together, chat template included; a problem that takes more is an error.
      new_tokens: most tokens of an answer, chain of thought included.
      file: objects with "question" and "answer", one a line.
    """

    tokens: int = 2048
    new_tokens: int = 1024
    file: str = "../shared/data/gsm8k/test.jsonl"

    def __post_init__(self):
        check_between("gsm8k(new_tokens)", self.new_tokens, 1, 1 << 20)

    @property
    def num_examples(self) -> int:
        """Problems of the file."""
        return len(self._records())

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        where, record = record_at(self._records(), index, self.name)
        problem = record_field(record, "question", str, where).strip()
        solution = record_field(record, "answer", str, where)
        answer = final_number(solution)
        if answer is None:
            raise UserError(f"{where}: the answer ends in no number behind '####', as in {_EXAMPLE}.")
        question = "Solve this problem step by step. Then write the answer, a number, on a last line: #### NUMBER"
        prompt = fitting_prompt(self, material, f"{problem}\n\n", question, lead="\nSolution:")
        return Example(context=prompt[0], question=prompt[1], answer=f"#### {answer}", facts={"index": index})

    def score(self, output: str, example: Example) -> float:
        """1 for the right number."""
        return float(final_number(output) == final_number(example.answer))

    def _records(self) -> tuple:
        return read_records(self.file, kind="file of problems", example=_EXAMPLE)


TASKS.register("gsm8k", Gsm8k)
