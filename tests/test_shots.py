"""Few-shot examples: where they stand, and that they give way before a passage, a turn or the question does."""

from __future__ import annotations

import pytest

import tiny
from raglan.errors import RecipeError
from raglan.prompt import Prompt
from raglan.recipe import PromptSettings, Shot
from raglan.records import Passage

SHOTS = (
    Shot(question="who built it?", answer="the miller", passages=("The miller built it.",)),
    Shot(question="and when?", answer="1790"),
)
PASSAGES = [Passage("a", "The tower stands on the hill."), Passage("b", "It was built of grey stone.")]
TURNS = ["where is the tower?", "on the hill"]


def prompt(budget: int, *, shots: tuple[Shot, ...] = SHOTS, layout: str = "joined") -> Prompt:
    words = tiny.tokenizer(begins=True, ends=False)
    if layout == "chat":
        words.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return Prompt(PromptSettings(max_tokens=budget, shots=shots), words, layout=layout)


def test_shots_stand_first_each_in_the_template_with_its_answer() -> None:
    text = prompt(600).render("how high?", PASSAGES[:1]).text
    assert text == (
        "The miller built it.\n\nQuestion: who built it?\nAnswer: the miller\n\n"
        "Question: and when?\nAnswer: 1790\n\n"
        "The tower stands on the hill.\n\nQuestion: how high?\nAnswer:"
    )


@pytest.mark.parametrize("layout", ["joined", "chat"])
def test_shots_go_before_anything_else_is_touched(layout: str) -> None:
    plain = prompt(4000, shots=(), layout=layout).render("how high?", PASSAGES, history=TURNS)
    full = prompt(4000, layout=layout).render("how high?", PASSAGES, history=TURNS)
    assert not full.dropped_shots
    kept = []
    for budget in range(len(plain.ids) - 20, len(full.ids) + 2):
        found = prompt(budget, layout=layout).render("how high?", PASSAGES, history=TURNS)
        bare = prompt(budget, shots=(), layout=layout).render("how high?", PASSAGES, history=TURNS)
        assert len(found.ids) <= budget
        assert (found.cut_tokens, found.dropped_turns) == (bare.cut_tokens, bare.dropped_turns)  # shots cost the others nothing
        assert found.dropped_shots == 2 or not found.truncated
        kept.append(2 - found.dropped_shots)
        assert [shot.answer in found.text for shot in SHOTS] == [kept[-1] > 0, kept[-1] > 1]  # the last goes first
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2}


def test_a_generator_that_reads_passage_by_passage_takes_no_shots() -> None:
    with pytest.raises(RecipeError, match=r"prompt\.shots"):
        prompt(200, layout="fused")
