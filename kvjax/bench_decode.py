"""Seconds of a decode step, by batch and context, beside other programs on the same weights.

Ours and the peers take turns, case by case and repeat by repeat, so that whatever else the machine does falls on both;
the best repeat of each counts. Prompts are random, and no token stops a generation. Weights are loaded, or drawn for a
published shape (`--random_weights`): a step takes as long whatever they say.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from kvjax._program import Settings
from kvjax.accounting import device_bytes
from kvjax.decoder import read_statistics
from kvjax.errors import UserError
from kvjax.folder import find_checkpoint
from kvjax.generation import Generator
from kvjax.grammar import parse_policy, split_policies
from kvjax.peers import Case, parse_case, start_peers
from kvjax.progress import Progress
from kvjax.report import new_report
from kvjax.statistics import Statistics
from models import Transformer, load_model, published_config, randomise

_STD = 0.02  # of drawn weights


class Ours:
    """This library with one policy."""

    def __init__(self, model: Transformer, policy: str, statistics: Statistics | None):
        self.name = policy
        self._model, self._statistics = model, statistics
        self._made: tuple[Case, Generator] | None = None
        self.cache_bytes = 0

    def seconds_per_step(self, case: Case, new_tokens: int) -> float:
        """Seconds of one decode step, compilation, prefill and first token apart."""
        if self._made is None or self._made[0] != case:
            self._made = None  # frees the last case's cache first
            room = case.context + new_tokens
            sizes = {"batch": case.batch, "max_tokens": room, "steps_per_dispatch": new_tokens}
            generator = Generator(self._model, policy=self.name, statistics=self._statistics, **sizes)
            self._made = case, generator
        generator = self._made[1]
        vocab_size = self._model.cache_shape.vocab_size
        prompts = np.random.default_rng(0).integers(0, vocab_size, (case.batch, case.context)).tolist()
        generator.generate(prompts, max_new_tokens=new_tokens + 1)
        self.cache_bytes = device_bytes(generator.cache.layers)
        return generator.timing.decode_seconds / generator.timing.decode_steps


def bench_decode(settings: Settings) -> dict[str, Any]:
    """Times decode steps of each policy and peer; returns the report."""
    values = settings.flags
    cases = [parse_case(text) for text in values["cases"].value]
    new_tokens, repeats = values["new_tokens"].value, values["repeats"].value
    policies = [str(parse_policy(policy)) for policy in split_policies(values["policies"].value)]
    folder, model, statistics = _model_of(values)
    report = new_report("kvjax.bench decode", config=flag_values(values), policy=",".join(policies))
    rows = []
    peers = start_peers(values["against"].value, values["peer_python"].value, folder)
    try:
        contenders = [*(Ours(model, policy, statistics) for policy in policies), *peers]
        with Progress("measuring", unit="cases", total=len(cases), quiet=values["quiet"].value) as progress:
            for case in cases:
                rows += _measure(case, contenders, new_tokens=new_tokens, repeats=repeats)
                progress.advance(1)
    finally:
        for peer in peers:
            report["versions"] |= peer.versions
            peer.close()
    return {**report, "rows": rows}


def _model_of(values: flags.FlagValues) -> tuple[Path, Transformer, Statistics | None]:
    """Where the weights are, the model, and its statistics."""
    name, dtype = values["model"].value, values["dtype"].value
    if values["against"].value and dtype != "float32":
        raise UserError(f"--dtype={dtype}: peers are measured in float32; leave --against or --dtype out.")
    if not values["random_weights"].value:
        folder = find_checkpoint(name)
        model = load_model(folder, dtype=dtype)
        return folder, model, read_statistics(values["statistics"].value, folder, model)
    if values["against"].value:
        raise UserError("--random_weights are drawn here: --against needs a checkpoint that the peer can load.")
    config = published_config(name)
    return Path(name), randomise(Transformer(config, dtype=dtype), jax.random.key(0), std=_STD), None


def _measure(case: Case, contenders: list, *, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One case: contenders take turns; the best repeat of each counts."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            seconds[contender.name].append(contender.seconds_per_step(case, new_tokens))
    base = min(seconds[contenders[0].name])
    return [
        {
            "case": str(case),
            "name": contender.name,
            "batch": case.batch,
            "context": case.context,
            "seconds_per_step": min(seconds[contender.name]),
            "tokens_per_second": case.batch / min(seconds[contender.name]),
            "times_slower_than_first": min(seconds[contender.name]) / base,
            "cache_bytes": contender.cache_bytes,
        }
        for contender in contenders
    ]


def flag_values(values: flags.FlagValues) -> dict[str, Any]:
    """All flags, for a report."""
    return {name: values[name].value for name in values if name not in ("help", "h")}
