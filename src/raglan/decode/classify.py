"""`classify`: a class by label likelihood, the passages summed out (Lewis et al. 2020, §2.4 and §3.4).

    p(c|x) ∝ Σ_k p(z_k|x) p(c_1 | x, z_k)

c_1 is the first token of the class's text, so T = 1, and there RAG-Sequence and RAG-Token are one method. The end token is not
scored: with it T would be 2, and the two would part. The sum is over passages first, and then normalised over the classes.

Deviation: the paper's appendix has a head of its own on the decoder's last state; here the generator's own words are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raglan.decode.base import Asked, read_hits
from raglan.decode.rag_sequence import by_tokens
from raglan.errors import RecipeError
from raglan.generator import HFGenerator, encode_prompts
from raglan.likelihood import passage_posterior, sequence_logprob
from raglan.progress import track
from raglan.prompt import Rendered
from raglan.recipe import ClassifyDecode
from raglan.records import Answer, Candidate

__all__ = ["classify", "first_tokens"]


def classify(generator: HFGenerator, asked: Asked, settings: ClassifyDecode) -> list[Answer]:
    """One class a query. Its text is the class's name; all classes are candidates, and their probabilities sum to 1.

    Raises:
        RecipeError: two classes that begin alike, or a class that this generator's vocabulary cannot begin.
    """
    firsts = first_tokens(generator, settings)
    prompts, priors = asked.prompts(generator.prompt), asked.priors()
    answers: dict[int, Answer] = {}
    for group in track(list(by_tokens(prompts, generator.settings.batch_tokens)), "reading"):
        rows = [prompt for place in group for prompt in prompts[place]]
        pairs = [(row, first) for row in range(len(rows)) for first in firsts.values()]
        scores = encode_prompts(generator, rows).score([row for row, _ in pairs], [(first,) for _, first in pairs])
        tables = scores.double().view(len(rows), len(firsts)).split([len(prompts[place]) for place in group])
        for place, table in zip(group, tables, strict=True):
            answers[place] = _answer(asked, place, prompts[place], priors[place], table.T, firsts, settings)
    return [answers[place] for place in range(len(prompts))]


def first_tokens(generator: HFGenerator, settings: ClassifyDecode) -> dict[str, int]:
    """Class → the id of its text's first token, all different.

    Raises:
        RecipeError: two classes that begin alike, or a class that this generator's vocabulary cannot begin.
    """
    found: dict[str, int] = {}
    names: dict[int, str] = {}
    for name, text in settings.labels.items():
        first = generator.answer_ids(text)[0] if text.strip() else None
        if first is None or first == generator.tokenizer.unk_token_id or not generator.tokenizer.decode([first]).strip():
            raise RecipeError(
                f"decode.labels: {text!r} (class {name!r}) has no first token in this generator's vocabulary",
                hint=f"give the class another text, as in labels: {{{name}: 'yes'}}",
            )
        if first in names:
            other = names[first]
            raise RecipeError(
                f"decode.labels: {settings.labels[other]!r} and {text!r} begin with the same token "
                f"{generator.tokenizer.convert_ids_to_tokens(first)!r}, and only the first token is scored",
                hint="give one of the two classes another text, with another beginning",
            )
        found[name], names[first] = first, name
    return found


def _answer(
    asked: Asked, place: int, prompts: Sequence[Rendered], prior: Tensor, each: Tensor, firsts: dict[str, int],
    settings: ClassifyDecode,
) -> Answer:  # fmt: skip
    """`each` is (classes,K) log p(c_1 | x, z_k)."""
    priors, totals, mask = prior.expand(len(each), -1), each[:, :, None], torch.ones((len(each), 1), dtype=torch.bool)
    logprobs = sequence_logprob(priors, totals, mask).log_softmax(0).tolist()
    posteriors = passage_posterior(priors, totals, mask).tolist()
    named = zip(firsts.items(), logprobs, posteriors, strict=True)
    ranked = sorted(
        ((Candidate(name, (first,), value, True), posterior) for (name, first), value, posterior in named),
        key=lambda pair: -pair[0].logprob,
    )
    best, posterior = ranked[0]
    hits = tuple(asked.hits[place])
    return Answer(
        query=asked.queries[place], text=best.text, logprob=best.logprob, finished=True,
        settings=settings.model_dump(), ids=best.ids, prior=tuple(prior.exp().tolist()) if hits else (),
        posterior=tuple(posterior) if hits else (), candidates=tuple(candidate for candidate, _ in ranked),
        **read_hits(asked, place, prompts),
    )  # fmt: skip
