"""Text in and out: `tokenizer.json`, chat templates, and streaming that never prints half a character."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvjax.errors import UserError
from kvjax.folder import find_checkpoint, read_json

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 8  # more than a character has bytes


class Tokenizer:
    """Token ids of texts and back, and prompts of conversations; `load_tokenizer` makes one.

    Args:
      tokenizer: the loaded `tokenizer.json`.
      settings: the content of `tokenizer_config.json`.
      template: the chat template, or None if the model has none.
      stop_tokens: ids at which a generation ends.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        settings: Mapping[str, Any],
        template: str | None,
        stop_tokens: Sequence[int],
    ):
        self._tokenizer = tokenizer
        self._special = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        # transformers 4 puts the first token itself where this is set, whatever tokenizer.json does.
        first = tokenizer.token_to_id(self._special["bos_token"] or "") if settings.get("add_bos_token") else None
        self._first_tokens = [] if first is None else [first]
        self._template_text = template
        self.stop_tokens: tuple[int, ...] = tuple(stop_tokens)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included; the model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text; the names of special tokens in it become those tokens.
          add_special_tokens: whether to put what the tokenizer puts around a text, such as a first token.
        """
        tokens = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not add_special_tokens or tokens[:1] == self._first_tokens:
            return tokens
        return self._first_tokens + tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def stream(self, *, after: Sequence[int] = (), skip_special_tokens: bool = True) -> "TextStream":
        """A decoder to feed with tokens as they come.

        Args:
          after: the tokens that the text continues, if it does: some tokenizers drop the space before a first word.
          skip_special_tokens: whether special tokens have no text.
        """
        return TextStream(self, after=after, skip_special_tokens=skip_special_tokens)

    def continuation(self, tokens: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of tokens that continue others; see `stream`."""
        stream = self.stream(after=after)
        return stream.push(tokens) + stream.finish()

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation, special tokens spelt out; encode it with `add_special_tokens=False`.

        Args:
          messages: dicts with "role" and "content".
          **variables: further variables of the template, e.g. `enable_thinking=False` for Qwen3.

        Raises:
          UserError: the model has no chat template, or its template fails or refuses the messages.
        """
        if self._template_text is None:
            raise UserError("The model has no chat template (tokenizer_config.json); use a plain prompt.")
        special = {name: token for name, token in self._special.items() if token is not None}
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **special, **variables}
        try:
            template = _compile(self._template_text)
        except jinja2.TemplateError as error:
            raise UserError(f"The model's chat template is malformed: {error}.") from error
        try:
            return template.render(messages=list(messages), **given)
        except Exception as error:  # whatever the checkpoint's own code raises
            raise UserError(f"The chat template does not take these messages: {error}.") from error


class TextStream:
    """Turns tokens into text piece by piece; what might be the start of a longer character waits.

    A token can end inside a UTF-8 character, and some tokenizers write a word differently at the start of a text. So
    each step decodes a short run of tokens, from the last clean boundary on, and returns what is new in it.

        tokens   [ ... shown | boundary run | new ]
        text           known: decode(run)   decode(run + new) minus known
    """

    def __init__(self, tokenizer: Tokenizer, *, after: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._run = list(after[-_CONTEXT_TOKENS:])  # tokens since the boundary
        self._known = self._decode(self._run)  # text of the run that was returned already

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that is certain now."""
        return "".join(self._push_one(token) for token in tokens)

    def finish(self) -> str:
        """Returns what still waits, undecodable bytes as replacement characters."""
        text = self._decode(self._run)
        rest = text[len(self._known) :]
        self._run, self._known = [], ""
        return rest

    def _push_one(self, token: int) -> str:
        self._run.append(token)
        text = self._decode(self._run)
        if text.endswith(_UNFINISHED) or len(text) <= len(self._known):
            return ""
        new = text[len(self._known) :]
        # The newest tokens are context enough for the next one. If they begin inside a character, what stands for
        # its rest is in the known text, now and after the next token alike.
        self._run = self._run[-_CONTEXT_TOKENS:]
        self._known = self._decode(self._run)
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint folder (or hub name).

    Args:
      folder: holds `tokenizer.json`; `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json` and
        `config.json` are read where they are.

    Raises:
      UserError: a file is missing or malformed.
    """
    path = find_checkpoint(folder, weights=False)
    file = path / "tokenizer.json"
    if not file.exists():
        raise UserError(f"There is no {file}: convert the tokenizer with transformers' save_pretrained first.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{file} is not a tokenizer: {error}.") from error
    settings = read_json(path / "tokenizer_config.json", default={})
    return Tokenizer(
        tokenizer,
        settings=settings,
        template=_read_template(path, settings),
        stop_tokens=_stop_tokens(path, tokenizer, settings),
    )


def _read_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, a string, or the one named "default" of several."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}.") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: the chat_template of tokenizer_config.json is no text but {template!r}.")
    return template


def _stop_tokens(path: Path, tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json, else config.json, and the tokenizer's own."""
    generation = read_json(path / "generation_config.json", default={})
    config = read_json(path / "config.json", default={})
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < 2**31 for end in ids):
        raise UserError(f"{path}: eos_token_id is {ends!r}; a token id or a list of them was expected.")
    found = set(ids)
    own = tokenizer.token_to_id(_content(settings.get("eos_token")) or "")
    return tuple(sorted(found if own is None else found | {own}))


def _content(token: Any) -> str | None:
    """The text of a special token, which may be wrapped in a dict."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
        raise UserError(f"A special token in tokenizer_config.json is no text but {text!r}.")
    return text


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """A template ready to render; compiling takes longer than rendering."""
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates come with checkpoints, so they run where they can change nothing and reach nothing."""
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, by which templates mark replies for training: rendered as what it holds."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Reads the block and gives its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers gives it to templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
