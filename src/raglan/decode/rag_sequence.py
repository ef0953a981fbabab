"""`rag_sequence`: beams passage by passage, then candidates ranked by their marginal (Lewis et al. 2020, §2.5).

    score(y) = log Σ_k p(z_k|x) p(y | x, z_k)

`thorough` takes p(y | x, z_k) from every passage; `fast` takes it as 0 where the passage's own beams lack y. A pair that was
scored by its own beam is not scored again, and no prompt is encoded twice.

A `fast` answer's posterior, like its score, counts only the passages that found it.

Deviation from transformers: candidates are never normalised by length, and contributions of a repeated y are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raglan.decode.base import Asked, read_hits
from raglan.generator import EncodedPrompts, HFGenerator, Written, encode_prompts
from raglan.likelihood import passage_posterior, sequence_logprob
from raglan.progress import track
from raglan.prompt import Rendered
from raglan.recipe import RagSequenceDecode
from raglan.records import Answer, Candidate

__all__ = ["by_tokens", "rag_sequence"]

Ids = tuple[int, ...]


def rag_sequence(generator: HFGenerator, asked: Asked, settings: RagSequenceDecode) -> list[Answer]:
    """One answer a query. All B·K prompts of a batch are encoded in one call and decoded in one call."""
    prompts, priors = asked.prompts(generator.prompt), asked.priors()
    answers: dict[int, Answer] = {}
    for group in track(list(by_tokens(prompts, generator.settings.batch_tokens // settings.beams)), "reading"):
        encoded = encode_prompts(generator, [prompt for place in group for prompt in prompts[place]])
        written = encoded.write(
            max_new_tokens=settings.max_new_tokens, beams=settings.beams, length_penalty=settings.length_penalty
        )
        totals = _totals(encoded, [prompts[place] for place in group], written, settings)
        for place, table in zip(group, totals, strict=True):
            answers[place] = _answer(generator, asked, place, prompts[place], priors[place], table, settings)
    return [answers[place] for place in range(len(prompts))]


def by_tokens(prompts: Sequence[Sequence[Rendered]], most: int) -> Iterator[list[int]]:
    """Questions whose prompts are encoded together: at most `most` padded tokens, at least one question."""
    order = sorted(range(len(prompts)), key=lambda place: -_longest(prompts[place]))
    group: list[int] = []
    rows = 0
    for place in order:
        if group and (rows + len(prompts[place])) * _longest(prompts[group[0]]) > most:
            yield group
            group, rows = [], 0
        group.append(place)
        rows += len(prompts[place])
    if group:
        yield group


def _longest(prompts: Sequence[Rendered]) -> int:
    return max(len(prompt.ids) for prompt in prompts)


def _totals(
    encoded: EncodedPrompts,
    prompts: Sequence[Sequence[Rendered]],
    written: Sequence[Sequence[Written]],
    settings: RagSequenceDecode,
) -> list[dict[Ids, Tensor]]:
    """Of each question, candidate → (K,) log p(y|x,z_k); −inf where it was not asked for."""
    tables: list[dict[Ids, Tensor]] = []
    begin = 0
    for rows in prompts:
        table: dict[Ids, Tensor] = {}
        for k in range(len(rows)):
            for found in written[begin + k]:
                total = table.setdefault(found.ids, torch.full((len(rows),), torch.nan, dtype=torch.float64))
                total[k] = found.logprob
        tables.append(table)
        begin += len(rows)
    if settings.mode == "fast":
        return [{ids: total.nan_to_num(nan=-torch.inf) for ids, total in table.items()} for table in tables]
    _score_missing(encoded, tables)
    return tables


def _score_missing(encoded: EncodedPrompts, tables: Sequence[dict[Ids, Tensor]]) -> None:
    missing: list[tuple[Tensor, int, int, Ids]] = []
    begin = 0
    for table in tables:
        missing += [
            (total, k, begin + k, ids) for ids, total in table.items() for k in total.isnan().nonzero().flatten().tolist()
        ]
        begin += len(next(iter(table.values())))
    scores = encoded.score([row for _, _, row, _ in missing], [ids for *_, ids in missing]).double().sum(-1)
    for (total, k, _, _), score in zip(missing, scores, strict=True):
        total[k] = score


def _answer(
    generator: HFGenerator, asked: Asked, place: int, prompts: Sequence[Rendered], prior: Tensor,
    table: dict[Ids, Tensor], settings: RagSequenceDecode,
) -> Answer:  # fmt: skip
    sources = list(dict.fromkeys(source for prompt in prompts for source in prompt.sources))
    totals = torch.stack(list(table.values()))[:, :, None]  # (candidates,K,1): a whole answer is one step here
    priors, mask = prior.expand(len(table), -1), torch.ones((len(table), 1), dtype=torch.bool)
    marginals = sequence_logprob(priors, totals, mask).tolist()
    texts = [generator.text(ids, sources) for ids in table]
    candidates = [
        Candidate(text, ids, marginal, ids[-1] in generator.ends)
        for text, ids, marginal in zip(texts, table, marginals, strict=True)
    ]
    ranked = sorted(_merged(candidates) if settings.merge == "text" else candidates, key=lambda c: -c.logprob)
    chosen = ranked[0]
    same = [
        place
        for place, c in enumerate(candidates)
        if c.ids == chosen.ids or (settings.merge == "text" and c.text == chosen.text)
    ]
    together = totals[same].logsumexp(0, keepdim=True)
    posterior = passage_posterior(prior[None], together, mask[:1])[0].tolist()
    hits = tuple(asked.hits[place])
    return Answer(
        query=asked.queries[place], text=chosen.text, logprob=chosen.logprob, finished=chosen.finished,
        settings=settings.model_dump(), ids=chosen.ids,
        prior=tuple(prior.exp().tolist()) if hits else (), posterior=tuple(posterior) if hits else (),
        candidates=tuple(ranked), **read_hits(asked, place, prompts),
    )  # fmt: skip


def _merged(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that read the same added up, under the ids of the likeliest."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: -c.logprob):
        groups.setdefault(candidate.text, []).append(candidate)
    return [
        Candidate(
            text,
            same[0].ids,
            float(torch.tensor([c.logprob for c in same], dtype=torch.float64).logsumexp(0)),
            same[0].finished,
        )
        for text, same in groups.items()
    ]
