"""MATH-500: 500 competition problems (Lightman et al., arXiv 2305.20050, from MATH, 2103.03874) with boxed answers.

MATH's own scorer compares the last boxed strings after mending their LaTeX; that of MATH-500 also asks sympy. Ours
(`kvjax/answers.py`) needs no library: after the like mending, answers are also equal if they have the same value at a
few points of their letters, part by part in tuples, intervals, sets and matrices. So an expanded product passes for a
factored one; lists without brackets and sets may come in any order; a decimal fraction counts if it is exact. What a
model thought before `</think>` is passed over, and where nothing is boxed, what is said to be the answer counts.
"""

import dataclasses

import numpy as np

from kvjax.answers import final_answer, same_formula
from kvjax.errors import check_between
from kvjax.records import read_records, record_at, record_field
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import fitting_prompt

_EXAMPLE = '{"problem": "...", "answer": "\\\\frac{1}{2}"}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Math500(Task):
    """Asks the problems of a file, in its order.

    Attributes:
      tokens: most of context and question together, chat template included; a problem that takes more is an error.
      new_tokens: most tokens of an answer, chain of thought included.
      file: objects with "problem" and "answer", a list of them or one a line.
    """

    tokens: int = 2048
    new_tokens: int = 2048
    file: str = "../shared/data/math500/math500.json"

    def __post_init__(self):
        check_between("math500(new_tokens)", self.new_tokens, 1, 1 << 20)

    @property
    def num_examples(self) -> int:
        """Problems of the file."""
        return len(self._records())

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        where, record = record_at(self._records(), index, self.name)
        problem = record_field(record, "problem", str, where).strip()
        answer = record_field(record, "answer", str, where)
        question = "Solve this problem step by step. Then write the answer in a box: \\boxed{ANSWER}"
        prompt = fitting_prompt(self, material, f"{problem}\n\n", question, lead="\nSolution:")
        return Example(context=prompt[0], question=prompt[1], answer=f"\\boxed{{{answer}}}", facts={"index": index})

    def score(self, output: str, example: Example) -> float:
        """1 for an answer that means the same as the right one."""
        given, expected = final_answer(output), final_answer(example.answer)
        return float(given is not None and expected is not None and same_formula(given, expected))

    def _records(self) -> tuple:
        return read_records(self.file, kind="file of problems", example=_EXAMPLE)


TASKS.register("math500", Math500)
