"""The scoring pass: B·K pairs into a table, against one pair at a time.

    make bench-scores       (one thread; some minutes on a CPU)

Causal language models with random weights: two layers of 128 with 32,000 words, the size that the other benchmarks decode with;
six layers of 320 with 32,000 words, some 20 M parameters; and the same with the 128,256 words of Llama 3. B questions with K
passages each, prompts of 60 to 220 tokens, answers as short as questions have them (`--answer 2 29`: long ones). Three ways to
the same numbers, in turns, each some times:

    plain   one pair at a time, the model's own logits at every position, log_softmax, gather: what trainers do
    single  one pair at a time through raglan's generator, which applies the head at answer positions only
    table   the score table: sorted by length, in batches by tokens, written to disk with a sync a batch

Printed are the medians, their ratios, and the largest difference between scores, which must stay below 1e-4.

What can be gained on one core is the head that `plain` applies to prompts too. At six layers of 320 it multiplies 320·V numbers
a token where the layers multiply 9.8 million, so the ratio's bound is about 2 at V = 32,000 and 5 at 128,256; at two layers of
128 the head is nearly all. Batches fill more cores, or a GPU, and gain there what they cannot gain here.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raglan.generator import HFGenerator, open_generator
from raglan.prompt import Rendered
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage
from raglan.scores import Pair, ScoreTable

WORDS = 32_000
MODELS = ((2, 128, WORDS), (6, 320, WORDS), (6, 320, 128_256))  # layers, width, vocabulary


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-b", type=int, default=16, help="questions")
    words.add_argument("-k", type=int, default=10, help="passages a question")
    words.add_argument("--times", type=int, default=5, help="measurements a way")
    words.add_argument("--answer", type=int, nargs=2, default=(2, 6), help="least and most words of an answer")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--batch-tokens", type=int, default=16384, help="padded tokens a batch")
    asked = words.parse_args()
    torch.set_num_threads(asked.threads)
    for layers, width, vocabulary in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            generator = model(Path(folder) / "model", asked.batch_tokens, vocabulary, layers=layers, width=width)
            print(f"\n{layers} layers, {width} wide, {vocabulary} words: ", end="")
            compare(generator, pairs(asked.b, asked.k, asked.answer), Path(folder) / "scores", asked.times)


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


def pairs(questions: int, passages: int, answer: Sequence[int]) -> list[Pair]:
    chance = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(WORDS - 8)}" for _ in range(chance.randint(least, most)))

    made = []
    for _ in range(questions):
        query, wanted = text(8, 24), text(*answer)
        made += [Pair(query, (Passage(str(n), text(40, 190)),), wanted) for n in range(passages)]
    return made


def model(folder: Path, batch_tokens: int, words: int = WORDS, *, layers: int = 6, width: int = 320) -> HFGenerator:
    """Random weights and a tokenizer of whole words, saved and opened as any model is."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "Question:", "Answer:"])}
    vocabulary |= {f"w{n}": len(vocabulary) + n for n in range(words - len(vocabulary))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))
    settings = GeneratorSettings(model=str(folder), dtype="float32", batch_tokens=batch_tokens)
    return open_generator(settings, PromptSettings(max_tokens=400))


if __name__ == "__main__":
    main()
