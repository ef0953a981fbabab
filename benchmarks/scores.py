"""The scoring pass: B·K pairs into a table, against one pair at a time.

    make bench-scores       (one thread; ten minutes on a CPU)

The pairs of an R-ft: `-b` questions of the example corpus, each with its ten best passages by BM25 and its answer. The passage
stands first, as in RA-DIT's template. Causal language models with random weights: two layers of 128 with 32,000 words, six of
320 with as many, six of 320 with the 128,256 words of Llama 3. Three ways to the same numbers, in turns, each some times:

    plain   one pair at a time, the model's own logits at every position, log_softmax, gather: what trainers do
    single  one pair at a time through raglan's generator, which applies the head at answer positions only
    table   the score table: pairs with the same passages together, what they begin with computed once, the others in batches
            of like length; written to disk with a sync a batch

And the same over passages of random words of which no two pairs share one (`--apart`: only that), where all that is gained is
gained by batches and the head. Printed are medians, their ratios, and the largest difference between scores, which must stay
below 1e-4.

What batches gain on one core is the head that `plain` applies to prompts too: at six layers of 320 it multiplies 320·V numbers
a token where the layers multiply 9.8 million. Batches fill more cores, or a GPU, and gain there what they cannot gain here.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raglan.documents import read_examples
from raglan.embedded import embedded_model
from raglan.encoder import Encoder
from raglan.generator import HFGenerator, open_generator
from raglan.knowledge import build_knowledge
from raglan.prompt import Rendered
from raglan.recipe import GeneratorSettings, PromptSettings, load_recipe
from raglan.records import Passage
from raglan.retriever import Retriever
from raglan.scores import Pair, ScoreTable

WORDS = 32_000
MODELS = ((2, 128, WORDS), (6, 320, WORDS), (6, 320, 128_256))  # layers, width, vocabulary
VESSEN = Path(__file__).parent.parent / "examples" / "vessen"
TEMPLATE = "Background: {passages}\n\nQ: {question}\nA: "


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-b", type=int, default=64, help="questions")
    words.add_argument("-k", type=int, default=10, help="passages a question")
    words.add_argument("--times", type=int, default=3, help="measurements a way")
    words.add_argument("--apart", action="store_true", help="only passages that no two questions share")
    words.add_argument("--models", type=int, nargs="*", default=range(len(MODELS)), help="which of the three, from 0")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--batch-tokens", type=int, default=16384, help="tokens a batch")
    asked = words.parse_args()
    torch.set_num_threads(asked.threads)
    sets = {"no passage twice": pairs(asked.b // 4, asked.k)}
    if not asked.apart:
        sets = {"the example corpus": found(asked.b, asked.k)} | sets
    for name, own in sets.items():
        for layers, width, vocabulary in (MODELS[number] for number in asked.models):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = None if name == "no passage twice" else embedded_model()
                size = {"layers": layers, "width": width}
                made = model(Path(folder) / "model", asked.batch_tokens, vocabulary, **size, tokenizer=tokenizer)
                print(f"\n{name}; {layers} layers, {width} wide, {vocabulary} words: ", end="")
                compare(made, own, Path(folder) / "scores", asked.times)


def found(questions: int, passages: int) -> list[Pair]:
    """Questions of the example corpus with the best passages that BM25 finds for them, and their first answer."""
    with tempfile.TemporaryDirectory() as folder:
        sparse = "knowledge.indexes={bm25: {kind: bm25, k1: 0.9, b: 0.4}}"
        recipe = load_recipe(VESSEN / "vessen.yaml", [f"knowledge.path={folder}/kb", sparse, "retriever.index=bm25"])
        base = build_knowledge(recipe.knowledge)
        asked = random.Random(0).sample(list(read_examples(VESSEN / "questions" / "train.jsonl")), questions)
        retriever = Retriever(base, Encoder.open(recipe.knowledge.encoder), index="bm25")
        hits = retriever.retrieve([e.query for e in asked], passages)
        return [Pair(e.query, (hit.passage,), e.answers[0]) for e, own in zip(asked, hits, strict=True) for hit in own]


def compare(generator: HFGenerator, asked: list[Pair], folder: Path, times: int) -> None:
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "plain": lambda: [plain(generator, pair) for pair in asked],
        "single": lambda: [single(generator, pair) for pair in asked],
        "table": lambda: table(generator, asked, folder),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[np.ndarray]] = {}
    single(generator, asked[0])
    for _ in range(times):
        for name, way in ways.items():
            began = time.perf_counter()
            found[name] = way()
            took[name].append(time.perf_counter() - began)
    apart = max(
        float(np.abs(a - b).max()) for name in ways for a, b in zip(found["plain"], found[name], strict=True)
    )  # fmt: skip
    assert apart < 1e-4, f"scores differ by {apart}"
    middle = {name: statistics.median(values) for name, values in took.items()}
    tokens = sum(len(row["input_ids"]) + len(row["labels"]) for row in (rendered(generator, pair)[1] for pair in asked))
    parameters = sum(p.numel() for p in generator.model.parameters())
    print(
        f"{len(asked)} pairs, {tokens} tokens, {parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} thread(s), "
        f"median of {times}\n\n| way | seconds | pairs/s | against the table |\n|---|---|---|---|"
    )
    for name, seconds in middle.items():
        print(f"| {name} | {seconds:.2f} | {len(asked) / seconds:.1f} | {seconds / middle['table']:.2f} |")
    print(f"\nscores agree to {apart:.1e}", flush=True)


def plain(generator: HFGenerator, pair: Pair) -> np.ndarray:
    """Full logits of one row, as float32."""
    row = rendered(generator, pair)[1]
    ids, first = torch.tensor([row["input_ids"] + row["labels"]]), len(row["input_ids"])
    with torch.no_grad():
        logprobs = generator.model(input_ids=ids).logits.float().log_softmax(-1)[0, first - 1 : -1]
    return logprobs.gather(1, ids[0, first:, None])[:, 0].numpy()


def single(generator: HFGenerator, pair: Pair) -> np.ndarray:
    return generator.token_logprobs([rendered(generator, pair)[0]], [pair.answer])[0]


def table(generator: HFGenerator, asked: list[Pair], folder: Path) -> list[np.ndarray]:
    """A table from nothing, weights named and disk synced; the folder goes afterwards."""
    made = ScoreTable(folder, generator)
    values = made.token_logprobs(made.complete(asked))
    assert made.calls == len(asked)
    shutil.rmtree(folder)
    return values


def rendered(generator: HFGenerator, pair: Pair) -> tuple[Rendered, dict[str, list[int]]]:
    prompt = generator.prompt.render(pair.query, pair.passages, history=pair.history)
    return prompt, generator.row(prompt, pair.answer)


def pairs(questions: int, passages: int) -> list[Pair]:
    """Random words; each pair has a passage of its own."""
    chance = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(WORDS - 8)}" for _ in range(chance.randint(least, most)))

    made = []
    for _ in range(questions):
        query, wanted = text(8, 24), text(2, 6)
        made += [Pair(query, (Passage(str(n), text(40, 190)),), wanted) for n in range(passages)]
    return made


def model(
    folder: Path, batch_tokens: int, words: int = WORDS, *, layers: int = 6, width: int = 320, tokenizer: Path | None = None
) -> HFGenerator:
    """Random weights, and a tokenizer of whole words or the one of that folder, saved and opened as any model is."""
    torch.manual_seed(0)
    if tokenizer is None:
        vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "Question:", "Answer:"])}
        vocabulary |= {f"w{n}": len(vocabulary) + n for n in range(words - len(vocabulary))}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
        named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        own = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    else:
        own = AutoTokenizer.from_pretrained(str(tokenizer), eos_token="[SEP]", bos_token="[CLS]")
    own.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))
    settings = GeneratorSettings(model=str(folder), dtype="float32", batch_tokens=batch_tokens)
    return open_generator(settings, PromptSettings(template=TEMPLATE, no_passage="Q: {question}\nA: ", max_tokens=400))


if __name__ == "__main__":
    main()
