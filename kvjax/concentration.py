"""How far the queries of a model gather around their centres, on which TriAttention rests (arXiv 2604.04921).

    R_f = |E q_f| / E|q_f|        of band f, the pair of numbers that RoPE turns together, before it is turned

1 is a point, 0 a circle around the origin. Models of billions of parameters have 0.99 in the band of longest queries
of most heads; where R is low, scores that go by the centre have little to go by.
"""

from typing import Any

import numpy as np

from kvjax.statistics import Statistics


def concentration(statistics: Statistics | None) -> dict[str, Any] | None:
    """R of a model's queries.

    Args:
      statistics: of the model; None, or without queries before RoPE, gives None.

    Returns:
      `bands`: mean over all bands and heads; `strongest`: mean over heads of the band of longest queries; `above`:
      share of heads in which that one is above 0.95; `layers`: the strongest band of each head; `summary` in words.
    """
    if statistics is None or any(layer.queries is None or layer.queries_norm is None for layer in statistics.layers):
        return None
    ratios, strongest = [], []
    for layer in statistics.layers:
        mean, norm = np.asarray(layer.queries.mean), np.asarray(layer.queries_norm)
        half = mean.shape[1] // 2
        found = np.hypot(mean[:, :half], mean[:, half:]) / np.maximum(norm, 1e-12)  # N D/2
        ratios.append(found)
        strongest.append(found[np.arange(len(found)), np.argmax(norm, axis=1)])
    every = float(np.mean(np.concatenate(ratios)))
    best = np.concatenate(strongest)
    numbers = {"bands": every, "strongest": float(best.mean()), "above": float(np.mean(best > 0.95))}
    summary = (
        f"R of the queries: {numbers['bands']:.2f} over all bands, {numbers['strongest']:.2f} in each head's "
        f"strongest, above 0.95 there in {numbers['above']:.0%} of the heads."
    )
    layers = [[round(float(one), 3) for one in heads] for heads in strongest]
    return {**numbers, "layers": layers, "summary": summary}
