"""Time, forward passes, positions and kept numbers of Self-RAG decoding, raglan against a loop over passages, in one run.

    make bench-self-rag                                    (about 10 minutes of CPU on one core; needs no data)
    python benchmarks/self_rag.py --quick                  (once each, and fewer questions)
    python benchmarks/self_rag.py --repeats 1 --rows A     (one row)

Both sides have the same random model (2 layers, 128 wide, V = 32,016, float32), one thread, and take turns; time is process
time, the median of the repeats. The model's positions are set so that it writes rows of the right grammar and length: prompt
96, passage 128, answer or segment 24, its end or boundary included; which tokens of a group it writes depends on what it read.

- straightforward: decides by a whole generation, then reads every passage alone, with its own prefill, to the token limit,
  float log-softmax over V kept at each step. Scores by the same functions.
- lenient: the same, stopping at the end of an answer or a segment.

A: short form, adaptive, K 10, limit 100. B: long form, always, K 5, beam 2, 3 levels, limit 300. B2: B that reads on only the
two most relevant passages of a path; the straightforward side writes all and then leaves the same ones out. A row counts only
if scores and answers of both sides are equal; counts are asserted. In B passages leave the context, and a segment's [Retrieval]
stays: 24 ids of history each, without the boundary. Bound: A with two passages of rel ≥ .9 and eight of ≤ .3, with and without
`prune: bound`. Options: A's question and passages with five options, scored and not written. Sweep: a thousand settings on a
thousand questions of ten candidates. Rescore: questions of A and of B answered live once, against opening what was kept of
them and a hundred settings, all of them arrays (asserted: < 1 % of the time). Of A none needs generation; of B those that come
to what was never written have no figures, and two questions are recorded once more, so widely that none does. All figures of B
are compared with those of a replay by the live search.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from raglan.decode import Asked
from raglan.decode.self_rag import self_rag
from raglan.decode.self_rag.cache import CandidateCache
from raglan.decode.self_rag.recording import record, replay
from raglan.decode.self_rag.table import Table
from raglan.generator import HFGenerator
from raglan.metrics import exact_match
from raglan.recipe import (
    GeneratorSettings,
    PromptSettings,
    PruneSettings,
    SelfRagDecode,
    SelfRagPromptSettings,
    SweepSettings,
)
from raglan.records import Answer, Hit, Marked, Passage
from raglan.reflection import Components, Schema, Weights, components, retrieve_probability, retrieves, step
from raglan.sweep_settings import Setting, settings_of
from raglan.sweep_trials import Sweep, Trials
from raglan.sweep_trials import sweep as swept

WORDS, WIDTH, EOS = 32000, 128, 2
PROMPT, PASSAGE, SEGMENT = 96, 128, 24
MARKS_AND_ONE = 14
SHARP = 12.0  # of the model whose candidates are far apart
ROLES = ("is_rel", "word", "is_sup", "is_use", "retrieve", "end")
SCHEMA = Schema.numbered(WORDS)


@dataclass(frozen=True)
class Row:
    """A line of the table: settings, how many passages, levels, and what the counts must be, straightforward and ours."""

    name: str
    settings: SelfRagDecode
    passages: int
    levels: int
    calls: tuple[int, int]
    positions: tuple[int, int]
    kept: tuple[int, int]
    must: tuple[float, float]  # straightforward ÷ ours, lenient ÷ ours


def rows() -> list[Row]:
    short: dict[str, Any] = {"kind": "self_rag", "form": "short", "retrieve": "adaptive", "max_new_tokens": 100}
    tree: dict[str, Any] = {
        "kind": "self_rag", "form": "long", "retrieve": "always", "max_new_tokens": 300, "beam": 2, "max_segments": 3,
        "passages": "static", "keep_passages": 0,
    }  # fmt: skip
    behind = SEGMENT - 1  # positions of a segment that are computed
    alone = [PROMPT + level * SEGMENT + PASSAGE + 299 for level in range(3)]
    return [
        Row(
            "A", SelfRagDecode(**short), 10, 1, (11 * 100, 1 + SEGMENT),
            (PROMPT + 99 + 10 * (PROMPT + PASSAGE + 99), PROMPT + 10 * (PASSAGE + behind)),
            (11 * 100 * (WORDS + 16), MARKS_AND_ONE * (1 + 10 * SEGMENT)), (15, 3.5),
        ),
        Row(
            "B", SelfRagDecode(**tree), 5, 3, (25 * 300, 1 + 3 * SEGMENT + 2),
            (5 * alone[0] + 10 * alone[1] + 10 * alone[2], PROMPT + 25 * (PASSAGE + behind) + 2 * 2 * SEGMENT),
            (25 * 300 * (WORDS + 16), MARKS_AND_ONE * (1 + 25 * SEGMENT)), (35, 3),
        ),
        Row(
            "B2", SelfRagDecode(**tree, prune={"kind": "top_m", "m": 2}), 5, 3, (25 * 300, 1 + 3 * SEGMENT + 2),
            (5 * alone[0] + 10 * alone[1] + 10 * alone[2], PROMPT + 25 * PASSAGE + 10 * behind + 2 * 2 * SEGMENT),
            (25 * 300 * (WORDS + 16), MARKS_AND_ONE * (1 + 25 + 10 * behind)), (35, 3),
        ),
    ]  # fmt: skip


# The model: what it writes at a position is of the role that the position has


def made(row: Row, *, sharp: float = 1.0) -> HFGenerator:
    """`sharp`: what its logits are multiplied by; it writes the same, more surely."""
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=WORDS + 16, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=1024, tie_word_embeddings=False,
        eos_token_id=EOS, bos_token_id=None, pad_token_id=WORDS + 15, initializer_range=0.05, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[: len(ROLES)]
    role = dict(zip(ROLES, directions, strict=True))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, 2 * WIDTH :] *= 6
            block.attn.c_proj.weight *= 6
        model.transformer.wte.weight.normal_()
        model.transformer.wpe.weight.zero_()
        for position, name in _roles(row).items():
            model.transformer.wpe.weight[position] = 30 * role[name]
        model.transformer.wte.weight[SCHEMA.closes] = 90 * role["is_rel"]
        head = 0.3 * torch.randn(WORDS + 16, WIDTH) + 2 * role["word"]
        for name in ("is_rel", "is_sup", "is_use", "retrieve"):
            for identity in SCHEMA.ids[name]:
                head[identity] += 2 * (role[name] - role["word"])
        head[SCHEMA.yes] += 0.5 * role["retrieve"]
        head[EOS] += 2 * (role["end"] - role["word"])
        head[[0, 1, 3, WORDS + 15, SCHEMA.opens, SCHEMA.closes]] = 0
        model.lm_head.weight.copy_(head * sharp)
    names = {"<x>": 0, "<s>": 1, "</s>": EOS, "<unk>": 3} | {f"w{number}": number for number in range(4, WORDS)}
    inner = Tokenizer(models.WordLevel(names, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    words.add_special_tokens({"extra_special_tokens": list(SCHEMA.spellings)})
    words.add_special_tokens({"pad_token": "<pad>"})
    prompt = PromptSettings(self_rag=SelfRagPromptSettings(template="{instruction}"))
    return HFGenerator(model, words, GeneratorSettings(model="random", dtype="float32"), prompt)


def _roles(row: Row) -> dict[int, str]:
    """Position of the last id read → role of the next one; </paragraph> has its own say."""
    found = {PROMPT - 1: "retrieve"}
    for level in range(row.levels):
        start = PROMPT + level * SEGMENT + PASSAGE
        last = level + 1 == row.levels
        tail = ("is_sup", "is_use", "end" if last else "retrieve")
        found |= {start + at: "word" for at in range(SEGMENT - 4)}
        found |= {start + SEGMENT - 4 + at: name for at, name in enumerate(tail)}
    far = max(found)
    return found | dict.fromkeys(range(far + 1, 1024), "word")


def asked(row: Row, passages: int | None = None, *, seed: int = 5) -> Asked:
    drawn = np.random.default_rng(seed)

    def text(length: int) -> str:
        return " ".join(f"w{number}" for number in drawn.integers(4, WORDS, length))

    hits = [Hit(Passage(f"p{rank}", text(PASSAGE - 3)), rank, 0.0, rank + 1) for rank in range(passages or row.passages)]
    return Asked([text(PROMPT)], [hits], k=row.passages)


# The yardsticks


@dataclass
class Spent:
    calls: int = 0
    positions: int = 0
    kept: int = 0


class Plain:
    """Every passage alone: what a loop over `generate` with its scores does."""

    def __init__(self, generator: HFGenerator, row: Row, *, lenient: bool):
        self.generator, self.row, self.lenient = generator, row, lenient
        self.spent = Spent()

    def run(self, question: Asked) -> list[tuple[float, str]]:
        """Score and text of every finished path, best first."""
        prompt = self.generator.marked_prompt
        asked = prompt.question(question.queries[0])
        passages = [prompt.passage(hit.passage) for hit in question.hits[0]]
        if self.row.settings.retrieve == "adaptive":
            marks = self._generated(asked).mark_logprobs[0]
            assert retrieves(retrieve_probability(marks), self.row.settings.threshold)
        live: list[tuple[list[float], list[int], str]] = [([], asked, "")]
        finished: list[tuple[list[float], list[int], str]] = []
        for _ in range(self.row.levels):
            most = self.row.settings.prune.m or len(passages)
            every = [[self._child(parent, passage) for passage in passages] for parent in live]
            grown = [one[:2] for own in every for one in sorted(own, key=lambda one: -one[2])[:most]]
            finished += [path for path, ended in grown if ended]
            going = sorted((path for path, ended in grown if not ended), key=lambda path: np.mean(path[0]))
            distinct = {text: path for path in going for text in path[2:]}  # of equal texts the better one
            live = sorted(distinct.values(), key=lambda path: -np.mean(path[0]))[: self.row.settings.beam]
        return sorted(((float(np.mean(scores)), text) for scores, _, text in finished), reverse=True)

    def _child(
        self, parent: tuple[list[float], list[int], str], passage: list[int]
    ) -> tuple[tuple[list[float], list[int], str], bool, float]:
        """The path with this passage, whether it has ended, and how relevant the passage is."""
        scores, context, text = parent
        one = self._generated([*context, *passage])
        one = _cut(one, {EOS, *SCHEMA.ids["retrieve"]})
        parts = components(
            one.ids, one.logprobs, one.mark_logprobs, SCHEMA, retrieved=True, settings=_scoring(self.row), eos=EOS
        )
        said = f"{text} {self.generator.marked_prompt.text(one.ids)}".strip()
        path = ([*scores, float(step(parts, Weights()))], [*context, SCHEMA.yes, *one.ids[:-1]], said)
        return path, one.ids[-1] == EOS, parts.rel

    @torch.no_grad()
    def _generated(self, ids: Sequence[int]) -> Marked:
        """Greedy, batch 1, to the limit; (T,V) log-probabilities are kept until it ends."""
        model, past, kept, written = self.generator.model, DynamicCache(), [], []
        given = torch.tensor([list(ids)])
        for _ in range(self.row.settings.limit):
            logits = model(input_ids=given, past_key_values=past, use_cache=True, logits_to_keep=1).logits[0, -1]
            self.spent.calls += 1
            self.spent.positions += given.shape[1]
            kept.append(logits.float().log_softmax(-1))
            written.append(int(kept[-1].argmax()))
            given = torch.tensor([[written[-1]]])
            if self.lenient and written[-1] in {EOS, *SCHEMA.ids["retrieve"]}:
                break
        whole = torch.stack(kept)
        self.spent.kept += whole.numel()
        marks = whole[:, list(SCHEMA.marks)].numpy()
        return Marked(tuple(written), whole[range(len(written)), written].numpy(), marks, "length")


def _cut(one: Marked, ends: set[int]) -> Marked:
    at = next(at for at, token in enumerate(one.ids) if token in ends) + 1
    return Marked(one.ids[:at], one.logprobs[:at], one.mark_logprobs[:at], "eos" if one.ids[at - 1] == EOS else "stop")


def _scoring(row: Row) -> Any:
    from raglan.decode.self_rag.rules import scoring

    return scoring(row.settings, exact=True)


# Both sides


def measured(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def check(row: Row, answer: Answer, theirs: list[tuple[float, str]]) -> None:
    """The same best answer, and the same scores of all that were written last."""
    assert answer.trace is not None
    told = answer.trace["candidates"] if row.levels == 1 else answer.trace["levels"][-1]["candidates"]
    ours = sorted((float(one["final"]) for one in told if "final" in one), reverse=True)
    assert np.allclose(ours, [score for score, _ in theirs], atol=1e-4), (ours, theirs)
    assert answer.text == theirs[0][1]


def compare(row: Row, repeats: int) -> None:
    generator, question = made(row), asked(row)
    times: dict[str, list[float]] = {"straightforward": [], "lenient": [], "ours": []}
    self_rag(generator, question, row.settings)  # not counted: the head is checked once
    for _ in range(repeats):
        before = generator.cost.copy()
        seconds, answers = measured(lambda: self_rag(generator, question, row.settings))
        spent = generator.cost - before
        assert (spent.calls, spent.positions, spent.logprobs) == (row.calls[1], row.positions[1], row.kept[1]), spent
        times["ours"].append(seconds)
        for side in ("straightforward", "lenient"):
            plain = Plain(generator, row, lenient=side == "lenient")
            seconds, theirs = measured(lambda plain=plain: plain.run(question))
            told, wanted = plain.spent, (row.calls[0], row.positions[0], row.kept[0])
            assert side == "lenient" or (told.calls, told.positions, told.kept) == wanted, told
            check(row, answers[0], theirs)
            times[side].append(seconds)
        print(f"  {row.name}: " + ", ".join(f"{side} {values[-1]:.3f} s" for side, values in times.items()), flush=True)
    middle = {side: statistics.median(values) for side, values in times.items()}
    print(f"\n| {row.name} | straightforward | ours | ratio | target |\n|---|---|---|---|---|")
    for name, (theirs_, ours_), goal in (
        ("forward calls", row.calls, "exact"), ("positions", row.positions, "exact"), ("log-probs kept", row.kept, "≥ 10,000"),
    ):  # fmt: skip
        print(f"| {name} | {theirs_:,} | {ours_:,} | {theirs_ / ours_:,.2f} | {goal} |")
    for side, goal_ in zip(("straightforward", "lenient"), row.must, strict=True):
        ratio = middle[side] / middle["ours"]
        verdict = "OK" if ratio >= goal_ else "FAIL"
        print(f"| time, {side} | {middle[side]:.3f} s | {middle['ours']:.3f} s | {ratio:.1f} | ≥ {goal_} {verdict} |")
    print(flush=True)


def bound(repeats: int) -> None:
    """`prune: bound` against none: two passages of rel ≥ .9, eight of ≤ .3, and a best step of 3 or more."""
    row = rows()[0]
    generator = made(row, sharp=SHARP)
    every = row.settings.model_copy(update={"retrieve": "always"})
    pool = asked(row, 40)
    known = self_rag(generator, pool, every)[0]
    assert known.trace is not None
    hits, told = pool.hits[0], known.trace["candidates"]
    good = [hit for hit, one in zip(hits, told, strict=True) if one["rel"] >= 0.9 and one["final"] >= 3][:2]
    poor = [hit for hit, one in zip(hits, told, strict=True) if one["rel"] <= 0.3][:8]
    assert (len(good), len(poor)) == (2, 8), "the model judges otherwise than it did"
    question = Asked(pool.queries, [sorted([*good, *poor], key=lambda hit: hit.rank)], k=10)
    times: dict[str, list[float]] = {"none": [], "bound": []}
    found: dict[str, Answer] = {}
    for _ in range(repeats):
        for kind, taken in times.items():
            how = every.model_copy(update={"prune": PruneSettings(kind=kind)})
            seconds, answers = measured(lambda how=how: self_rag(generator, question, how))
            taken.append(seconds)
            found[kind] = answers[0]
    assert (found["bound"].text, found["bound"].ids) == (found["none"].text, found["none"].ids)
    assert found["bound"].trace is not None
    left_out = sum(one["pruned"] == "bound" for one in found["bound"].trace["candidates"]) / 10
    none, less = (statistics.median(taken) for taken in times.values())
    verdict = "OK" if left_out >= 0.6 else "FAIL"
    print(f"| prune: bound, equal answers | undecoded {left_out:.0%} | target ≥ 60 % {verdict} |")
    print(f"| time, prune: none | {none:.3f} s | bound {less:.3f} s | {none / less:.2f} |\n", flush=True)


def options(repeats: int) -> None:
    """A closed set of five options: scored in one pass, nothing written."""
    row = rows()[0]
    generator, question = made(row), asked(row)
    closed = row.settings.model_copy(update={"retrieve": "always", "options": tuple(f"w{number}" for number in range(10, 15))})
    self_rag(generator, question, closed)  # not counted: the head is checked once
    times = []
    for _ in range(repeats):
        before = generator.cost.copy()
        seconds, answers = measured(lambda: self_rag(generator, question, closed))
        spent = generator.cost - before
        assert (spent.calls, spent.generated, len(answers[0].candidates)) == (3, 0, 5), spent
        assert spent.positions == PROMPT + 10 * PASSAGE + 10 * 5, spent  # the IsRel token before each option
        times.append(seconds)
    print(f"| options, 10 passages × 5 | 3 passes | 0 ids written | {statistics.median(times):.3f} s |\n", flush=True)


def sweep(repeats: int) -> None:
    """1,000 settings × 1,000 questions × 10 candidates; nothing but arithmetic."""
    drawn, shape = np.random.default_rng(3), (1000, 10)
    parts = Components(*(drawn.random(shape) for _ in range(3)), drawn.uniform(-1, 1, shape))
    table = Table(
        r=drawn.random(1000), parts=parts, present=np.ones(shape, bool), lengths=drawn.integers(5, 100, shape),
        without=drawn.integers(5, 100, 1000), good=drawn.random(shape), plain=drawn.random(1000), places=None,
        labelled=np.zeros((1000, 0)),
    )  # fmt: skip
    settings = [(float(drawn.random()), Weights(*drawn.random(4).tolist())) for _ in range(1000)]
    times = [measured(lambda: [table.outcome(t, w, k=10) for t, w in settings])[0] for _ in range(repeats)]
    middle = statistics.median(times)
    verdict = "OK" if middle <= 1 else "FAIL"
    print(f"| sweep, 1,000 × 1,000 × 10 | {middle:.3f} s | model calls 0 | target ≤ 1 s {verdict} |\n")


SETTINGS = {
    "A": {"threshold": (0.0, 0.2, 0.5, 0.8, 1.0), "seq": (0.0, 1.0), "rel": (0.5, 1.0), "sup": (1.0,), "use": (0.5,),
          "require": ([], ["supported"], ["fully"], ["relevant"], [{"min_use": 3}])},
    "B": {"rel": (0.5, 1.0, 2.0, 4.0, 8.0), "beam": (1, 2), "combine": ("mean", "sum"),
          "require": ([], ["supported"], ["fully"], ["relevant"], [{"min_use": 3}])},
}  # fmt: skip
Quality = Callable[[str, int], float]
MOST = 0.01  # of the time of generating once


def rescore(repeats: int, questions: int) -> None:
    """A hundred settings on candidates, their opening included, against answering the questions once, live."""
    for row, count in zip(rows()[:2], (questions, max(1, questions // 10)), strict=True):
        _rescored(row, repeats, count)
    _rescored(rows()[1], repeats, 2, beam=rows()[1].passages ** 2)


def _rescored(row: Row, repeats: int, questions: int, *, beam: int | None = None) -> None:
    """`beam`: how wide candidates are recorded, so that no setting lacks any."""
    generator, settings = made(row), _hundred(row)
    every = [asked(row, seed=seed) for seed in range(questions)]
    many = Asked([one.queries[0] for one in every], [one.hits[0] for one in every], k=row.passages)

    def tried(cache: CandidateCache, quality: Quality = _matches, decode: SelfRagDecode = row.settings) -> Sweep:
        trials = Trials(cache, decode, quality, lambda own, _: replay(generator, many, own, cache=cache))
        return swept(settings, trials, questions=questions)

    self_rag(generator, asked(row), row.settings)  # not counted: the head is checked once
    live, again = [], []
    with tempfile.TemporaryDirectory() as folder:
        kept, cache = Path(folder) / "candidates", CandidateCache()
        wide = row.settings if beam is None else row.settings.model_copy(update={"beam": beam})
        record(generator, many, row.settings, cache=cache, wide=wide)
        cache.save(kept)
        for _ in range(repeats):
            seconds, answers = measured(lambda: self_rag(generator, many, row.settings))
            live.append(seconds)
            before = generator.cost.copy()
            seconds, found = measured(lambda: tried(CandidateCache.open(kept)))
            again.append(seconds)
            assert (generator.cost - before).calls == 0
        cache = CandidateCache.open(kept)
        same = replay(generator, many, row.settings, cache=cache)
        if row.levels > 1:  # a budget that is never reached, which is no search over arrays
            replayed = tried(cache, _fingerprint, row.settings.model_copy(update={"max_calls": 10**6}))
            searched = tried(cache, _fingerprint)
            assert (searched.settings, searched.needs_generation) == (replayed.settings, replayed.needs_generation)
    assert [one and one.text for one in same] == [one.text for one in answers]
    once, hundred = statistics.median(live), statistics.median(again)
    name = row.name if beam is None else f"{row.name} recorded with beam {beam}"
    told = f"| rescore, {name} × {questions} | generated once {once:.3f} s | 100 settings {hundred:.4f} s"
    verdict = f"{len(found.needs_generation)} need generation | < 1 % {'OK' if hundred / once < MOST else 'FAIL'}"
    print(f"{told} | {hundred / once:.2%} | {verdict} |", flush=True)
    assert (row.levels > 1 and beam is None) or not found.needs_generation
    assert hundred < MOST * once


def _matches(text: str, place: int) -> float:
    return exact_match(text, [f"w{place}"])


def _fingerprint(text: str, place: int) -> float:
    return float(crc32(f"{place} {text}".encode()))


def _hundred(row: Row) -> list[Setting]:
    settings = settings_of(SweepSettings.model_validate(SETTINGS[row.name]), row.settings, k=row.passages, seed=0)
    assert len(settings) == 100
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="A,B,B2,bound,options,sweep,rescore", help="some of these")
    parser.add_argument("--quick", action="store_true", help="once each, and 20 questions in place of 50 to rescore")
    given = parser.parse_args()
    given.repeats = 1 if given.quick else given.repeats
    torch.set_num_threads(1)
    wanted = given.rows.split(",")
    libraries = f"torch {version('torch')}, transformers {version('transformers')}"
    print(f"{date.today()}, {platform.machine()}, {libraries}, one thread, median of {given.repeats}\n")
    for work in (sweep, bound, options):
        if work.__name__ in wanted:
            work(given.repeats)
    if "rescore" in wanted:
        rescore(given.repeats, 20 if given.quick else 50)
    for row in rows():
        if row.name in wanted:
            compare(row, given.repeats)


if __name__ == "__main__":
    main()
