"""What is shown in the end, read where a server gets it: positions, gold absent, and that a prompt tells nothing of itself.

Whole runs, English and Chinese: plan, teacher behind a local server, retrievers, guard, all kinds of noise, budget, checks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer

import synthesis_worker
import tiny
from fault_server import KEY, PRICE, Fault, FaultServer, author
from raglan.calls import CallEngine
from raglan.calls.limits import Clock
from raglan.corpus import Corpus, write_corpus
from raglan.perturb import KINDS, content_hash
from raglan.perturb.slot import Role, Verdict
from raglan.recipe import EndpointSettings, MoneySettings, Recipe
from raglan.records import Hit, Passage
from raglan.rendering import read_rendering, render
from raglan.synthesis import Plan, factors_of, make_plan
from raglan.synthesis.endpoint import EndpointTeacher, load_prompts
from raglan.synthesis.evidence import Assembler
from raglan.synthesis.plan import seed_of
from raglan.synthesis.run import Done, synthesize
from raglan.synthesis.writing import Draft, Job, Sheet
from raglan.text import words

TOWNS = [
    "Aldmere", "Brackwell", "Corvin", "Dunsay", "Elmholt", "Farlow", "Garrick", "Hexley", "Isford", "Jarrow", "Keld", "Lorton",
    "Marden", "Nesfield", "Orby", "Penrith", "Quorn", "Ribton", "Selby", "Tarn", "Ulwick", "Varley", "Wexcombe", "Yarm",
]  # fmt: skip
CITIES = [
    "青浦", "松江", "嘉定", "宝山", "闵行", "奉贤", "周庄", "崇明", "昆陵", "太仓", "吴兴", "海宁", "桐乡", "余姚", "慈溪",
    "萧县", "诸暨", "嵊泗", "临海", "温岭", "龙泉", "庆元", "遂昌", "缙云",
]  # fmt: skip
PLACES = {"en": TOWNS, "zh": CITIES}
LANGUAGES = ("en", "zh")
# Words for what a passage is there for, beside those of the code itself
TELLING = """evidence distractor negative label retriever pooled bm25 titles gold_absent guard origin
FACT- SUBJECT- JOB- MATERIAL
噪声 噪音 干扰 负例 正例 金标 黄金 反事实 冗余 篡改 支持 标准答案 事实 检索器 证据"""
ABSTAINS = {"en": "The passages do not tell the year of it.", "zh": "材料没有提到年份。"}


def year_of(place: str) -> int:
    """Each year is that of two places, so that an answer's words stand in passages about something else, too."""
    return 1806 + 7 * (TOWNS.index(place) % 12) if place in TOWNS else 1986 + CITIES.index(place) % 12


def han(year: int) -> str:
    return "".join("〇一二三四五六七八九"[int(digit)] for digit in str(year))


def wide(year: int) -> str:
    return "".join(chr(ord("０") + int(digit)) for digit in str(year))


def spellings(language: str, year: int) -> list[str]:
    """A year as these corpora write it, and some more."""
    if language == "en":
        return [f"{year}", f"{year:,}", wide(year)]
    return [f"{year}年", f"{year} 年", f"{han(year)}年", f"{wide(year)}年"]


def documents(language: str) -> list[Passage]:
    """Two documents a place, of two passages each; its year stands in both, and once more as something else."""
    found = []
    for n, place in enumerate(PLACES[language]):
        year = year_of(place)
        if language == "en":
            mill = f"The mill of {place} was opened in the year {year} by the miller Odo{n}. It stands beside the river."
            told = f"People of {place} tell that in {year} the miller Odo{n} ground the first flour. It was a dry day."
            wheel = f"The wheel of {place} turns when snow melts upstream. Its blades are of elm wood."
            fair = f"A fair is held in {place} each autumn. Once {year:,} sacks were sold on its meadow."
            texts = {"almanac": (mill, wheel), "chronicle": (told, fair)}
        else:
            bridge = f"{place}大桥于{han(year)}年建成通车，桥头立着编号Q{n}的石碑。桥面很宽。"
            told = f"当地人说，{place}大桥{year}年剪彩那天，编号Q{n}的石碑才刚刚刻好。后来下了雨。"
            rails = f"{place}大桥的栏杆用青石砌成，每年春天都要清洗。两岸种满了柳树。"
            fair = f"{place}每年秋天举行庙会，{wide(year)}年的庙会最热闹。戏台搭在河边。"
            texts = {"nianjian": (bridge, rails), "xianzhi": (told, fair)}
        for name, own in texts.items():
            title = f"{place} mill" if language == "en" else f"{place}大桥"
            found += [
                Passage(f"{name}-{n}#{part}", text, title, f"{name}-{n}", 500 * part, 500 * part + len(text))
                for part, text in enumerate(own)
            ]
    return found


class ByWords:
    """Ranks by how many words a passage shares with the question; `titles`: only its title, and finds little but the place."""

    def __init__(self, corpus: Corpus, *, titles: bool = False):
        self.corpus, self.least = corpus, 0.7 if titles else 0.0
        self._words = [{*words(one.title if titles else f"{one.title} {one.text}")} for one in corpus]

    def retrieve(self, queries: Sequence[str], k: int) -> list[tuple[Hit, ...]]:
        return [self._hits({*words(query)}, k) for query in queries]

    def _hits(self, asked: set[str], k: int) -> tuple[Hit, ...]:
        shared = [len(asked & own) for own in self._words]
        near = [row for row, count in enumerate(shared) if count >= self.least * max(shared)]
        rows = sorted(near, key=lambda row: -shared[row])[:k]
        return tuple(Hit(self.corpus[row], row, float(shared[row]), rank) for rank, row in enumerate(rows, 1))


# --- a teacher that keeps to what it is shown -------------------------------------------------------------------------

QUESTIONS = {
    "en": ("In which year was the mill of {} opened?", "When did millers of {} grind their first flour?"),
    "zh": ("{}大桥是哪一年建成通车的？", "请问{}大桥剪彩是在哪一年？"),
}
TELLS = {
    "en": (r"mill of {} was opened in the year (\d+)", r"People of {} tell that in (\d+)", r"house {} was painted in (\d+)"),
    "zh": (r"{}大桥于(\w{{4}})年建成", r"{}大桥(\w{{4}})年剪彩", r"{}号楼于(\w{{4}})年粉刷"),
}
HOUSES = {
    "en": ("Long after, house {} was painted in {}, all of it blue.", "A guest says that house {} was painted in {}."),
    "zh": ("过了很久，{}号楼于{}年粉刷，全部刷成蓝色。", "一位客人说，{}号楼于{}年粉刷。"),
}
INNS = {"en": "Inn {}{} has a garden with two swings, and its cellar is dry.", "zh": "{}{}号客栈有花园和两架秋千，地窖很干燥。"}
SCRATCH = {"en": "In which year did they paint house {} all over?", "zh": "人们是在哪一年粉刷{}号楼的？"}


def teacher(body: dict[str, Any]) -> str:
    """Replies of both languages. What a draft says of itself is marked, and stands in no passage that is written."""
    asked = [message["content"] for message in body["messages"] if message["role"] != "assistant"]
    if len(asked) < 2:  # a trial of how schemas are taken
        return author(body)
    language = "zh" if re.search("[一-鿿]", asked[0]) else "en"
    mark = hashlib.sha256("\n".join(asked[:2]).encode()).hexdigest()[:8]
    name = body.get("response_format", {}).get("json_schema", {}).get("name", "")
    if name == "JobsReply":
        return json.dumps({"jobs": [{"job": f"JOB-{mark}-{n} wants a year", "material": "MATERIAL"} for n in range(20)]})
    if name == "DraftReply":
        return json.dumps(_draft(language, asked[1], mark), ensure_ascii=False)
    if name == "PassagesReply":
        return json.dumps({"passages": _passages(language, asked[1], mark)}, ensure_ascii=False)
    return _answer(language, asked[1])


def _draft(language: str, asked: str, mark: str) -> dict[str, Any]:
    place = min((one for one in PLACES[language] if one in asked), key=asked.index, default="")  # of the first passage
    if place:
        first = any(word in asked.partition(place)[2][:40] for word in ("was opened", "建成通车"))
        query, year = QUESTIONS[language][not first].format(place), year_of(place)
    else:
        query, year = SCRATCH[language].format(mark), 1700 + int(mark[:4], 16) % 90
    return {
        "query": query, "subject": f"SUBJECT-{mark}", "facts": [f"FACT-{mark}-{n} {mark} {year}" for n in range(2)],
        "answers": [f"{year}" if language == "en" else f"{year}年"], "history": [], "labels": [], "fields": [],
    }  # fmt: skip


def _passages(language: str, asked: str, mark: str) -> list[dict[str, str]]:
    if re.search("(?m)^(?:Number of passages|段落数量)", asked):
        return [{"title": f"Inn {n}", "text": INNS[language].format(mark, n)} for n in range(2)]
    facts = re.findall(r"FACT-\w+-(\d) (\w+) (\d+)", asked)
    return [{"title": "House", "text": HOUSES[language][int(n)].format(own, year)} for n, own, year in facts]


def _answer(language: str, prompt: str) -> str:
    asked = [re.escape(text).replace(r"\{\}", r"(\w+?)") for text in (*QUESTIONS[language], SCRATCH[language])]
    about = next(found[1] for text in asked if (found := re.search(text, prompt)))
    told = Counter(year for text in TELLS[language] for year in re.findall(text.format(about), prompt))
    folded: Counter[str] = Counter()
    for year, count in told.items():
        folded[year.translate(str.maketrans("〇一二三四五六七八九", "0123456789"))] += count
    year = folded.most_common(1)[0][0] if folded else ""
    if not year:
        return ABSTAINS[language]
    return f"It was the year {year}." if language == "en" else f"那一年是{year}年。"


# --- runs -------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, language: str, *, n: int, longest: int) -> Recipe:
    weights = {"task": {"factoid": 1}, "answer_format": {"short_sentence": 1}, "query_format": {"wh_question": 1}}
    synthesis = {
        "path": folder / "data", "n": n, "from_scratch": 0.25, "languages": {language: 1}, "decontaminate": "none",
        "retrievers": {"bm25": 1, "titles": 1, "pooled": 1}, "passages": {"k": {3: 1, 5: 2, 8: 1}, "gold_absent": 0.25},
        "weights": {**weights, "relation": {"R1": 1, "R3": 1}, "genre": "fit", "absent_policy": {"abstain": 1}},
        "budget": {"max_length": longest, "answer": 64},
    }  # fmt: skip
    indexes = {"bm25": {"kind": "bm25"}, "titles": {"kind": "bm25"}}
    knowledge = {"path": "kb", "documents": "docs", "indexes": indexes}
    return Recipe.model_validate({"name": "sent", "seed": 7, "knowledge": knowledge, "synthesis": synthesis})


@dataclass
class Sent:
    """A run: what was planned and kept, what is in no prompt by rights, and the bodies of the requests for answers."""

    plan: Plan
    done: Done
    assembler: Assembler
    answers: list[dict[str, Any]]
    written: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.done.folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def rejects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.done.folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def assembled(folder: Path, asked: Recipe, language: str, **known: Any) -> Assembler:
    if not (folder / language).is_dir():
        write_corpus(folder / language, documents(language))
        tiny.llama(folder / "llama")
    corpus = Corpus(folder / language)
    retrievers = {"bm25": ByWords(corpus), "titles": ByWords(corpus, titles=True)}
    assert asked.synthesis is not None
    return Assembler(corpus, retrievers, asked.synthesis, AutoTokenizer.from_pretrained(str(folder / "llama")), **known)


def ran(folder: Path, language: str, *, n: int = 48, longest: int = 4000) -> Sent:
    asked = recipe(folder, language, n=n, longest=longest)
    plan, corpus = make_plan(asked), assembled(folder, asked, language).corpus
    server = FaultServer(delay=0.001)
    server.reply = teacher
    with pytest.MonkeyPatch.context() as patch, server:
        patch.setenv("CALLS_KEY", KEY)
        settings = EndpointSettings(base_url=server.url, model="m", api_key_env="CALLS_KEY", concurrency=16)
        money = MoneySettings.model_validate({"price": PRICE})
        with CallEngine(settings, folder / "calls", money=money, clock=Clock(100.0)) as engine:
            writer = EndpointTeacher(engine, plan, factors_of(asked)[0], corpus=corpus)
            own = assembled(folder, asked, language, evidence=writer.evidence, answers=writer.answers)
            done = synthesize(asked, writer, own.show, plan=plan, corpus=corpus)
    sent = [request.body for request in server.log if len(request.body["messages"]) > 1]
    answers = [body for body in sent if "response_format" not in body]
    told = [teacher(body) for body in sent if "PassagesReply" in json.dumps(body)]
    return Sent(plan, done, own, answers, [one["text"] for text in told for one in json.loads(text)["passages"]])


TIGHT = {"en": 760, "zh": 380}  # tokens
Runs = Callable[..., Sent]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run by its language, with room for all passages or for some of them, made once."""

    @cache
    def run(language: str, room: str = "wide") -> Sent:
        folder = tmp_path_factory.mktemp(f"{language}-{room}")
        return ran(folder, language) if room == "wide" else ran(folder, language, n=24, longest=TIGHT[language])

    return run


@pytest.mark.parametrize("language", LANGUAGES)
def test_of_each_k_gold_is_shown_everywhere_as_often(runs: Runs, language: str) -> None:
    """Nothing is rejected and nothing left out: what the plan dealt is what stands in the examples, to within one."""
    run = runs(language)
    assert run.rejects == []
    rows = run.rows
    assert len(rows) == 48
    assert {row["synth"]["ordinal"] for row in rows} == {0}
    assert not any(row["synth"]["left_out"] for row in rows)
    shown: dict[int, Counter[int]] = {k: Counter(dict.fromkeys(range(1, k + 1), 0)) for k in (3, 5, 8)}
    for row in rows:
        roles = [one["role"] for one in row["synth"]["passages"]]
        assert len(roles) == row["synth"]["factors"]["k"], "K never shrinks"
        shown[len(roles)].update(place for place, role in enumerate(roles, 1) if role == "gold")
    for k, counts in shown.items():
        assert counts.total() > k
        assert max(counts.values()) - min(counts.values()) <= 1, (k, counts)
        assert {str(place): count for place, count in counts.items()} == run.plan.margins[f"position k={k}"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_evidence_of_every_relation_stands_where_it_was_dealt(tmp_path: Path, language: str) -> None:
    """With the weights as they come, conflicts and what is outdated among them: a made twin is evidence, and has its place."""
    asked = recipe(tmp_path, language, n=100, longest=4000)
    assert asked.synthesis is not None
    plan = make_plan(asked.model_copy(update={"synthesis": asked.synthesis.model_copy(update={"weights": {}})}))
    own = assembled(tmp_path, asked, language)
    shown: dict[int, Counter[int]] = {k: Counter(dict.fromkeys(range(1, k + 1), 0)) for k in (3, 5, 8)}
    relations: Counter[str] = Counter()
    for cell in plan.cells:
        place = PLACES[language][cell.number % len(PLACES[language])]
        gold = tuple(passage for passage in own.corpus if place in passage.text and passage.id.endswith("#0"))
        gold = gold[:1] if cell.relation in ("R6", "R7") else gold
        answer = f"{year_of(place)}" if language == "en" else f"{year_of(place)}年"
        draft = Draft(Job(cell), QUESTIONS[language][0].format(place), (answer,), gold)
        tried = (own.show(replace(draft, job=Job(cell, ordinal))) for ordinal in range(5))  # a false value may not be a date's
        sheet = next(one for one in tried if isinstance(one, Sheet))
        twins = {"R6": "counterfactual", "R7": "outdated"}.get(cell.relation)
        places = tuple(n for n, slot in enumerate(sheet.slots, 1) if slot.role == "gold" or slot.kind == twins)
        assert places == cell.positions
        assert len(sheet.slots) == cell.k
        shown[cell.k].update(places)
        relations[cell.relation] += 1
    assert set(relations) == {f"R{n}" for n in range(1, 8)}
    for k, counts in shown.items():
        assert max(counts.values()) - min(counts.values()) <= 1, (k, counts)


def shows(run: Sent) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(example, the body of the request for its answer), each found by rendering the record again, letter by letter."""
    by_prompt = {body["messages"][1]["content"]: body for body in run.answers}
    assert len(by_prompt) == len(run.answers)
    found = []
    for row in run.rows:
        synth = row["synth"]
        passages = [Passage("", one["text"], one["title"], one["document"]) for one in synth["passages"]]
        rendering = read_rendering(synth["rendering"], where="x")
        rendered = render(
            run.assembler.prompt, rendering, row["query"], passages, instruction=synth["instruction"],
            history=row.get("history") or (),
        )  # fmt: skip
        found.append((row, by_prompt.pop(rendered.text)))
    assert not by_prompt, "nothing was answered but the examples"
    return found


def names_in(row: dict[str, Any]) -> set[str]:
    """Names by which raglan calls the passages of a row, the row itself, and what its draft said."""
    passages, synth = row["synth"]["passages"], row["synth"]
    own = {one[name] for one in passages for name in ("id", "passage", "operator", "retriever")}
    own |= {parent for one in passages for parent in one["parents"]} | {one["id"] for one in synth.get("withheld", [])}
    return (own | {row["id"], synth.get("job", ""), *synth["facts"]}) - {""}


@pytest.mark.parametrize("room", ["wide", "tight"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_prompt_holds_no_role_no_draft_and_nothing_that_is_not_shown(runs: Runs, language: str, room: str) -> None:
    """Bytes of what the server got: no name of a role, kind or verdict, no mark of a draft, no sentence that is not shown."""
    run = runs(language, room)
    names = {*get_args(Role), *KINDS, *get_args(Verdict), *TELLING.split()}
    every = {sentence for text in [*(one.text for one in run.assembler.corpus), *run.written] for sentence in cut(text)}
    system = load_prompts()[language].steps["answer"][0]
    kinds: Counter[str] = Counter()
    for row, body in shows(run):
        assert set(body) == {"model", "messages", "temperature", "max_tokens"}
        first, second = (message["content"] for message in body["messages"])
        assert first == system
        told = f"{first}\n{second}".encode()
        assert not [name for name in names | names_in(row) if name.encode() in told]
        texts = [one["text"] for one in row["synth"]["passages"]]
        hidden = [sentence for sentence in every if not any(sentence in text for text in texts)]
        assert len(hidden) > 100
        assert not [sentence for sentence in hidden if sentence.encode() in told]
        year = int(re.sub(r"\D", "", row["answers"][0]))
        around = without(second, texts)
        assert not [spelling for spelling in spellings(language, year) if spelling in around], "only passages tell the answer"
        assert len({content_hash(Passage("", text)) for text in texts}) == len(texts)
        kinds.update(one["kind"] for one in row["synth"]["passages"])
    left_out = sum(row["synth"]["left_out"] for row in run.rows)
    if room == "tight":
        assert left_out > 10
    else:
        assert (set(kinds), left_out) == ({"gold", *KINDS}, 0)


def without(prompt: str, texts: Sequence[str]) -> str:
    """A prompt less the passages in it, all of which are there."""
    for text in sorted(texts, key=len, reverse=True):
        assert text in prompt
        prompt = prompt.replace(text, "")
    return prompt


def cut(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.。]) ?", text) if sentence]


@pytest.mark.parametrize("language", LANGUAGES)
def test_where_gold_is_absent_no_spelling_of_the_answer_was_sent(runs: Runs, language: str) -> None:
    """Every request for such an answer: the year in digits, Han numerals, wide digits or grouped stands nowhere in it."""
    run = runs(language)
    assert run.rejects == []
    absent = [(row, body) for row, body in shows(run) if row["synth"]["factors"]["relation"] == "R5"]
    assert len(absent) == run.plan.margins["relation"]["R5"] == 12
    for row, body in absent:
        year = int(re.sub(r"\D", "", row["answers"][0]))
        prompt = body["messages"][1]["content"]
        assert not [spelling for spelling in spellings(language, year) if spelling in prompt]
        passages = row["synth"]["passages"]
        assert not {one["kind"] for one in passages} & {"gold", "counterfactual", "near_duplicate", "garbled"}
        assert not any(one["parents"] or one["role"] != "noise" for one in passages)
        assert row["synth"]["target"] == ABSTAINS[language]


# --- gold absent, sheet by sheet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["numbered", "titled", "xml", "json", "bare"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_without_gold_no_spelling_of_the_answer_is_rendered(runs: Runs, language: str, form: str) -> None:
    """What is found beside the gold tells its year but for two passages, and so does another place's, in several spellings."""
    run = runs(language)
    corpus, absent = run.assembler.corpus, next(cell for cell in run.plan.cells if cell.relation == "R5")
    shown: Counter[str] = Counter()
    for number, place in enumerate(PLACES[language]):
        one = replace(
            absent, number=number, seed=seed_of(5, number, "cell"), passage_form=form, k=6, source="knowledge",
            retriever="titles", noise=("neighbour", "hard", "hard", "random", "other_gold", "boilerplate"),
        )  # fmt: skip
        first, second = (passage for passage in corpus if place in passage.text and passage.id.endswith("#0"))
        gold = (first, second)[number // 2 % 2 :][:1]  # the other one is found, and says it, too
        year = year_of(place)
        answer = f"{year}" if language == "en" else f"{han(year) if number % 2 else year}年"
        sheet = run.assembler.show(Draft(Job(one), QUESTIONS[language][0].format(place), (answer,), gold))
        assert isinstance(sheet, Sheet), sheet
        assert len(sheet.slots) == 6
        assert all(slot.role == "noise" and KINDS[slot.kind].without_gold for slot in sheet.slots)
        assert not [spelling for spelling in spellings(language, year) if spelling in sheet.prompt]
        assert not any(content_hash(slot.passage) == content_hash(own) for slot in sheet.slots for own in gold)
        shown.update(slot.kind for slot in sheet.slots)
    assert set(shown) == {"hard", "neighbour", "random", "other_gold", "boilerplate"}


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_one_at_a_time_sixty_four_and_random_delays_write_the_same_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole datasets, by one server: what comes back first changes no byte."""
    monkeypatch.setenv("CALLS_KEY", KEY)
    with FaultServer() as server:
        server.reply = author
        codes = []
        for name, concurrency in (("one", 1), ("many", 64), ("late", 16)):
            if name == "late":
                server.faults = lambda n, request: Fault(delay=0.001 + 0.03 * (n * 7919 % 31) / 31)
            codes.append(synthesis_worker.live(server.url, tmp_path / name, 20, concurrency, None))
    assert codes == [0, 0, 0]
    folders = [tmp_path / name / "data" for name in ("one", "many", "late")]
    written = [{path.name: path.read_bytes() for path in folder.glob("*.*")} for folder in folders]
    assert {"examples.jsonl", "rejects.jsonl", "attempts.jsonl", "coverage.json", "manifest.json"} <= set(written[0])
    assert written[0] == written[1] == written[2]
