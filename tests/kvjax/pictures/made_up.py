"""Rows of a report and a trace, made up."""

import numpy as np

from kvjax.tracing import Trace

EXACT = "+exact(sinks=4,window=16,round=16)"
POLICIES = ("full", f"random(budget=64){EXACT}", f"oracle(budget=64){EXACT}", f"triattention(budget=64)+int4{EXACT}")


def row(task, policy, *, scores=(1.0, 0.0), size=100, whole=400, question="inside", **more):
    """A row of generated answers; half of them right."""
    mean = float(np.mean(scores))
    ends = {"accuracy_low": max(mean - 0.1, 0.0), "accuracy_high": min(mean + 0.1, 1.0)}
    found = {"task": task, "question": question, "policy": policy, "examples": len(scores), "max_tokens": 128}
    found |= {"cache_bytes": whole if policy == "full" else size, "full_cache_bytes": whole, "kl_mean": 0.1}
    return {**found, "accuracy": mean, **ends, "scores": list(scores), **more}


def likelihood_row(policy, kl, *, size=100):
    """A row of text that is scored."""
    found = row("ppl(file=book.txt)", policy, size=size, kl_mean=kl)
    return {name: value for name, value in found.items() if not name.startswith(("accuracy", "scores"))}


def needle_rows():
    """Two lengths, four policies, an example at either end; all but `full` find the last fact alone."""
    return [
        row(
            f"needle(tokens={tokens})",
            policy,
            scores=(1.0, 1.0) if policy == "full" else (0.0, 1.0),
            facts={"depth": [0.0, 1.0], "tokens": [tokens] * 2},
        )
        for tokens in (256, 1024)
        for policy in POLICIES
    ]


def trace():
    """A window of two and the first token, in one layer and two heads; the second head has kept token 1, too."""
    seen = (4, 6, 7)
    kept = np.zeros((3, 1, 2, 7), np.bool_)
    for moment, count in enumerate(seen):
        kept[moment, :, :, [0, count - 2, count - 1]] = True
    kept[:, 0, 1, 1] = True
    policy = f"snapkv(budget=3){EXACT}"
    return Trace(
        policy=policy, task="dfs, question inside", prompt_tokens=4, seen=seen, layers=(0,), heads=(0, 1), kept=kept
    )
