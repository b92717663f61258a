"""Trains a small byte-level model: `python -m kvjax.train --config=configs/tiny_train.py`.

Learns the next byte of the texts that the config names, writes a line of numbers as it goes, checkpoints with orbax
and goes on where it was stopped, and at the end writes a Hugging Face checkpoint folder that `kvjax.decode` runs.
A batch depends on the seed and the step alone, so an interrupted run gives what an uninterrupted one gives.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from absl import flags
from ml_collections import ConfigDict

from kvjax._program import Settings, run
from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.corpus import Corpus, load_corpus
from kvjax.errors import UserError
from kvjax.folder import ROOT
from kvjax.report import commit
from models.checkpoint import parameter_tree, with_parameters
from models.hf_config import parse_config
from models.initialise import initialise
from models.save import save_checkpoint
from models.transformer import Transformer

_VALIDATION_TOKENS = 16_384


class TrainState(NamedTuple):
    """What a step changes."""

    model: Transformer
    optimizer: optax.OptState


def next_byte_loss(model: Transformer, rows: jax.Array) -> jax.Array:
    """Mean cross entropy, nats per token, of each row's tokens given those before.

    Args:
      model: the model.
      rows: `B T+1` int32.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    hidden, _ = model(inputs, positions=positions)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)
    return jnp.mean(losses)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and a cosine; only matrices decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps(config),
        end_value=config.learning_rate * config.final_learning_rate_share,
    )

    def decays(model: Transformer) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, model)

    adam = optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), adam)


def num_steps(config: ConfigDict) -> int:
    """Steps of all stages together."""
    return sum(stage["steps"] for stage in config.stages)


def stage_at(config: ConfigDict, step: int) -> dict[str, int]:
    """The stage that a step, counted from 0, belongs to."""
    for stage in config.stages:
        if step < stage["steps"]:
            return stage
        step -= stage["steps"]
    raise ValueError(f"step lies {step} past the last stage")


def make_step(optimizer: optax.GradientTransformation) -> Callable[[TrainState, jax.Array], tuple]:
    """The compiled training step: (state, rows) -> (state, loss); the state is donated."""

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(next_byte_loss)(state.model, rows)
        updates, moments = optimizer.update(gradients, state.optimizer, state.model)
        return TrainState(optax.apply_updates(state.model, updates), moments), loss

    return jax.jit(step, donate_argnums=0)


class Checkpoints:
    """The run's checkpoints: the newest two, whatever was finished of them."""

    def __init__(self, folder: Path):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState) -> None:
        """Writes the state after `step` steps."""
        self._manager.save(step, args=ocp.args.StandardSave(_as_tree(state)))
        self._manager.wait_until_finished()

    def restore(self, state: TrainState) -> tuple[int, TrainState]:
        """The newest step and its state; 0 and the given state where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return 0, state
        try:
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(_as_tree(state)))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoints in {self._folder} are of another model: set config.checkpoint_folder to a new folder."
            ) from error
        leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
        moments = jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves)
        return step, TrainState(with_parameters(state.model, tree["model"]), moments)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
    """The state as dicts of arrays."""
    moments = {f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    return {"model": parameter_tree(state.model), "optimizer": moments}


def train(config: ConfigDict, *, quiet: bool = False) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
      config: see `configs/tiny_train.py`.
      quiet: print nothing.

    Returns:
      The final state; its numbers are in `log.jsonl` of the checkpoint folder.
    """
    longest = max(stage["tokens"] for stage in config.stages)
    corpus = load_corpus(config.texts, held_out_share=config.held_out_share, row_tokens=longest)
    folder = ROOT / config.checkpoint_folder
    folder.mkdir(parents=True, exist_ok=True)
    model_config = parse_config(dict(config.model), source="config.model")
    model = initialise(Transformer(model_config), jax.random.key(config.seed))
    optimizer = make_optimizer(config)
    checkpoints = Checkpoints(folder / "checkpoints")
    start, state = checkpoints.restore(TrainState(model, optimizer.init(model)))
    _say(quiet, f"{model_config.num_parameters():,} parameters, {len(corpus.train):,} bytes, from step {start}")
    state = _train_steps(config, corpus, state, start=start, checkpoints=checkpoints, folder=folder, quiet=quiet)
    checkpoints.close()
    return state


def _train_steps(
    config: ConfigDict,
    corpus: Corpus,
    state: TrainState,
    *,
    start: int,
    checkpoints: Checkpoints,
    folder: Path,
    quiet: bool,
) -> TrainState:
    """The loop over steps."""
    step_function, validate = make_step(make_optimizer(config)), jax.jit(next_byte_loss)
    log = _Log(folder / "log.jsonl", start=start)
    last = num_steps(config)
    for step in range(start, last):
        stage = stage_at(config, step)
        rows = corpus.batch(step, seed=config.seed, rows=stage["rows"], tokens=stage["tokens"])
        state, loss = step_function(state, jnp.asarray(rows))
        log.count(rows.size)
        done = step + 1
        if done % config.validate_every == 0 or done == last:
            held_out = _validation_rows(corpus, stage["tokens"])
            losses = [validate(state.model, held_out[index : index + 4]) for index in range(0, len(held_out), 4)]
            line = log.write(done, loss=float(loss), held_out_loss=float(jnp.mean(jnp.stack(losses))))
            _say(quiet, line)
        if done % config.checkpoint_every == 0 or done == last:
            checkpoints.save(done, state)
    return state


def _validation_rows(corpus: Corpus, tokens: int) -> jax.Array:
    return jnp.asarray(corpus.held_out_rows(rows=_VALIDATION_TOKENS // tokens, tokens=tokens))


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

    def write(self, step: int, **numbers: float) -> str:
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
    write_byte_tokenizer(output, vocab_size=config.model.vocab_size, max_positions=config.model.max_position_embeddings)
    log = (ROOT / config.checkpoint_folder / "log.jsonl").read_text()
    (output / "train_log.jsonl").write_text(log)
    device = jax.devices()[0].device_kind
    made = {"commit": code, "device": device, "config": json.loads(config.to_json())}
    (output / "train_config.json").write_text(json.dumps(made, indent=2) + "\n")
    return output


def check_config(config: ConfigDict) -> None:
    """Raises `UserError` for settings that cannot be."""
    if not config.stages or any(stage["tokens"] > config.model.max_position_embeddings for stage in config.stages):
        raise UserError("config.stages must hold at least one stage, none with more tokens than the model's context.")
    if config.warmup_steps >= num_steps(config):
        raise UserError(
            f"config.warmup_steps is {config.warmup_steps}; it must be below the {num_steps(config)} steps."
        )


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
