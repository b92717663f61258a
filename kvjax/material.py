"""What the examples of a task are made of for a model's tokenizer, and whether it has the symbols that a task needs."""

from kvjax.errors import UserError
from kvjax.filler import sentences, sentences_of_tokens
from kvjax.symbols import num_tokens
from kvjax.task import Material, Task
from kvjax.text import Tokenizer


def material_for(task: Task, tokenizer: Tokenizer, *, chat: bool) -> Material:
    """Filler and a counter of tokens that suit a task and a tokenizer."""
    if task.symbols:
        return Material(filler=sentences, count=num_tokens)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    def as_user(text: str) -> str:
        return tokenizer.chat([{"role": "user", "content": text}])

    return Material(filler=sentences_of_tokens(count), count=count, chat=as_user if chat else None)


def check_symbols(task: Task, tokenizer: Tokenizer) -> None:
    """Raises `UserError` unless each of a task's symbols is one token."""
    for symbol in (*task.symbols, *filter(None, [task.stop])):
        if len(tokenizer.encode(symbol, add_special_tokens=False)) != 1:
            raise UserError(
                f"The task '{task.name}' is written in symbols, and the model's tokenizer has no token '{symbol}': use "
                "models/tiny, or a task in words such as niah."
            )
