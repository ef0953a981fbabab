"""`ensemble`: whole answers, each scored under all passages and mixed (Lin et al. 2023, RA-DIT, equation 2).

    log p(y|x) = log Σ_k p(z_k|x) p_LM(y | z_k ∘ x)

Words: every prompt writes an answer by itself; empty ones are dropped; each that is left is scored under every prompt, its end
token included; answers that exact match takes for one are a group, and a group counts as its likeliest spelling, since
spellings are a sample and no partition. Choices: each is scored under every prompt, without an end token.

A prompt is encoded once and shared by all that is scored behind it. Several retrievals of the same questions may be answered
together (`ensembles`): a prompt that two of them have is encoded and written from once, and no pair is scored twice.

Against `rag_sequence`: that one keeps empty answers, does not group them, and scores an answer that was cut off as it stands;
here an end token is added to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from raglan.decode.base import Asked, read_hits
from raglan.decode.rag_sequence import by_tokens
from raglan.generator import EncodedPrompts, HFGenerator, encode_prompts
from raglan.likelihood import choice_scores, passage_posterior, sequence_logprob
from raglan.progress import track
from raglan.prompt import Prompt, Rendered
from raglan.recipe import EnsembleDecode, SampleSettings
from raglan.records import Answer, Candidate
from raglan.text import answer_words

__all__ = ["ensemble", "ensembles", "normalised"]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Form:
    """One spelling of an answer. `size` is its characters or tokens, where choices are divided by them."""

    text: str
    ids: Ids
    finished: bool = True
    size: int = 1
    completion: float = 0.0


def ensemble(generator: HFGenerator, asked: Asked, settings: EnsembleDecode) -> list[Answer]:
    """One answer a query; one of its choices where it has any. A query without hits is asked closed book.

    Candidates are groups of answers, or the choices, best first, with their mixtures and log p(y|x,z_k).
    """
    return ensembles(generator, [asked], settings)[0]


def ensembles(generator: HFGenerator, retrievals: Sequence[Asked], settings: EnsembleDecode) -> list[list[Answer]]:
    """The answers of each of several retrievals of the same questions; what they share is read once."""
    first = retrievals[0]
    prompts = [asked.prompts(generator.prompt) for asked in retrievals]
    unique = [list(dict.fromkeys(p for own in prompts for p in own[place])) for place in range(len(first.queries))]
    choices = [_choices(generator, own, unique[place][0], settings) for place, own in enumerate(first.given(settings.choices))]
    _complete(generator, choices, settings)
    priors = [asked.priors() for asked in retrievals]
    answers: list[dict[int, Answer]] = [{} for _ in retrievals]
    written = [place for place, own in enumerate(choices) if not own]
    chosen = [place for place, own in enumerate(choices) if own]
    for places, width in ((written, settings.samples or 1), (chosen, 1)):
        most = max(1, generator.settings.batch_tokens // width)
        groups = [[places[n] for n in group] for group in by_tokens([unique[place] for place in places], most)]
        for group in track(groups, "reading"):
            tables = _tables(generator, settings, [unique[p] for p in group], [[r[p] for p in group] for r in prompts],
                             [choices[p] for p in group])  # fmt: skip
            for asked, found, prior, own, rows in zip(retrievals, answers, priors, prompts, tables, strict=True):
                for place, table in zip(group, rows, strict=True):
                    choose = bool(choices[place])
                    found[place] = _answer(asked, place, prior[place], own[place], table, settings, choose=choose)
    return [[found[place] for place in range(len(first.queries))] for found in answers]


def normalised(text: str) -> str:
    """By what exact match compares; a text of nothing but articles and punctuation stays itself."""
    return " ".join(answer_words(text)) or text


def _choices(generator: HFGenerator, texts: Sequence[str], prompt: Rendered, settings: EnsembleDecode) -> list[_Form]:
    """The choices' own tokens behind this prompt, without the end token."""
    found = []
    for text in texts:
        ids = tuple(generator.answer_ids(text, prompt.answer_space)[:-1])
        found.append(_Form(text, ids, size=len(text.strip()) if settings.scorer == "nll_char" else len(ids)))
    return found


def _complete(generator: HFGenerator, choices: list[list[_Form]], settings: EnsembleDecode) -> None:
    """For nll_compl, log p(a|"Answer:") of every choice, each computed once."""
    different = list(dict.fromkeys(form.ids for own in choices for form in own))
    if settings.scorer != "nll_compl" or not different:
        return
    template = generator.prompt.settings.model_copy(
        update={"template": "{question}", "no_passage": None, "question_form": "as_written"}
    )
    bare = Prompt(template, generator.tokenizer, layout=generator.prompt.layout, limit=generator.prompt.budget)
    encoded = encode_prompts(generator, [bare.render(settings.completion, [])])
    sums = dict(zip(different, encoded.score([0] * len(different), different).double().sum(-1).tolist(), strict=True))
    for own in choices:
        own[:] = [_Form(form.text, form.ids, size=form.size, completion=sums[form.ids]) for form in own]


def _tables(
    generator: HFGenerator, settings: EnsembleDecode, unique: Sequence[Sequence[Rendered]],
    prompts: Sequence[Sequence[Sequence[Rendered]]], choices: Sequence[Sequence[_Form]],
) -> list[list[dict[_Form, Tensor]]]:  # fmt: skip
    """Of each retrieval and question, answer → (K,) log p(y|x,z_k). All prompts are encoded in one call."""
    encoded = encode_prompts(generator, [prompt for own in unique for prompt in own])
    begins = [sum(map(len, unique[:n])) for n in range(len(unique))]
    rows = [{prompt: begin + n for n, prompt in enumerate(own)} for begin, own in zip(begins, unique, strict=True)]
    written = [] if any(choices) else _written(generator, encoded, settings)
    wanted: list[list[tuple[list[int], Sequence[_Form]]]] = []
    for retrieval in prompts:
        wanted.append([])
        for place, own in enumerate(retrieval):
            at = [rows[place][prompt] for prompt in own]
            forms = choices[place] or _forms(generator, own, [ids for row in at for ids in written[row]])
            wanted[-1].append((at, forms))
    pairs = list(dict.fromkeys((row, form.ids) for own in wanted for at, forms in own for form in forms for row in at))
    sums = encoded.score([row for row, _ in pairs], [ids for _, ids in pairs]).double().sum(-1)
    scores = dict(zip(pairs, sums.tolist(), strict=True))
    return [
        [
            {form: torch.tensor([scores[row, form.ids] for row in at], dtype=torch.float64) for form in forms}
            for at, forms in own
        ]
        for own in wanted
    ]


def _written(generator: HFGenerator, encoded: EncodedPrompts, settings: EnsembleDecode) -> list[list[tuple[Ids, bool]]]:
    """What each prompt writes, every answer with an end token, and whether it ended by itself."""
    draws = settings.samples
    ids, _ = encoded.sequences(
        max_new_tokens=settings.max_new_tokens, returns=draws or 1, draw=draws is not None,
        processors=[] if draws is None else _drawn_by(settings.sample),
    )  # fmt: skip
    ended = [(tuple(row), True) if encoded.ended(row) else ((*row, generator.eos), False) for row in ids]
    return [ended[start : start + (draws or 1)] for start in range(0, len(ended), draws or 1)]


def _drawn_by(sample: SampleSettings) -> list[LogitsProcessor]:
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(sample.temperature)]
    chain += [TopKLogitsWarper(sample.top_k)] if sample.top_k else []
    return chain + ([TopPLogitsWarper(sample.top_p)] if sample.top_p < 1 else [])


def _forms(generator: HFGenerator, prompts: Sequence[Rendered], written: Sequence[tuple[Ids, bool]]) -> list[_Form]:
    """Different spellings, without the empty ones unless there is nothing else."""
    sources = list(dict.fromkeys(source for prompt in prompts for source in prompt.sources))
    forms = [_Form(generator.text(ids, sources), ids, finished) for ids, finished in dict.fromkeys(written)]
    return [form for form in forms if form.text] or forms


def _answer(
    asked: Asked, place: int, prior: Tensor, prompts: Sequence[Rendered], table: dict[_Form, Tensor], settings: EnsembleDecode,
    *, choose: bool,
) -> Answer:  # fmt: skip
    totals = torch.stack(list(table.values()))[:, :, None]  # (forms,K,1): a whole answer is one step here
    priors, mask = prior.expand(len(table), -1), torch.ones((len(table), 1), dtype=torch.bool)
    mixtures = sequence_logprob(priors, totals, mask).tolist()
    scores = _compared(prior, totals[:, :, 0], list(table), settings) if choose else [None] * len(table)
    found = {
        form: Candidate(form.text, form.ids, mixture, form.finished, tuple(total.tolist()), score)
        for (form, total), mixture, score in zip(table.items(), mixtures, scores, strict=True)
    }
    ranked = sorted(found.values(), key=lambda c: -(c.score or 0.0)) if choose else _grouped(found.values(), settings)
    best = ranked[0]
    at = next(n for n, candidate in enumerate(found.values()) if candidate.ids == best.ids and candidate.text == best.text)
    posterior = passage_posterior(prior[None], totals[at : at + 1], mask[:1])[0].tolist()
    each = bool(asked.hits[place]) and not asked.together
    return Answer(
        query=asked.queries[place], text=best.text, logprob=best.logprob, finished=best.finished,
        settings=settings.model_dump(), ids=best.ids,
        prior=tuple(prior.exp().tolist()) if each else (), posterior=tuple(posterior) if each else (),
        candidates=tuple(ranked), passage_logprobs=best.passage_logprobs if each else (),
        **read_hits(asked, place, prompts),
    )  # fmt: skip


def _compared(prior: Tensor, totals: Tensor, forms: Sequence[_Form], settings: EnsembleDecode) -> list[float]:
    return choice_scores(
        prior, totals, scorer=settings.scorer, normalise=settings.normalise,
        lengths=torch.tensor([form.size for form in forms], dtype=torch.float64),
        completion_logprobs=torch.tensor([form.completion for form in forms], dtype=torch.float64),
    ).tolist()  # fmt: skip


def _grouped(candidates: Iterable[Candidate], settings: EnsembleDecode) -> list[Candidate]:
    """Groups by the likelihood of their likeliest spelling, which is their text."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: -c.logprob):
        key = normalised(candidate.text) if settings.dedupe == "normalised" else candidate.text
        groups.setdefault(key, []).append(candidate)
    best = [replace(own[0], surfaces=tuple(dict.fromkeys(c.text for c in own))) for own in groups.values()]
    none = normalised(settings.abstention)
    return sorted(best, key=lambda c: settings.abstain == "last" and normalised(c.text) == none)
