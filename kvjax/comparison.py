"""The compressed cache beside the uncompressed one: both generate from the same prompts with the same seeds.

    policy   a b c d e f        the first token that differs: 3
    full     a b c x y z        KL(full || policy) along the policy's tokens a b c d e f, at each of them

Up to the first difference both have seen the same tokens; from there on each text follows from its own. KL is of both
caches along one text, the compressed cache's, so each of its numbers says what compression did and nothing else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.accounting import device_bytes
from kvjax.decoder import Decoder
from kvjax.forcing import divergence_along, num_common
from kvjax.policy import Policy
from kvjax.screen import note, show_beside, sparkline
from kvjax.text import Tokenizer

_CONTEXT_CHARACTERS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What came from one prompt with both caches.

    Attributes:
      tokens: new tokens with the compressed cache, a stop token included.
      full_tokens: new tokens with the uncompressed one.
      text: of `tokens`.
      full_text: of `full_tokens`.
      first: index of the first new token that differs, from 0; None if all are the same.
      at_first: that token with either cache, for people, and the text before it; None if all are the same.
      nats: KL(full || policy) at each of `tokens`.
      same_top: whether both caches find the same token the likeliest, at each of `tokens`.
    """

    tokens: list[int]
    full_tokens: list[int]
    text: str
    full_text: str
    first: int | None
    at_first: tuple[str, str, str] | None
    nats: np.ndarray
    same_top: np.ndarray

    @property
    def agreement(self) -> float:
        """Share of the uncompressed cache's tokens that come before the first difference."""
        return num_common(self.tokens, self.full_tokens) / len(self.full_tokens)

    def record(self) -> dict[str, Any]:
        """What a line of results says of it."""
        most = int(np.argmax(self.nats))
        return {
            "full_text": self.full_text,
            "full_new_tokens": len(self.full_tokens),
            "first_difference": self.first,
            "agreement": self.agreement,
            "top1_agreement": float(np.mean(self.same_top)),
            "kl_mean": float(np.mean(self.nats)),
            "kl_max": float(self.nats[most]),
            "kl_max_at": most,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        if self.at_first is None:
            said = f"the same {len(self.tokens)} tokens with both caches"
        else:
            ours, full, before = self.at_first
            said = f"differs from full at token {self.first}: {ours} instead of {full}"
            said += f", after {before!r}" if before else ""
        record = self.record()
        mean, largest = (f"{max(record[name], 0.0):.3g}" for name in ("kl_mean", "kl_max"))
        kl = f"KL(full || policy) mean {mean} nats a token, largest {largest} at token {record['kl_max_at']}"
        return [said, f"{kl}: {sparkline(self.nats.tolist())}"]


class Comparison:
    """Decodes with the uncompressed cache what a decoder has decoded, and sums up how the two differ.

    Args:
      decoder: that decodes with the compressed cache.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._records: list[dict[str, Any]] = []
        self._newest: list[Difference] = []
        self._seconds, self._decode_tokens = 0.0, 0
        self.full_cache_bytes: int | None = None
        """Bytes of the newest batch's uncompressed cache on the device; None before the first."""

    def compare(
        self,
        prompts: Sequence[list[int]],
        written: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        batch: int,
        after: Sequence[Sequence[int]],
    ) -> list[Difference]:
        """Compares one batch.

        Args:
          prompts: token ids, 1 to `batch` of them.
          written: new tokens that the decoder gave for each.
          seeds: with which it did.
          batch: rows that are compiled for.
          after: the tokens that each text continues, none for one that begins anew.
        """
        decoder = self._decoder
        generator = decoder.generator(prompts, batch=batch, policy=Policy())
        full = generator.generate(prompts, max_new_tokens=decoder.max_new_tokens, seeds=seeds)
        self._seconds += generator.timing.decode_seconds
        self._decode_tokens += sum(map(len, full)) - len(full)
        self.full_cache_bytes = device_bytes(generator.cache.layers)
        generator.cache = None  # freed: the caches that are compared take its place
        idle = batch - len(prompts)  # rows that only keep the shape
        nats, same_top = divergence_along(
            decoder.model,
            (Policy(), decoder.policy),
            [*prompts, *prompts[:1] * idle],
            answers=[*written, *written[:1] * idle],
            max_tokens=decoder.room(prompts),
            statistics=decoder.statistics,
            most_tokens=decoder.max_new_tokens,
        )
        self._newest = [
            _difference(decoder.tokenizer, tokens, full[row], after[row], nats=nats[row], same_top=same_top[row])
            for row, tokens in enumerate(written)
        ]
        # No texts are kept: files of prompts may be long.
        kept = [{**one.record(), "tokens": len(one.tokens)} for one in self._newest]
        self._records += [{name: value for name, value in one.items() if name != "full_text"} for one in kept]
        return self._newest

    @property
    def _is_sampled(self) -> bool:
        return self._decoder.sampling.temperature > 0

    def report(self) -> dict[str, Any]:
        """What was compared so far, for the report; of a single prompt, each step too."""
        records = self._records
        found = {
            "prompts": len(records),
            "same": sum(one["first_difference"] is None for one in records),
            "sampled": self._is_sampled,
            "cache_bytes": self._decoder.cache_bytes,
            "full_cache_bytes": self.full_cache_bytes,
            "full_tokens_per_second": self._decode_tokens / self._seconds if self._seconds else None,
        }
        if len(records) == 1:
            [only] = self._newest
            found |= {"text": only.text, **only.record(), "kl_per_step": only.nats.tolist()}
        elif records:
            weights = [one["tokens"] for one in records]
            for name in ("top1_agreement", "kl_mean"):
                found[name] = float(np.average([one[name] for one in records], weights=weights))
            found["agreement"] = float(np.mean([one["agreement"] for one in records]))
            found["kl_max"] = max(one["kl_max"] for one in records)
        return found

    def summary(self) -> str:
        """The sum over all prompts in one line, for people."""
        found = self.report()
        return (
            f"compared with full: {found['same']} of {found['prompts']} texts the same, "
            f"agreement {found['agreement']:.1%}, KL(full || policy) mean {max(found['kl_mean'], 0.0):.3g} nats a "
            f"token, largest {max(found['kl_max'], 0.0):.3g}; {self.sizes()}"
        )

    def show(self, difference: Difference, *, verdict: str | None = None) -> None:
        """Prints what came with the uncompressed cache, and how it differs from what was printed before.

        Args:
          difference: of the prompt.
          verdict: whether the uncompressed cache's answer is right, where that is known.
        """
        note("full")
        show_beside(difference.full_text, difference.text)
        if verdict is not None:
            note(verdict)
        for line in difference.lines():
            note(line)
        if self._is_sampled and difference.first is not None:
            note("sampled with the same seed; behind the first difference each text follows from its own tokens")

    def sizes(self) -> str:
        """Bytes of both caches, for people."""
        ours, full = self._decoder.cache_bytes, self.full_cache_bytes
        return f"cache {ours:,} bytes ({self._decoder.policy}), full {full:,} bytes: {full / ours:.2f} times as many"


def _difference(
    tokenizer: Tokenizer,
    tokens: list[int],
    full_tokens: list[int],
    after: Sequence[int],
    *,
    nats: np.ndarray,
    same_top: np.ndarray,
) -> Difference:
    """Where two answers to one prompt part; numbers behind the first one's end are left out."""
    same = num_common(tokens, full_tokens)
    first = None if same == len(tokens) == len(full_tokens) else same
    before = [*after, *tokens[:same]]
    spelled = None
    if first is not None:
        shown = tokenizer.continuation(tokens[:same], after=after)[-_CONTEXT_CHARACTERS:]
        spelled = (_spell(tokenizer, tokens[same:], before), _spell(tokenizer, full_tokens[same:], before), shown)
    return Difference(
        tokens=tokens,
        full_tokens=full_tokens,
        text=tokenizer.continuation(tokens, after=after),
        full_text=tokenizer.continuation(full_tokens, after=after),
        first=first,
        at_first=spelled,
        nats=nats[: len(tokens)],
        same_top=same_top[: len(tokens)],
    )


def _spell(tokenizer: Tokenizer, tokens: list[int], before: Sequence[int]) -> str:
    """The first of these tokens for people: its text in quotes, or its number where it has none of its own."""
    if not tokens:
        return "the end"
    stream = tokenizer.stream(after=before, skip_special_tokens=False)
    text = stream.push(tokens[:1]) + stream.finish()
    return repr(text) if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token {tokens[0]}"
