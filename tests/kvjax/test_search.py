"""The search: it keeps to the limit, finds the optimum of a made-up objective, and is the same when it goes on."""

import dataclasses

import pytest

from kvjax.candidates import Space
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.search import Found, Score, Trial, fit, search, smallest

SPACE = Space(selections=("keydiff",), codecs=("int8", "int2"), windows=(8,), edges=(0,), shares=(1.0,))
BITS = {codec: bits for bits in (8, 2) for codec in parse_policy(f"int{bits}").all_codecs}
LIMIT = 9.0


def size_of(policy):
    """Bits of four layers, and a little for what is exact."""
    layers = [policy.codecs(layer, 4) for layer in range(4)]
    bits = sum(BITS.get(codec, 32) for pair in layers for codec in pair) / 8
    share = policy.selection.budget if policy.selection else 1.0
    if share < 0.05:
        raise UserError("A budget too small.")
    return bits * share + policy.exact.window / 64


def judge(policy):
    """Best are int8 keys, int2 values and a budget as large as may be."""
    keys, values = (BITS.get(codec, 32) for codec in policy.codecs(3, 4))
    share = policy.selection.budget if policy.selection else 0.2
    accuracy = share - 0.3 * (keys != 8) - 0.2 * (values != 2) - 0.1 * (policy.layers.kind == "pyramid")
    accuracy -= 0.05 * (policy.parts != ((), ()))
    return Score(accuracy=accuracy, kl=0.1, step=0.01, tasks={"made up": {"accuracy": accuracy, "kl": 0.1}})


def run(**changes):
    return search(SPACE, **{"limit": LIMIT, "size_of": size_of, "judge": judge, "trials": 20, **changes})


def test_it_finds_the_optimum_within_the_limit():
    """Among 24 policies that fit; no budget is above 0.995, and all else takes accuracy away."""
    found = run()
    assert all(trial.bytes_per_token <= LIMIT for trial in found.trials)
    assert len({trial.policy for trial in found.trials}) == len(found.trials) <= 20
    best = found.best()
    wanted = "keydiff(budget=0.995)+key(int8)+value(int2)+exact(sinks=4,window=8,round=8)"
    assert (best.policy, best.kind) == (wanted, "mixed")
    first = [trial.policy for trial in found.trials[:2]]
    assert first == ["int8+exact(sinks=4,window=8,round=8)", "int2+exact(sinks=4,window=8,round=8)"]
    assert found.best("codec").policy == "int8+exact(sinks=4,window=8,round=8)"


def test_a_stopped_search_goes_on_to_the_same_end():
    whole, asked, known = run(), [], {}
    for trial in run(trials=12).trials:
        known[trial.policy] = trial.score

    def remembers(policy):
        if str(policy) in known:
            return known[str(policy)]
        asked.append(str(policy))
        return judge(policy)

    assert run(judge=remembers).trials == whole.trials
    assert asked == [trial.policy for trial in whole.trials[12:]]


def test_budgets_are_the_largest_that_fit():
    choices = {**SPACE.starts()[-1], "keys": "int8"}
    policy, size = fit(SPACE, choices, limit=4.0, size_of=size_of)
    assert policy.selection.budget == 0.48  # 4 - 1/8 of 8
    assert size == 8 * 0.48 + 0.125
    half, _ = fit(SPACE, {**choices, "share": 0.5}, limit=4.0, size_of=size_of)
    assert half.selection.budget == 0.23
    with pytest.raises(UserError, match=r"takes 0\.\d\d bytes a token, more than 0\.30|too small"):
        fit(SPACE, choices, limit=0.3, size_of=size_of)


def test_a_limit_below_anything_possible_names_the_smallest():
    size, policy = smallest(SPACE, size_of=size_of)
    assert str(policy) == "keydiff(budget=0.05)+int2+exact(sinks=4,window=8,round=8)"
    assert size == 2 * 0.05 + 0.125
    with pytest.raises(
        UserError, match=r"limit of 0\.20 bytes a token is below the smallest possible: keydiff\(budget"
    ):
        run(limit=0.2)


def test_what_the_judge_cannot_have_is_refused_with_the_reason():
    def refuses(policy):
        if policy.selection:
            raise UserError("Not with this prompt.")
        return judge(policy)

    found = run(judge=refuses, trials=5)
    assert {trial.kind for trial in found.trials} <= {"codec", "mixed"}
    assert "Not with this prompt." in found.refused.values()


def test_time_ends_a_search():
    assert run(seconds=0.0).trials == []


def trial(accuracy, kl, size, kind="mixed"):
    score = Score(accuracy=accuracy, kl=kl, step=0.01, tasks={})
    return Trial(policy=f"{accuracy},{kl},{size}", kind=kind, choices={}, bytes_per_token=size, score=score)


def test_accuracy_comes_before_divergence_and_divergence_before_bytes():
    trials = [trial(0.9, 0.0, 1.0, "codec"), trial(0.91, 5.0, 4.0), trial(0.91, 2.0, 3.0), trial(0.91, 2.0, 2.0)]
    found = Found(trials=trials)
    assert found.best() == trials[3]
    assert found.best("codec") == trials[0]
    assert found.best("selection") is None
    assert found.front() == [trials[0], trials[3]]
    assert dataclasses.replace(trials[0].score, kl=float("nan")).quality == pytest.approx(0.895)
