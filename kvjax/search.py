"""The search for a policy under a memory limit: proposes candidates, and has those judged that fit.

Two aims at once, most quality and fewest bytes, by a tree-structured Parzen estimator (optuna). It begins with policies
that are the same everywhere, which any other has to beat, and with what is near the best of them. A candidate over the
limit is never judged. A search is a function of its seed and of what the judge says: one that was stopped is run again
from the start, with the verdicts that are known already, and ends where it would have ended.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.candidates import Choices, Space
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.policy import Policy

_STEPS = 200
"""Budgets are tried in steps of one part in this many."""

_PATIENCE = 200
"""Proposals in a row that bring nothing new before a search gives up."""

Sizer = Callable[[Policy], float]
"""Bytes a token of a policy's cache; raises `UserError` where the model cannot have it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What a judge says of a policy.

    Attributes:
      accuracy: mean over tasks, 0 to 1.
      kl: divergence from the uncompressed cache, nats, mean over tasks.
      step: the least by which two accuracies can differ.
      tasks: name -> accuracy and divergence of that task.
    """

    accuracy: float
    kl: float
    step: float
    tasks: Mapping[str, Mapping[str, float]]

    @property
    def quality(self) -> float:
        """Accuracy; among equals the one of less divergence is better, which never outweighs a single example."""
        return self.accuracy - 0.5 * self.step * (self.kl / (1 + self.kl) if math.isfinite(self.kl) else 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A policy that was judged.

    Attributes:
      policy: as people type it.
      kind: see `Space.kind`.
      choices: what spelled it.
      bytes_per_token: of its cache.
      score: the judge's.
    """

    policy: str
    kind: str
    choices: Choices
    bytes_per_token: float
    score: Score


@dataclasses.dataclass
class Found:
    """What a search comes to.

    Attributes:
      trials: in the order in which they were judged.
      refused: candidate -> why it was not judged.
    """

    trials: list[Trial] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def best(self, *kinds: str) -> Trial | None:
        """The best of some kinds, of all where none is given; None if there is none."""
        own = [trial for trial in self.trials if not kinds or trial.kind in kinds]
        return max(own, key=lambda trial: (trial.score.quality, -trial.bytes_per_token), default=None)

    def front(self) -> list[Trial]:
        """Trials that no other beats in quality and bytes both, from fewest bytes to most."""
        found: list[Trial] = []
        for trial in sorted(self.trials, key=lambda trial: (trial.bytes_per_token, -trial.score.quality)):
            if not found or trial.score.quality > found[-1].score.quality:
                found.append(trial)
        return found


def search(
    space: Space,
    *,
    limit: float,
    size_of: Sizer,
    judge: Callable[[Policy], Score],
    trials: int,
    seconds: float | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Looks for the best policy under a limit.

    Args:
      space: what may be chosen.
      limit: most bytes a token.
      size_of: says what a policy takes.
      judge: says how good a policy is; is asked once for each.
      trials: how many policies are judged.
      seconds: after which no further one is begun.
      seed: of the proposals.
      on_trial: is told of each trial.

    Raises:
      UserError: no candidate can be as small as the limit.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    size_of, starts, found, since = functools.cache(size_of), space.starts(), Found(), time.monotonic()
    axes = {name: optuna.distributions.CategoricalDistribution(values) for name, values in space.axes().items()}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(starts) + 10)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for choices in starts:
        study.enqueue_trial(choices)
    known: dict[str, Trial] = {}
    idle = 0
    while len(found.trials) < trials and idle < _PATIENCE and not _is_over(since, seconds):
        asked = study.ask(axes)
        if asked.number == len(starts):
            for choices in _second_round(space, found, limit=limit, size_of=size_of):
                study.enqueue_trial(choices)
        idle += 1
        try:
            policy, size = fit(space, asked.params, limit=limit, size_of=size_of)
            if str(policy) not in known:
                trial = _judged(space, asked.params, policy, size, judge)
                found.trials.append(trial)
                known[str(policy)], idle = trial, 0
                on_trial(trial)
        except UserError as error:
            found.refused[space.spell(asked.params)] = str(error)
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, (known[str(policy)].score.quality, size))
    return found


def _is_over(since: float, seconds: float | None) -> bool:
    return seconds is not None and time.monotonic() - since >= seconds


def _judged(space: Space, choices: Choices, policy: Policy, size: float, judge: Callable[[Policy], Score]) -> Trial:
    kind, score = space.kind(choices), judge(policy)
    return Trial(policy=str(policy), kind=kind, choices=dict(choices), bytes_per_token=size, score=score)


def _second_round(space: Space, found: Found, *, limit: float, size_of: Sizer) -> list[dict[str, Any]]:
    """After the starts: what is near the best codec and the best selection of these.

    Raises:
      UserError: none of the starts fits, and nothing else can.
    """
    if not found.trials:
        size, policy = smallest(space, size_of=size_of)
        if size > limit:
            raise UserError(
                f"The limit of {limit:.2f} bytes a token is below the smallest possible: {policy} takes {size:.2f}."
            )
    best = [trial for kind in ("codec", "selection") if (trial := found.best(kind))]
    return [choices for trial in best for choices in space.near(trial.choices)]


def fit(space: Space, choices: Choices, *, limit: float, size_of: Sizer) -> tuple[Policy, float]:
    """The policy of some choices, its budget the largest that fits, and its bytes a token.

    Raises:
      UserError: the choices cannot go together or with the model, or do not fit.
    """
    if not choices["selection"]:
        policy = parse_policy(space.spell(choices))
        return policy, _checked(policy, size_of(policy), limit)
    low, high, best, reason = 0, _STEPS, None, ""
    while high - low > 1:
        middle = (low + high) // 2
        try:
            policy = parse_policy(space.spell(choices, budget=middle / _STEPS))
            size = size_of(policy)
        except UserError as error:  # the budget is smaller than what is protected, or no budget will do
            low, reason = middle, str(error)
            continue
        if size <= limit * choices["share"]:
            low, best = middle, (policy, size)
        else:
            high, reason = middle, f"{policy} takes {size:.2f} bytes a token, more than {limit * choices['share']:.2f}."
    if best is None:
        raise UserError(reason)
    return best


def _checked(policy: Policy, size: float, limit: float) -> float:
    if size > limit:
        raise UserError(f"{policy} takes {size:.2f} bytes a token, more than {limit:.2f}.")
    return size


def smallest(space: Space, *, size_of: Sizer) -> tuple[float, Policy]:
    """The fewest bytes a token that any candidate takes, and that candidate."""
    found = []
    base = {**space.starts()[0], "keys": space.codecs[-1]}
    for selection in ("", *space.selections):
        choices = {**base, "selection": selection}
        budgets = [step / _STEPS for step in range(1, _STEPS)] if selection else [None]
        for budget in budgets:
            try:
                policy = parse_policy(space.spell(choices, budget=budget))
                found.append((size_of(policy), policy))
            except UserError:
                continue
            break
    if not found:
        raise UserError("The model can have none of the candidates; give other --selections and --codecs.")
    return min(found, key=lambda one: one[0])
