"""What every decoding reads: questions, their hits, and log p(z|x) of those hits; and which of the hits were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from raglan.prompt import Prompt, Rendered
from raglan.records import Hit

__all__ = ["Asked", "pad_prior", "read_hits"]


@dataclass(frozen=True)
class Asked:
    """B questions with their hits and priors, ready to be decoded.

    Attributes:
        queries: (B,) questions.
        hits: of each question, best first, possibly none.
        doc_logprobs: of each question, log p(z|x) of its hits, in their order; None where a decoding needs none.
        history: of each question, the dialogue's earlier turns, oldest first; none at all where it is empty.
        choices: of each question, the answers it may have; none where any will do, none at all where it is empty.
        together: one prompt a question with all its passages, which is sure of itself, and not one a passage.
        turns: of each question, how many of its hits, in their order, each dialogue turn found (RAG-Turn).
        k: passages that a further retrieval gives (Self-RAG).
    """

    queries: Sequence[str]
    hits: Sequence[Sequence[Hit]]
    doc_logprobs: Sequence[Tensor] | None = None
    history: Sequence[Sequence[str]] = ()
    turns: Sequence[Sequence[int]] = ()
    choices: Sequence[Sequence[str]] = ()
    together: bool = False
    k: int = 0

    def prompts(self, prompt: Prompt) -> list[list[Rendered]]:
        """One prompt a passage, or one for all; a question without hits has one, without a passage."""
        if self.together:
            asked = zip(self.queries, self.hits, self.said(), strict=True)
            return [[prompt.render(query, [h.passage for h in found], history=said)] for query, found, said in asked]
        return [
            [prompt.render(query, [hit.passage], history=said) for hit in found] or [prompt.render(query, [], history=said)]
            for query, found, said in zip(self.queries, self.hits, self.said(), strict=True)
        ]

    def said(self) -> Sequence[Sequence[str]]:
        """The history of each question."""
        return self.history or [()] * len(self.queries)

    def given(self, default: Sequence[str]) -> list[Sequence[str]]:
        """The choices of each question, or these where it has none of its own."""
        return [own or default for own in self.choices or [()] * len(self.queries)]

    def only(self, places: Sequence[int]) -> Asked:
        """These questions of them."""
        picked: dict[str, Any] = {
            field.name: [own[place] for place in places]
            for field in fields(self)
            if isinstance(own := getattr(self, field.name), Sequence) and len(own)
        }
        return replace(self, **picked)

    def priors(self) -> list[Tensor]:
        """log p(z|x) of each question's prompts, float64; a question without hits is sure of its one prompt."""
        if self.together:
            return [torch.zeros(1, dtype=torch.float64) for _ in self.queries]
        assert self.doc_logprobs is not None
        return [prior.double() if len(prior) else torch.zeros(1, dtype=torch.float64) for prior in self.doc_logprobs]


def read_hits(asked: Asked, place: int, prompts: Sequence[Rendered]) -> dict[str, Any]:
    """`hits`, `dropped` and `truncated` of a question's answer, from its prompts.

    One prompt for all passages has lost its last ones where it had no room, and they are no hits. Where each passage has a
    prompt, all of them stay, since they have a prior; one without room left its own without a passage.
    """
    hits = tuple(asked.hits[place])
    if asked.together:
        kept = len(hits) - prompts[0].dropped_passages
        hits, dropped = hits[:kept], hits[kept:]
    else:
        dropped = tuple(hit for hit, prompt in zip(hits, prompts, strict=False) if prompt.dropped_passages)
    return {"hits": hits, "dropped": dropped, "truncated": bool(dropped) or any(prompt.truncated for prompt in prompts)}


def pad_prior(priors: Sequence[Tensor]) -> Tensor:
    """Priors of unlike length → (B,K), −inf where a question has fewer passages."""
    return torch.nn.utils.rnn.pad_sequence(list(priors), batch_first=True, padding_value=-torch.inf)
