"""It changes its mind: one tuned system, two knowledge bases that disagree, and the 2×2 table of who believes what.

    make bench-swap         (writes the corpus, trains, measures; about 10 minutes on 2 cores)
    python benchmarks/swap.py decode.kind=rag_token        (changes of the recipe; what is trained already is found done)

The system is trained once, on offices that are asked about nowhere below. Then one `RAG` answers "Who is {position}?" for
the offices that changed hands: from the articles of before, from those of after, and from those of before again. An answer
is right if it equals a name of the holder (exact match); all four combinations of articles and holders are counted, with
Wilson intervals, and counted again by whether the sentence that answers is worded as in training. Last, eight threads ask while
the knowledge is swapped, and each answer must be of the version that it names.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from offices import write

from raglan.data import load_examples
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.metrics import Interval, exact_match, recall, wilson
from raglan.rag import RAG
from raglan.recipe import Recipe, load_recipe
from raglan.records import Answer, Example
from raglan.stages import finished_parts
from raglan.train import train

HERE = Path(__file__).parent
OFFICES = HERE.parent / "build" / "offices"
TIMES = ("before", "after")
DEPTHS = (1, 5)
THREADS, SWAPS = 8, 40


def built(recipe: Recipe, articles: str) -> KnowledgeBase:
    """A version of the recipe's knowledge base, made of these articles."""
    return build_knowledge(recipe.knowledge.model_copy(update={"documents": (OFFICES / articles,)}))


def asked(name: str, base: KnowledgeBase) -> list[Example]:
    return load_examples(OFFICES / f"{name}.jsonl", base.corpus)


def matches(answers: Sequence[Answer], examples: Sequence[Example]) -> Interval:
    right = sum(exact_match(answer.text, example.answers) for answer, example in zip(answers, examples, strict=True))
    return wilson(int(right), len(answers))


def shown(value: Interval) -> str:
    return f"{100 * value.mean:5.1f} % ({round(value.mean * value.n)}/{value.n}: {100 * value.low:.1f}–{100 * value.high:.1f})"


def verdict(good: bool) -> str:
    return "OK" if good else "FAIL"


def weights(system: RAG) -> list[tuple[int, float]]:
    """Where every weight lies, and what it sums to."""
    parts = (*system.generator.model.parameters(), *system.retriever.encoder.split().parameters())
    return [(weight.data_ptr(), float(weight.detach().double().sum())) for weight in parts]


def timed_swap(system: RAG, version: str) -> float:
    began = time.perf_counter()
    system.swap(version=version)
    return time.perf_counter() - began


def quiet(system: RAG, bases: dict[str, KnowledgeBase]) -> dict[str, list[Answer]]:
    """Answer before → after → before; print the table and what else was measured."""
    changed = {name: asked(name, bases[name]) for name in TIMES}
    queries = [example.query for example in changed["before"]]
    assert queries == [example.query for example in changed["after"]]
    unchanged = asked("unchanged", bases["before"])
    system.swap(version=bases["before"].version)
    lying, took, answers, kept = weights(system), [], {}, {}
    for name in TIMES:
        took.append(timed_swap(system, bases[name].version))
        answers[name] = system.answer(queries)
        kept[name] = matches(system.answer([example.query for example in unchanged]), unchanged)
    took.append(timed_swap(system, bases["before"].version))
    again = system.answer(queries)
    print(f"\n{len(queries)} offices that changed hands; exact match, Wilson 95 % intervals\n")
    print("| articles of | holders before | holders after | offices unchanged |\n|---|---|---|---|")
    closed = system.read(queries, [()] * len(queries))
    for name, given, rest in (*((n, answers[n], shown(kept[n])) for n in TIMES), ("neither", closed, "")):
        print(f"| {name} | {' | '.join(shown(matches(given, changed[when])) for when in TIMES)} | {rest} |")
    print("\n| articles of | worded | holders before | holders after |\n|---|---|---|---|")
    for name, wording in product(TIMES, ("taught", "new")):
        places = [place for place, example in enumerate(changed[name]) if example.metadata["wording"] == wording]
        given = [answers[name][place] for place in places]
        shares = (shown(matches(given, [changed[when][place] for place in places])) for when in TIMES)
        print(f"| {name} | {wording} | {' | '.join(shares)} |")
    for name in TIMES:
        rankings = [[hit.passage.id for hit in answer.hits] for answer in answers[name]]
        found = {
            k: statistics.fmean(recall(r, e.relevant, k) for r, e in zip(rankings, changed[name], strict=True)) for k in DEPTHS
        }
        print(f"recall over articles of {name}: {', '.join(f'@{k} {100 * share:.1f} %' for k, share in found.items())}")
    print(f"swapped back, all {len(again)} answers as before, to the last digit: {verdict(again == answers['before'])}")
    print(f"no weight was loaded or changed: {verdict(weights(system) == lying)}")
    print(f"a swap takes {statistics.median(took):.3f} s (longest of {len(took)}: {max(took):.3f})")
    return answers


def under_load(system: RAG, bases: dict[str, KnowledgeBase], answers: dict[str, list[Answer]]) -> None:
    """Eight threads ask one question after the other while the knowledge changes forty times."""
    queries = [answer.query for answer in answers["before"]]
    alone = {(bases[name].version, answer.query): answer.text for name in TIMES for answer in answers[name]}
    corpora = {base.version: base.corpus for base in bases.values()}
    sent, got, faults, took = [0] * THREADS, [[] for _ in range(THREADS)], [], []
    asking, answered = threading.Event(), threading.Semaphore(0)
    asking.set()

    def ask(thread: int) -> None:
        while asking.is_set():
            query = queries[(thread * 17 + sent[thread]) % len(queries)]
            sent[thread] += 1
            try:
                got[thread] += [(query, answer) for answer in system.answer([query])]
            except Exception as fault:  # noqa: BLE001 - any fault at all is what is looked for
                faults.append(fault)
            answered.release()

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for turn in range(SWAPS):
        took.append(timed_swap(system, bases[TIMES[(turn + 1) % 2]].version))
        for _ in range(2):
            assert answered.acquire(timeout=120), "nobody was answered for two minutes"
    asking.clear()
    for thread in threads:
        thread.join(timeout=120)
    pairs = [pair for part in got for pair in part]
    whole = all(answer.query == query and answer.hits for query, answer in pairs)
    own = all(_of_its_version(answer, corpora) for _, answer in pairs)
    same = sum(answer.text == alone[answer.knowledge, query] for query, answer in pairs)
    seen = {version: sum(answer.knowledge == version for _, answer in pairs) for version in corpora}
    every = not faults and len(pairs) == sum(sent) and whole
    print(f"{THREADS} threads, {SWAPS} swaps: {sum(sent)} questions, {len(pairs)} answers: {verdict(every)}")
    print(f"by version {', '.join(f'{seen[bases[name].version]} {name}' for name in TIMES)}; "
          f"every passage is of the version that the answer names: {verdict(own and all(seen.values()))}")  # fmt: skip
    print(f"{same} of {len(pairs)} answers read as the same version's did when nobody swapped")
    print(f"a swap under load takes {statistics.median(took):.3f} s (longest {max(took):.3f})")


def _of_its_version(answer: Answer, corpora: dict[str, Sequence]) -> bool:
    corpus = corpora[answer.knowledge]
    return all(corpus[hit.row] == hit.passage for hit in answer.hits)


def main() -> None:
    began = time.monotonic()
    write(OFFICES)
    recipe = load_recipe(HERE / "offices.yaml", sys.argv[1:])
    built(recipe, "school")
    train(recipe)
    name, parts = finished_parts(recipe)[-1]
    print(f"trained as far as {name} in {time.monotonic() - began:.0f} s")
    bases = {time: built(recipe, time) for time in TIMES}
    system = parts.open(recipe)
    under_load(system, bases, quiet(system, bases))
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
