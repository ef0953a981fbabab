"""The table of scores: right, exact, keyed by all that matters and nothing else, and the same after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from raglan.artifact import read_manifest
from raglan.errors import CheckpointError
from raglan.generator import HFGenerator, open_generator
from raglan.generator.hf import CPU_TOKENS
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage
from raglan.scores import KEY, Pair, Plan, ScoreTable, _blocks, _Index, _Writer

PASSAGES = [Passage(str(n), f"the tower {n} was built by {'Odo ' * (n % 7 + 1)}in {1700 + n}", f"Tower {n}") for n in range(60)]
PAIRS = [Pair(f"who built tower {n}?", (passage,), "Odo " * (n % 3) + "Marrack") for n, passage in enumerate(PASSAGES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def opened(folder: Path, *, prompt: dict[str, Any] | None = None, **settings: Any) -> HFGenerator:
    told = {"model": str(folder), "dtype": "float32", **settings}
    return open_generator(GeneratorSettings(**told), PromptSettings(**{"max_tokens": 300, **(prompt or {})}))


@pytest.fixture(scope="module")
def generator(folder: Path) -> HFGenerator:
    return opened(folder, batch_tokens=600)


def logits_of(generator: HFGenerator, pair: Pair) -> tuple[torch.Tensor, list[int], int]:
    """The model's own logits of one pair, unpadded, all ids, and where the answer begins."""
    row = generator.row(generator.prompt.render(pair.query, pair.passages), pair.answer)
    ids = [*row["input_ids"], *row["labels"]]
    with torch.no_grad():
        return generator.model(input_ids=torch.tensor([ids])).logits[0].float(), ids, len(row["input_ids"])


def shifted(generator: HFGenerator, pair: Pair) -> list[float]:
    """The slow twin: logits at t − 1 predict the token at t."""
    logits, ids, first = logits_of(generator, pair)
    return [float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(first, len(ids))]


def unshifted(generator: HFGenerator, pair: Pair) -> list[float]:
    """What a well-known trainer computes: logits at t for the token at t."""
    logits, ids, first = logits_of(generator, pair)
    return [float(logits[t].log_softmax(-1)[ids[t]]) for t in range(first, len(ids))]


def test_scores_are_a_loop_of_shifted_logits_batched_or_not(generator: HFGenerator, tmp_path: Path) -> None:
    """And the unshifted twin is not what they are, so this test would catch one."""
    table = ScoreTable(tmp_path / "scores", generator)
    values = table.token_logprobs(table.complete(PAIRS))
    assert table.calls == len(PAIRS)
    for pair, own in list(zip(PAIRS, values, strict=True))[::7]:
        assert own.dtype == np.float32
        assert own.tolist() == pytest.approx(shifted(generator, pair), abs=1e-5)
        assert own.tolist() != pytest.approx(unshifted(generator, pair), abs=1e-1)
    alone = ScoreTable(tmp_path / "alone", generator)
    for pair, own in list(zip(PAIRS, values, strict=True))[::7]:
        assert alone.token_logprobs(alone.complete([pair]))[0].tolist() == pytest.approx(own.tolist(), abs=1e-5)


def test_a_model_that_knows_the_answer_is_found_to_prefer_it(folder: Path, tmp_path: Path) -> None:
    generator = opened(folder)
    known, other = (Pair("who built it?", (PASSAGES[1],), answer) for answer in ("Marrack", "Bellwin"))
    row = generator.row(generator.prompt.render(known.query, known.passages), known.answer)
    optimiser = torch.optim.Adam(generator.model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = -generator.forward(generator.collate([row])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    table = ScoreTable(tmp_path / "scores", generator)
    sums, lengths = table.sums(table.complete([known, other]))
    assert sums[0] > sums[1] + 5
    assert lengths.tolist() == [len("Marrack") + 1, len("Bellwin") + 1]
    assert sums[0] == pytest.approx(sum(shifted(generator, known)), abs=1e-3)
    assert sum(unshifted(generator, known)) < sums[0] - 5  # the twin does not see what the model knows


def test_no_more_than_a_chunk_of_vocabulary_rows_is_ever_there(folder: Path, tmp_path: Path) -> None:
    generator = opened(folder, head_chunk=8)
    words = len(generator.tokenizer)
    heights: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                view = "aten::t" in str(getattr(function, "_schema", ""))
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == words and not view:
                    heights.append(tensor.numel() // words)
            return made

    table = ScoreTable(tmp_path / "scores", generator)
    with Watch():
        keys = table.complete(PAIRS)
    _, lengths = table.sums(keys)
    assert max(heights) == 8
    assert int(lengths.sum()) > 8 * 20
    with Watch():
        generator.model(input_ids=torch.tensor([[1] * 20]))
    assert max(heights) == 20  # the watch sees full logits where there are any


@pytest.mark.skipif(torch.cuda.is_available(), reason="the limit is for CPUs")
def test_a_block_is_scored_in_passes_that_a_cpu_can_hold(folder: Path, tmp_path: Path) -> None:
    generator, seen = opened(folder, batch_tokens=16384), []
    handle = generator.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    table = ScoreTable(tmp_path / "scores", generator)
    keys = table.complete(PAIRS)
    handle.remove()
    assert len(list(_blocks(tmp_path / "scores" / "00000.bin"))) == 1
    assert CPU_TOKENS // 2 < max(seen) <= CPU_TOKENS < sum(seen)
    whole = opened(folder, batch_tokens=600).token_logprobs(
        [generator.prompt.render(pair.query, pair.passages) for pair in PAIRS], [pair.answer for pair in PAIRS]
    )
    for own, other in zip(table.token_logprobs(keys), whole, strict=True):
        assert own.tolist() == pytest.approx(other.tolist(), abs=1e-5)


def test_float32_comes_back_to_the_bit(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    odd = np.array([-0.0, -np.inf, np.finfo(np.float32).tiny, -1e-45, np.nextafter(np.float32(-1), np.float32(0))], np.float32)
    values = [odd, *(chance.normal(size=n).astype(np.float32) for n in range(1, 200))]
    keys = np.array([chance.bytes(15) + bytes([n]) for n in range(200)], KEY)  # one of them ends in a zero byte
    tmp_path.joinpath("t").mkdir()
    for part in (slice(0, 1), slice(1, 120), slice(120, 200)):
        with _Writer(tmp_path / "t") as writer:
            writer.append(keys[part], values[part])
    order = chance.permutation(200)
    gathered, lengths = _Index.read(tmp_path / "t").values(keys[order])
    for n, own in zip(order, np.split(gathered, np.cumsum(lengths)[:-1]), strict=True):
        assert own.tobytes() == values[n].tobytes()
    assert len(list((tmp_path / "t").iterdir())) == 3


def test_the_key_holds_what_scores_depend_on(folder: Path, generator: HFGenerator, tmp_path: Path) -> None:
    path, pair = tmp_path / "scores", PAIRS[0]
    ScoreTable(path, generator).complete([pair])

    def calls(asked: Pair = pair, scorer: HFGenerator = generator) -> int:
        return ScoreTable(path, scorer).plan([asked]).to_score

    assert calls() == 0
    assert calls(scorer=opened(folder, batch_tokens=64, head_chunk=1)) == 0
    passage = pair.passages[0]
    for asked in (
        Pair("another?", pair.passages, pair.answer), Pair(pair.query, (PASSAGES[1],), pair.answer),
        Pair(pair.query, pair.passages, "another"), Pair(pair.query, pair.passages, pair.answer, ("a turn",)),
        Pair(pair.query, (Passage("0", passage.text, "Another"),), pair.answer), Pair(pair.query, (), pair.answer),
    ):  # fmt: skip
        assert calls(asked) == 1
    assert calls(Pair(pair.query, (Passage("other-id", passage.text, passage.title),), pair.answer)) == 0  # ids are not read
    for prompt in ({"template": "{passages}\nQ: {question}\nA: "}, {"max_tokens": 200}, {"passage": "{text}"}):
        assert calls(scorer=opened(folder, prompt=prompt)) == 1, prompt
    assert calls(scorer=opened(folder, dtype="bfloat16")) == 1
    assert calls(scorer=opened(tiny.llama(tmp_path / "other", seed=1))) == 1
    adapted = opened(folder, lora={"r": 2, "target_modules": ["q_proj"]})
    assert calls(scorer=adapted) == 1
    ScoreTable(path, adapted).complete([pair])
    learned = {name: p.data for name, p in adapted.model.named_parameters() if "lora_" in name}
    assert len(learned) == 2 * 2  # of two layers
    for name, tensor in learned.items():  # one value of one tensor of the adapter makes it another one
        assert calls(scorer=adapted) == 0
        before = tensor[0, 0].clone()
        tensor[0, 0] += 0.01
        assert calls(scorer=adapted) == 1, name
        tensor[0, 0] = before
    for change in ("chat_template", "eos", "bos"):
        changed = opened(folder)
        if change == "chat_template":
            changed.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        elif change == "eos":
            changed.eos = 3
        else:
            changed.tokenizer._tokenizer.post_processor = tiny.tokenizer(ends=False)._tokenizer.post_processor
        assert calls(scorer=changed) == 1, change


def test_damage_costs_its_block_and_a_torn_tail_its_batch(
    generator: HFGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scores"
    table = ScoreTable(path, generator)
    keys = table.complete(PAIRS)
    whole, content = table.token_logprobs(keys), (path / "00000.bin").read_bytes()
    assert read_manifest(path, "scores")["rows"] == len(PAIRS)
    first = int.from_bytes(content[4:8], "little")
    assert 1 < first < len(PAIRS)
    for damaged, lost in ((content[:60] + b"?" + content[61:], first), (content[:-5], None)):
        (path / "00000.bin").write_bytes(damaged)
        (path / "manifest.json").unlink()
        for more in path.glob("0000[1-9].bin"):
            more.unlink()
        again = ScoreTable(path, generator)
        again.complete(PAIRS)
        assert again.calls == lost or (lost is None and 0 < again.calls < len(PAIRS))
        for before, after in zip(whole, again.token_logprobs(keys), strict=True):
            assert after.tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert "is damaged at byte" in caplog.text
    (tmp_path / "scores.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file, and a table of scores is a folder"):
        ScoreTable(tmp_path / "scores.jsonl", generator)


def test_more_pairs_score_only_what_is_new_and_duplicates_once(generator: HFGenerator, tmp_path: Path) -> None:
    table = ScoreTable(tmp_path / "scores", generator)
    assert table.plan(PAIRS[:20] * 2).wanted == 20
    keys = table.complete(PAIRS[:20] * 2)
    assert (table.calls, len(keys)) == (20, 40)
    more = ScoreTable(tmp_path / "scores", generator)
    plan = more.plan(PAIRS)
    assert (plan.wanted, plan.on_disk, plan.to_score) == (60, 20, 40)
    rows = [generator.row(generator.prompt.render(p.query, p.passages), p.answer) for p in PAIRS[20:]]
    assert plan.tokens == sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
    more.complete(PAIRS)
    assert more.calls == 40
    assert more.plan(PAIRS) == Plan(60, 60, 0, 0)
    with_end, lengths = more.sums(keys)
    without, shorter = more.sums(keys, score_eos=False)
    ends = [values[-1] for values in more.token_logprobs(keys)]
    assert (with_end - without).tolist() == pytest.approx(ends, abs=1e-4)
    assert (lengths - shorter).tolist() == [1] * 40


DRIVER = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_scores
from pathlib import Path
test_scores.counted(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
"""


def counted(model: Path, path: Path, told: Path) -> ScoreTable:
    """The table completed, with a line in `told` for each batch before it is scored."""

    class Counted(HFGenerator):
        def token_logprobs(self, prompts: Any, answers: Any, **settings: Any) -> list[np.ndarray]:
            with open(told, "a") as file:
                file.write(f"{len(prompts)}\n")
            return super().token_logprobs(prompts, answers, **settings)

    plain = opened(model, batch_tokens=300)
    table = ScoreTable(path, Counted(plain.model, plain.tokenizer, plain.settings, plain.prompt.settings))
    table.complete(PAIRS * 3)
    return table


@pytest.mark.timeout(120)
def test_kill_9_loses_at_most_a_batch_and_the_table_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    path, told = tmp_path / "scores", tmp_path / "told"
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(folder), str(path), str(told)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 100
    while not told.is_file() or len(told.read_text().splitlines()) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (path / "manifest.json").is_file()
    kept = len(_Index.read(path))
    assert 0 < kept < len(PAIRS)
    with open(next(path.glob("*.bin")), "ab") as file:
        file.write(b"RGS1 and half a block")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = counted(folder, path, told)
        straight = counted(folder, tmp_path / "straight", tmp_path / "straight-told")
    finally:
        torch.set_num_threads(threads)
    assert table.calls == len(PAIRS) - kept
    batches = [int(line) for line in told.read_text().split()]
    assert sum(batches) - len(PAIRS) <= max(batches)
    assert straight.calls == len(PAIRS)
    ours, theirs = _Index.read(path), _Index.read(tmp_path / "straight")
    assert ours.keys.tobytes() == theirs.keys.tobytes()
    for mine, other in zip(ours.values(ours.keys), theirs.values(theirs.keys), strict=True):
        assert mine.tobytes() == other.tobytes()
    assert read_manifest(path, "scores")["rows"] == len(PAIRS)
