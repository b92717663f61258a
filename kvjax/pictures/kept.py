"""Kept positions over time: which tokens each layer and key/value head still holds while an answer comes."""

from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.pictures.names import fold, names_of
from kvjax.pictures.style import SMALL, Theme, below, panels, styles_of
from kvjax.tracing import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 128  # of positions, at most: about two pixels each


def shares_of(kept: np.ndarray, seen: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each bin of positions has come, and how much of it is kept, `bins moments` both, from 0 to 1.

    Args:
      kept: `moments positions` bool.
      seen: `moments`, tokens that have come.
      bins: at most the number of positions.
    """
    positions = kept.shape[1]
    starts = np.arange(bins) * positions // bins
    widths = np.diff([*starts, positions])[:, None]
    there = np.arange(positions)[None] < seen[:, None]
    come, held = (np.add.reduceat(part.astype(np.float64), starts, axis=1).T / widths for part in (there, kept))
    return come, held


def kept_figure(trace: Trace, theme: Theme) -> "Figure":
    """Draws the picture.

    Args:
      trace: of one text and one policy.
      theme: inks.
    """
    columns, rows = len(trace.heads), len(trace.layers)
    style = next(iter(styles_of(names_of([trace.policy])).values()))
    colour = style.colour(theme)
    height = 1.2 if columns > 2 else 1.35
    figure, axes = panels(rows * columns, columns, height=height, extra=0.95, sharex=True, sharey=True)
    seen = np.asarray(trace.seen)
    step = int(seen[1] - seen[0]) if len(seen) > 1 else 1
    end = int(seen[-1])
    bins = min(_BINS, trace.kept.shape[3])
    for place, axis in enumerate(axes):
        layer, head = divmod(place, columns)
        image = _paint(*shares_of(trace.kept[:, layer, head], seen, bins), theme, colour)
        extent = (seen[0], seen[0] + step * len(seen), 0, trace.kept.shape[3])
        axis.imshow(image, extent=extent, origin="lower", aspect="auto", interpolation="none")
        axis.axhline(trace.prompt_tokens, color=theme.text, linewidth=1.0, linestyle=(0, (4, 3)))
        axis.set_xlim(seen[0], end)
        axis.set_ylim(0, end)
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params(nbins=5, integer=True)
        axis.set_xlabel("tokens seen" if place >= (rows - 1) * columns else "")
        axis.set_title(f"layer {trace.layers[layer]}, head {trace.heads[head]}", fontsize=SMALL, color=theme.muted)
    about = f"what is kept on {trace.task}" if trace.task else "what is kept"
    figure.suptitle(f"{about}, with\n{fold(trace.policy, 100)}", x=0.01, ha="left")
    figure.supylabel("position of the token", fontsize=SMALL, color=theme.muted)
    below(figure, _legend(theme, colour), columns=3)
    return figure


def _paint(come: np.ndarray, held: np.ndarray, theme: Theme, colour: str) -> np.ndarray:
    """Red, green, blue and opacity: kept in the method's colour, gone in a faint one, nothing where none has come."""
    from matplotlib.colors import to_rgb

    share = np.where(come > 0, held / np.maximum(come, 1e-9), 0.0)[..., None]
    # A bin of which little is kept must still be seen, so shades rise faster than shares.
    mix = np.sqrt(share) * np.asarray(to_rgb(colour)) + (1 - np.sqrt(share)) * np.asarray(to_rgb(theme.faint))
    return np.concatenate([mix, come[..., None]], axis=-1)


def _legend(theme: Theme, colour: str) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=colour, label="kept"),
        Patch(facecolor=theme.faint, label="evicted"),
        Line2D([], [], color=theme.text, linewidth=1.0, linestyle=(0, (4, 3)), label="end of the prompt"),
    ]
