"""Trains a small byte-level model: `python -m kvjax.train --config=configs/tiny_train.py`.

Learns to solve tasks (`kvjax/tasks/`), and the next byte of the texts that the config names. Stages go from short rows
to long ones; a stage ends when every task is solved as often as it asks, or after its most steps. The run writes lines
of numbers as it goes, checkpoints with orbax and goes on where it was stopped, and at the end writes a Hugging Face
checkpoint folder that `kvjax.decode` runs. A batch depends on the seed and the step alone, so an interrupted run gives
what an uninterrupted one gives.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from kvjax._program import Settings, run
from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.corpus import load_corpus
from kvjax.errors import UserError
from kvjax.folder import ROOT
from kvjax.learning import Checkpoints, Place, TrainState, make_optimizer, make_step, right_tokens, weighted_loss
from kvjax.lessons import Lessons, check_mix, tasks_of
from kvjax.report import commit
from kvjax.symbols import SYMBOLS
from kvjax.text import load_tokenizer
from models.hf_config import parse_config
from models.initialise import initialise
from models.save import save_checkpoint
from models.transformer import Transformer

_VALIDATION_TOKENS = 16_384
_VALIDATION_BATCH = 4
_FEWEST_TOKENS = 48  # half of them hold the smallest problem of each task


def learning_rate(config: ConfigDict, place: Place) -> float:
    """Warmed up over the first steps, constant over all stages but the last, which cools down to a share of it."""
    stage = config.stages[place.stage]
    warmth = min((place.step + 1) / config.warmup_steps, 1.0)
    rate = stage.get("learning_rate", config.learning_rate) * warmth
    if place.stage < len(config.stages) - 1:
        return rate
    done = place.stage_step / stage["most_steps"]
    return rate * (1 - done * (1 - config.final_learning_rate_share))


def mix_of(config: ConfigDict, stage: Mapping[str, Any]) -> Mapping[str, float]:
    """Shares of the rows of a stage: its own, or the run's."""
    return stage.get("mix") or config.mix.to_dict()


def next_place(config: ConfigDict, place: Place, accuracy: dict[str, float] | None) -> Place | None:
    """Where a run is after a step; None at the end.

    Args:
      config: the run's.
      place: of the step that was taken.
      accuracy: share of rows solved, task by task, where it was measured after this step.
    """
    stage = config.stages[place.stage]
    place = Place(place.step + 1, place.stage, place.stage_step + 1)
    solved = accuracy is not None and min(accuracy.values(), default=0.0) >= stage.get("accuracy", 2.0)
    if place.stage_step < stage["most_steps"] and not solved:
        return place
    return Place(place.step, place.stage + 1, 0) if place.stage + 1 < len(config.stages) else None


def make_lessons(config: ConfigDict, folder: Path) -> Lessons:
    """Tasks and texts to learn from; writes the tokenizer's files into a folder."""
    longest = max(stage["tokens"] for stage in config.stages)
    corpus = load_corpus(config.texts, held_out_share=config.held_out_share, row_tokens=longest)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    sizes = {"vocab_size": config.model.vocab_size, "max_positions": config.model.max_position_embeddings}
    write_byte_tokenizer(tokenizer, symbols=SYMBOLS, **sizes)
    books = bytes(corpus.train[corpus.train < 128].astype(np.uint8)).decode("ascii")
    return Lessons(load_tokenizer(tokenizer), corpus, books, config.text_weight, config.filler_weight)


def train(config: ConfigDict, *, quiet: bool = False) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
      config: see `configs/tiny_train.py`.
      quiet: print nothing.

    Raises:
      UserError: the texts are missing or too short, or the checkpoints are another model's.
    """
    folder = ROOT / config.checkpoint_folder
    lessons = make_lessons(config, folder)
    model_config = parse_config(dict(config.model), source="config.model")
    model = initialise(Transformer(model_config), jax.random.key(config.seed))
    checkpoints = Checkpoints(folder / "checkpoints")
    place, state = checkpoints.restore(TrainState(model, make_optimizer(config).init(model)))
    _say(quiet, f"{model_config.num_parameters():,} parameters, {len(lessons.corpus.train):,} bytes, from {place}")
    state = _train_steps(config, lessons, state, place=place, checkpoints=checkpoints, folder=folder, quiet=quiet)
    checkpoints.close()
    return state


def _train_steps(
    config: ConfigDict,
    lessons: Lessons,
    state: TrainState,
    *,
    place: Place | None,
    checkpoints: Checkpoints,
    folder: Path,
    quiet: bool,
) -> TrainState:
    """The loop over steps."""
    step_function = make_step(make_optimizer(config))
    log = _Log(folder / "log.jsonl", start=place.step)
    if place.stage >= len(config.stages):
        return state
    while place is not None:
        stage = config.stages[place.stage]
        sizes = {"rows": stage["rows"], "tokens": stage["tokens"]}
        rows = lessons.batch(place.step, mix=mix_of(config, stage), seed=config.seed, **sizes)
        rate = jnp.float32(learning_rate(config, place))
        state, loss = step_function(state, jnp.asarray(rows.tokens), jnp.asarray(rows.weights), rate)
        log.count(rows.tokens.size)
        done, accuracy = place.step + 1, None
        if done % config.validate_every == 0 or place.stage_step + 1 == stage["most_steps"]:
            accuracy = task_accuracy(state.model, lessons, config=config, stage=stage)
            held_out = _held_out_loss(state.model, lessons, stage["tokens"])
            line = log.write(done, tokens=stage["tokens"], loss=float(loss), held_out_loss=held_out, **accuracy)
            _say(quiet, line)
        before, place = place, next_place(config, place, accuracy)
        if done % config.checkpoint_every == 0 or place is None:
            checkpoints.save(place or Place(done, before.stage + 1, 0), state)
    return state


def task_accuracy(
    model: Transformer, lessons: Lessons, *, config: ConfigDict, stage: dict[str, Any]
) -> dict[str, float]:
    """Share of test rows whose first answer is right in every token, task by task; the whole context is seen."""
    found = {}
    for task in tasks_of(mix_of(config, stage)):
        rows = lessons.test_rows(task, seed=config.seed, rows=stage["test_rows"], tokens=stage["tokens"])
        right = []
        for start in range(0, len(rows.tokens), stage["rows"]):
            piece = np.zeros((stage["rows"], rows.tokens.shape[1]), np.int32)
            part = rows.tokens[start : start + stage["rows"]]
            piece[: len(part)] = part
            right.append(np.asarray(right_tokens(model, jnp.asarray(piece)))[: len(part)])
        places = np.arange(1, rows.tokens.shape[1])
        asked = (places >= rows.first[:, None]) & (places < rows.last[:, None])
        found[task] = float(np.mean(np.all(np.concatenate(right) | ~asked, axis=1)))
    return found


_validate = jax.jit(weighted_loss)


def _held_out_loss(model: Transformer, lessons: Lessons, tokens: int) -> float:
    """Nats a byte of text that training never sees."""
    batches = max(_VALIDATION_TOKENS // (_VALIDATION_BATCH * tokens), 1)
    rows = lessons.corpus.held_out_rows(rows=batches * _VALIDATION_BATCH, tokens=tokens)
    ones = jnp.ones((_VALIDATION_BATCH, tokens + 1))
    losses = [_validate(model, jnp.asarray(part), ones) for part in np.split(rows, batches)]
    return float(jnp.mean(jnp.stack(losses)))


class _Log:
    """Numbers of the run, a JSON object a line; a resumed run drops lines past the step that it goes on from."""

    def __init__(self, path: Path, *, start: int):
        self._path = path
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a half line was never finished
        old = [json.loads(line) for line in lines]
        self._kept = [line for line in old if line["step"] <= start]
        path.write_text("".join(json.dumps(line) + "\n" for line in self._kept))
        self._seconds = self._kept[-1]["seconds"] if self._kept else 0.0
        self._tokens, self._since = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        """Adds tokens to the speed of the next line."""
        self._tokens += tokens

    def write(self, step: int, **numbers: int | float) -> str:
        """Writes a line and returns it as text for people."""
        elapsed = time.monotonic() - self._since
        self._seconds += elapsed
        line = {
            "step": step,
            **{name: round(value, 4) for name, value in numbers.items()},
            "tokens_per_second": round(self._tokens / elapsed),
            "seconds": round(self._seconds, 1),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._tokens, self._since = 0, time.monotonic()
        return "  ".join(f"{name} {value}" for name, value in line.items())


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def write_output(config: ConfigDict, state: TrainState, *, code: str | None) -> Path:
    """Writes the Hugging Face folder, the log, and the commit, device and settings that made it."""
    output = ROOT / config.output
    save_checkpoint(state.model, output)
    sizes = {"vocab_size": config.model.vocab_size, "max_positions": config.model.max_position_embeddings}
    write_byte_tokenizer(output, symbols=SYMBOLS, **sizes)
    log = (ROOT / config.checkpoint_folder / "log.jsonl").read_text()
    (output / "train_log.jsonl").write_text(log)
    made = {"commit": code, "device": state.model.placement.device_kind, "config": json.loads(config.to_json())}
    (output / "train_config.json").write_text(json.dumps(made, indent=2) + "\n")
    return output


def check_config(config: ConfigDict) -> None:
    """Raises `UserError` for settings that cannot be."""
    if not config.stages or any(stage["tokens"] > config.model.max_position_embeddings for stage in config.stages):
        raise UserError("config.stages must hold at least one stage, none with more tokens than the model's context.")
    for stage in config.stages:
        check_mix(mix_of(config, stage))
    if any(stage["tokens"] < _FEWEST_TOKENS for stage in config.stages):
        raise UserError(f"config.stages has rows too short for a problem: give each at least {_FEWEST_TOKENS} tokens.")
    if config.warmup_steps < 1:
        raise UserError(f"config.warmup_steps is {config.warmup_steps}; it must be at least 1.")


def main(settings: Settings) -> int:
    """Runs the program."""
    config, quiet = settings.config, settings.flags["quiet"].value
    check_config(config)
    code = commit()  # of the code that runs, not of what the checkout holds when it ends
    state = train(config, quiet=quiet)
    output = write_output(config, state, code=code)
    _say(quiet, f"wrote {output}")
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    flags.DEFINE_bool("quiet", False, "Print nothing but errors.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, default_config="configs/tiny_train.py", define_flags=define_flags))
