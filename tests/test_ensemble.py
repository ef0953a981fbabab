"""The ensemble against brute force and against worked examples: mixing, groups, choices, and what is computed only once."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raglan.data import choices_of
from raglan.decode import Asked, concat, ensemble, ensembles
from raglan.decode.ensemble import _answer, _Form, _forms
from raglan.errors import CorpusError, RecipeError
from raglan.generator import EncodedPrompts, HFGenerator
from raglan.likelihood import choice_scores, passage_posterior, sequence_logprob, token_logprob
from raglan.metrics import exact_match
from raglan.prompt import Prompt, Rendered
from raglan.recipe import ConcatDecode, EnsembleDecode, load_recipe
from raglan.records import Example, Hit, Passage
from raglan.text import answer_words
from test_generator import made
from test_rag_decode import HITS, QUERIES, asked, next_logprobs, scored, sharpened
from test_recipe import GOOD, recipe

LETTERS = "abc"
module = importlib.import_module("raglan.decode.ensemble")  # its function has its name


def settings(**changes: Any) -> EnsembleDecode:
    return EnsembleDecode(kind="ensemble", **{"max_new_tokens": 4, **changes})


@pytest.fixture(scope="module", params=["bart", "t5", "llama", "reader"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return sharpened(made(request.param, tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return sharpened(made("llama", tmp_path_factory.mktemp("llama")))


def closed(question: Asked) -> Asked:
    return replace(question, hits=[()] * len(question.queries), doc_logprobs=[torch.zeros(0)] * len(question.queries))


# --- worked example E1: multiple choice ---------------------------------------------------------------------------------

CHOICES = {
    "tin": ([0.7], [0.1], 0.05),
    "zinc": ([0.6, 0.8], [0.6, 0.8], 0.1),
    "bronze alloy": ([0.5, 0.8], [0.2, 0.8], 0.05),
    "stainless steel": ([0.9, 0.2, 0.4], [0.6, 0.7, 0.8], 0.01),
}
PRIOR = torch.tensor([1.0, 0.0], dtype=torch.float64).log_softmax(0)
EACH = torch.tensor([[math.log(math.prod(p)) for p in own[:2]] for own in CHOICES.values()], dtype=torch.float64)
BARE = torch.tensor([math.log(own[2]) for own in CHOICES.values()], dtype=torch.float64)
SIZES = {
    "nll_char": torch.tensor([float(len(name)) for name in CHOICES]),
    "nll_token": torch.tensor([float(len(own[0])) for own in CHOICES.values()]),
}


@pytest.mark.parametrize(
    ("scorer", "normalise", "figures", "wins"),
    [
        ("nll", "after", [0.618717, 0.733969, 1.092270, 1.944907], "tin"),
        ("nll", "before", [0.618717, 0.733969, 1.092270, 1.944907], "tin"),
        ("nll_char", "after", [0.206239, 0.183492, 0.091023, 0.129660], "bronze alloy"),
        ("nll_token", "after", [0.618717, 0.366985, 0.546135, 0.648302], "zinc"),
        ("nll_char", "before", [0.256259, 0.183492, 0.096327, 0.146734], "bronze alloy"),
        ("nll_token", "before", [0.618717, 0.366985, 0.562227, 0.711103], "zinc"),
        ("nll_compl", "after", [-2.377015, -1.568616, -1.903462, -2.660263], "stainless steel"),
        ("nll_compl", "before", [-2.377015, -1.568616, -1.903462, -2.660263], "stainless steel"),
    ],
)
def test_four_choices_by_four_scorers(scorer: Any, normalise: Any, figures: list[float], wins: str) -> None:
    lengths = SIZES.get(scorer, torch.ones(4))
    found = choice_scores(PRIOR, EACH, scorer=scorer, normalise=normalise, lengths=lengths, completion_logprobs=BARE)
    assert (-found).tolist() == pytest.approx(figures, abs=1e-6)
    assert list(CHOICES)[int(found.argmax())] == wins


def test_what_would_choose_zinc_is_not_what_is_computed() -> None:
    mixture = choice_scores(PRIOR, EACH, scorer="nll", lengths=torch.ones(4))
    assert mixture.exp().tolist() == pytest.approx([0.538635, 0.480000, 0.335454, 0.143001], abs=1e-6)
    assert mixture.softmax(0).tolist() == pytest.approx([0.359788, 0.320622, 0.224071, 0.095519], abs=1e-6)
    means = EACH @ PRIOR.exp()
    assert means[:2].tolist() == pytest.approx([-0.880011, -0.733969], abs=1e-6)
    uniform = choice_scores(torch.full((2,), math.log(0.5)), EACH, scorer="nll", lengths=torch.ones(4))
    assert uniform.exp()[:2].tolist() == pytest.approx([0.40, 0.48], abs=1e-6)
    assert int(means.argmax()) == int(uniform.argmax()) == 1
    assert int(mixture.argmax()) == 0


# --- worked example E2: words -------------------------------------------------------------------------------------------

SPELLINGS = {
    "1992": [[0.50, 0.90], [0.40, 0.90], [0.10, 0.60]],
    "1992.": [[0.50, 0.05, 0.90], [0.40, 0.08, 0.90], [0.10, 0.10, 0.90]],
    "1995": [[0.02, 0.50], [0.05, 0.60], [0.95, 0.96]],
}
WEIGHTS = torch.tensor([1.2, 0.7, 0.1], dtype=torch.float64).log_softmax(0)


def example_e2(**changes: Any) -> Any:
    question = asked(["when?"], [[0, 1, 2]])
    question = replace(question, doc_logprobs=[WEIGHTS])
    table = {
        _Form(text, (n,)): torch.tensor([math.log(math.prod(p)) for p in own], dtype=torch.float64)
        for n, (text, own) in enumerate(SPELLINGS.items())
    }
    prompts = [Rendered((1,), "")] * 3
    return _answer(question, 0, WEIGHTS, prompts, table, settings(**changes), choose=False)


def test_a_group_is_its_likeliest_spelling_under_all_prompts() -> None:
    answer = example_e2()
    assert answer.text == "1992"
    assert answer.prior == pytest.approx([0.515623, 0.312741, 0.171636], abs=1e-6)
    assert [(c.text, c.surfaces) for c in answer.candidates] == [("1992", ("1992", "1992.")), ("1995", ("1995",))]
    assert [c.logprob for c in answer.candidates] == pytest.approx([-1.035876, -1.765680], abs=1e-6)
    assert answer.posterior == pytest.approx([0.653763, 0.317222, 0.029016], abs=1e-6)
    assert answer.passage_logprobs == pytest.approx([math.log(0.45), math.log(0.36), math.log(0.06)], abs=1e-9)
    assert max(SPELLINGS, key=lambda text: max(map(math.prod, SPELLINGS[text]))) == "1995"  # its own prompt's favourite


def test_exact_groups_and_mixing_by_token_are_other_things() -> None:
    answer = example_e2(dedupe="exact")
    assert [c.text for c in answer.candidates] == ["1992", "1995", "1992."]
    assert [c.logprob for c in answer.candidates] == pytest.approx([-1.035876, -1.765680, -3.809774], abs=1e-6)
    posteriors = ([0.653763, 0.317222, 0.029016], [0.523695, 0.406576, 0.069729], [0.030141, 0.054844, 0.915015])
    per_token = (-1.080386, -3.710249, -2.159914)
    for (text, own), expected, shares in zip(SPELLINGS.items(), per_token, posteriors, strict=True):
        each = torch.tensor(own, dtype=torch.float64).log()[None]
        mask = torch.ones((1, each.shape[2]), dtype=torch.bool)
        assert float(token_logprob(WEIGHTS[None], each, mask)) == pytest.approx(expected, abs=1e-6), text
        whole = next(c.logprob for c in answer.candidates if c.text == text)
        assert float(sequence_logprob(WEIGHTS[None], each, mask)) == pytest.approx(whole, abs=1e-9)
        assert passage_posterior(WEIGHTS[None], each, mask)[0].tolist() == pytest.approx(shares, abs=1e-6), text


def test_giving_no_answer_may_win_or_comes_last() -> None:
    assert example_e2(abstention="1992").text == "1992"
    last = example_e2(abstain="last", abstention="1992.")  # the group, whatever its spelling
    assert [c.text for c in last.candidates] == ["1995", "1992"]
    assert last.posterior == pytest.approx([0.030141, 0.054844, 0.915015], abs=1e-6)
    assert last.passage_logprobs[2] == pytest.approx(math.log(0.912))


# --- brute force --------------------------------------------------------------------------------------------------------


def greedy(generator: HFGenerator, prompt: Rendered, most: int) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    while len(ids) < most and (not ids or ids[-1] not in generator.ends):
        ids = (*ids, int(next_logprobs(generator, prompt, ids).argmax()))
    return ids if ids[-1] in generator.ends else (*ids, generator.eos)


def test_words_equal_their_twin(generator: HFGenerator) -> None:
    question = asked()
    answers = ensemble(generator, question, settings())
    for place, prompts in enumerate(question.prompts(generator.prompt)):
        forms = {greedy(generator, prompt, 4) for prompt in prompts}
        forms = {ids for ids in forms if generator.text(ids, [])} or forms
        weights = question.doc_logprobs[place].double().exp().tolist()
        groups: dict[str, list[float]] = {}
        for ids in forms:
            text = generator.text(ids, [source for prompt in prompts for source in prompt.sources])
            terms = [p * math.exp(scored(generator, prompt, ids)) for p, prompt in zip(weights, prompts, strict=True)]
            groups.setdefault(" ".join(answer_words(text)) or text, []).append(math.log(sum(terms)))
        best = sorted((max(own) for own in groups.values()), reverse=True)
        answer = answers[place]
        assert [c.logprob for c in answer.candidates] == pytest.approx(best, abs=1e-3)
        assert answer.logprob == pytest.approx(best[0], abs=1e-3)
        assert answer.passage_logprobs == pytest.approx([scored(generator, p, answer.ids) for p in prompts], abs=1e-3)
        joint = [p * math.exp(own) for p, own in zip(weights, answer.passage_logprobs, strict=True)]
        assert answer.posterior == pytest.approx([own / sum(joint) for own in joint], abs=1e-6)
        assert sum(answer.prior) == pytest.approx(1, abs=1e-6)
        assert not answer.closed_book


def test_every_spelling_is_scored_under_all_prompts_with_its_end(
    generator: HFGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[int, tuple[int, ...]]] = []
    score = EncodedPrompts.score

    def seen(self: EncodedPrompts, rows: Any, answers: Any) -> Any:
        pairs.extend(zip(rows, map(tuple, answers), strict=True))
        return score(self, rows, answers)

    monkeypatch.setattr(EncodedPrompts, "score", seen)
    question = asked(QUERIES[:1], HITS[:1])
    answer = ensemble(generator, question, settings(dedupe="exact"))[0]
    forms = {ids for _, ids in pairs}
    assert len(pairs) == len(set(pairs)) == len(forms) * 3
    assert {c.ids for c in answer.candidates} <= forms
    assert all(ids[-1] in generator.ends for ids in forms)


def test_with_one_passage_it_is_plain_decoding_and_without_any_closed_book(generator: HFGenerator) -> None:
    question = asked(hits=[[0], [1], [2]])
    by = settings(max_new_tokens=12)
    for one, said in ((question, False), (closed(question), True)):
        plain = generator.generate([p for own in one.prompts(generator.prompt) for p in own], max_new_tokens=12)
        for answer, written in zip(ensemble(generator, one, by), plain, strict=True):
            assert (answer.text, answer.finished, answer.closed_book) == (written.text, written.finished, said)
            if written.finished:
                assert answer.logprob == pytest.approx(written.logprob, abs=1e-3)
            assert answer.posterior == (() if said else (1.0,))


def test_empty_answers_are_dropped_unless_there_is_nothing_else(generator: HFGenerator) -> None:
    prompts = [Rendered((1,), "")]
    empty, word = ((generator.eos,), True), (tuple(generator.answer_ids("odo")), True)
    assert [form.text for form in _forms(generator, prompts, [empty, word, empty])] == ["odo"]
    assert [(form.text, form.ids) for form in _forms(generator, prompts, [empty, empty])] == [("", (generator.eos,))]


def test_drawn_answers_are_scored_as_any_other(generator: HFGenerator) -> None:
    question = asked()
    torch.manual_seed(0)
    answers = ensemble(generator, question, settings(samples=6, sample={"temperature": 1.5, "top_k": 40}))
    torch.manual_seed(0)
    assert answers == ensemble(generator, question, settings(samples=6, sample={"temperature": 1.5, "top_k": 40}))
    assert max(len(answer.candidates) for answer in answers) > 3
    for answer, prompts in zip(answers, question.prompts(generator.prompt), strict=True):
        assert answer.passage_logprobs == pytest.approx([scored(generator, p, answer.ids) for p in prompts], abs=1e-3)
        assert answer.logprob == max(candidate.logprob for candidate in answer.candidates)


def test_choices_behind_a_shared_prompt_equal_rows_of_their_own(generator: HFGenerator) -> None:
    words = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]  # all answers of a toy language
    question = replace(asked(), choices=[words] * 3)
    for answer, prompts, prior in zip(
        ensemble(generator, question, settings()), question.prompts(generator.prompt), question.doc_logprobs, strict=True
    ):
        rows = [(prompt, word) for word in words for prompt in prompts]
        apart = generator.token_logprobs([p for p, _ in rows], [w for _, w in rows], score_eos=False)
        each = torch.tensor([float(own.sum()) for own in apart]).view(len(words), -1)
        mixture = (prior + each).logsumexp(1)
        found = {candidate.text: candidate for candidate in answer.candidates}
        assert set(found) == set(words)
        for word, own, value in zip(words, each.tolist(), mixture.tolist(), strict=True):
            assert found[word].passage_logprobs == pytest.approx(own, abs=1e-3)
            assert found[word].logprob == pytest.approx(value, abs=1e-3)
        assert answer.text == words[int(mixture.argmax())]
        assert [c.score for c in answer.candidates] == sorted((c.score for c in answer.candidates), reverse=True)


@pytest.mark.parametrize("scorer", ["nll_char", "nll_token", "nll_compl"])
def test_scorers_read_characters_tokens_and_the_bare_prompt(generator: HFGenerator, scorer: Any) -> None:
    words = ["the lighthouse", "b", "miller"]
    question = replace(asked(), choices=[words] * 3)
    for answer in ensemble(generator, question, settings(scorer=scorer)):
        for candidate in answer.candidates:
            tokens = len(generator.answer_ids(candidate.text)) - 1
            by = {"nll_char": len(candidate.text), "nll_token": tokens, "nll_compl": 1}[scorer]
            assert len(candidate.ids) == tokens
            bare = 0.0
            if scorer == "nll_compl":
                alone = generator.prompt.settings.model_copy(update={"template": "{question}"})
                short = Prompt(alone, generator.tokenizer, layout=generator.prompt.layout)
                bare = scored(generator, short.render("Answer:", []), candidate.ids)
            assert candidate.score == pytest.approx(candidate.logprob / by - bare, abs=1e-3)


def test_four_choices_take_a_third_of_the_tokens(llama: HFGenerator) -> None:
    """Prompts of some 200 tokens, choices of three: counted at the model's embeddings, padding left out of neither side."""
    passages = [Passage(str(n), f"{n} " + "x" * 150) for n in range(3)]
    words = ["abc", "bca", "cab", "bbb"]
    hits = tuple(Hit(passage, n, 0.0, n + 1) for n, passage in enumerate(passages))
    question = Asked(["who built it?"], [hits], [torch.zeros(3).log_softmax(0)], choices=[words])
    seen = [0]

    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[0] += inputs[0].numel()

    handle = llama.model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        ensemble(llama, question, settings())
        shared, seen[0] = seen[0], 0
        prompts = question.prompts(llama.prompt)[0]
        rows = [(prompt, word) for word in words for prompt in prompts]
        for prompt, word in rows:
            llama.forward(llama.collate([llama.row(prompt, word)]))
    finally:
        handle.remove()
    assert min(len(prompt.ids) for prompt in prompts) > 150
    assert seen[0] / shared >= 3


def test_retrievals_that_share_passages_share_their_reading(generator: HFGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = asked(), asked(hits=[[1, 0, 3], [2, 3], []])
    apart = [ensemble(generator, one, settings())[0:], ensemble(generator, other, settings())[0:]]
    encoded: list[Rendered] = []
    encode = module.encode_prompts
    monkeypatch.setattr(module, "encode_prompts", lambda g, prompts: encoded.extend(prompts) or encode(g, prompts))
    together = ensembles(generator, [one, other], settings())
    assert len(encoded) == len(set(encoded)) == 4 + 2 + 2  # {0,1,2,3}, {2,3}, {1} and closed book
    for own, alone in zip(together, apart, strict=True):
        for a, b in zip(own, alone, strict=True):
            assert (a.text, a.ids, a.hits) == (b.text, b.ids, b.hits)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert a.posterior == pytest.approx(b.posterior, abs=1e-3)


def test_questions_with_choices_and_without_stand_in_one_batch(llama: HFGenerator) -> None:
    mixed = replace(asked(), choices=[(), ("a", "b"), ()])
    plain, given = ensemble(llama, asked(), settings()), ensemble(llama, mixed, settings())
    assert [a.text for a in given][::2] == [a.text for a in plain][::2]
    assert given[1].text in ("a", "b")
    everywhere = ensemble(llama, mixed, settings(choices=["abc", "cba"]))
    assert [answer.text in ("abc", "cba") for answer in everywhere] == [True, False, True]


def test_concat_chooses_behind_its_one_prompt(generator: HFGenerator) -> None:
    words = ["aa", "bca", "c"]
    question = replace(asked(), choices=[words, (), words])
    answers = concat(generator, question, ConcatDecode(max_new_tokens=4))
    assert answers[1].text == concat(generator, asked(), ConcatDecode(max_new_tokens=4))[1].text
    for place in (0, 2):
        prompt = generator.prompt.render(QUERIES[place], [hit.passage for hit in question.hits[place]])
        values = generator.token_logprobs([prompt] * 3, words, score_eos=False)
        sums = [float(value.sum()) for value in values]
        assert answers[place].text == words[sums.index(max(sums))]
        assert answers[place].logprob == pytest.approx(max(sums), abs=1e-3)
        assert answers[place].posterior == ()
        assert answers[place].settings["kind"] == "concat"


# --- what it is given ---------------------------------------------------------------------------------------------------


def test_choices_of_a_question_file() -> None:
    example = Example("7", "which?", ("tin",), metadata={"choices": ["tin", "zinc"]})
    assert choices_of(example) == ("tin", "zinc")
    assert choices_of(Example("8", "which?")) == ()
    for given, message in (
        (["tin"], "two choices or more"), (["tin", "tin"], "all different"), (["tin", ""], "choices is"),
        ("tin", "choices is"), (["lead", "zinc"], "'tin', which is none of its choices"),
    ):  # fmt: skip
        with pytest.raises(CorpusError, match=message):
            choices_of(replace(example, metadata={"choices": given}))


def test_recipes_of_the_ensemble(tmp_path: Path) -> None:
    good = load_recipe(recipe(tmp_path, GOOD + "decode: {kind: ensemble, choices: ['yes', 'no'], scorer: nll_char}"))
    assert isinstance(good.decode, EnsembleDecode)
    for bad, message in (
        ("choices: [yes, no]", "put them in quotes"), ("choices: [a]", "two or more"), ("scorer: nl", "'nll'"),
        ("dedupe: text", "'normalised'"), ("samples: 0", "greater than or equal to 1"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe(tmp_path, GOOD + f"decode: {{kind: ensemble, {bad}}}"))


def test_groups_are_those_of_exact_match() -> None:
    for one, other in (("The 1992.", "1992"), ("Odo  Marrack", "odo marrack"), ("a tower", "tower!")):
        assert exact_match(one, [other]) == 1
        assert module.normalised(one) == module.normalised(other)
    assert module.normalised("the") != module.normalised("...")
    assert json.dumps(settings().model_dump())  # what an answer says of its settings can be written
