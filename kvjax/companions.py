"""What a selection is to be compared with: random eviction, sinks and window, and an oracle, each at its own budget.

A policy's companions have its budget, its exact segment, its edges and its pinned prompt, and no codec: what they lose
they lose by the choice of tokens alone.
"""

from kvjax.grammar import SETTINGS, parse_policy
from kvjax.oracle import oracle_of
from kvjax.policy import Policy

_OF_THE_METHOD = ("layers", "heads", "protect")
"""Settings that belong to a method's own way of spreading its budget."""


def frame_of(policy: Policy) -> str | None:
    """What a policy has in common with its companions: its budget and settings as text.

    None where companions would evict nothing: without a selection, with one that keeps all tokens, or with a budget of
    all tokens, as duo has, which evicts by heads.
    """
    if not policy.evicts or policy.selection.budget == 1.0 and isinstance(policy.selection.budget, float):
        return None
    kept = [word for word in policy.text.split("+") if word.split("(")[0] in SETTINGS]
    words = [word for word in kept if word.split("(")[0] not in _OF_THE_METHOD]
    return "+".join([f"(budget={policy.selection.budget})", *words])


def with_companions(policies: list[Policy]) -> list[Policy]:
    """`full` first, the companions of every policy that evicts, and the policies; each of them once."""
    frames = dict.fromkeys(frame for policy in policies if (frame := frame_of(policy)))
    found = [parse_policy("full")]
    for frame in frames:
        found += [parse_policy(f"{name}{frame}") for name in ("random", "streaming")]
        found.append(oracle_of(found[-1], text=f"oracle{frame}"))
    unique = {str(policy): policy for policy in [*found, *policies]}
    return list(unique.values())


def oracle_at(frame: str | None) -> str | None:
    """The name of a frame's oracle."""
    return None if frame is None else f"oracle{frame}"


def is_oracle(policy: Policy) -> bool:
    """Whether a policy must be told the future."""
    return policy.text.startswith("oracle(")
