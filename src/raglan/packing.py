"""Packing: short rows side by side in one long one, and nothing seen of each other.

A pack holds whole rows, prompt and answer and end token. Positions begin at 0 in each row; attention stays inside a row; a
row's first token is learned by nobody. So the loss of packed rows is that of the same rows apart.

transformers sees from position_ids where rows begin: its flash kernels then read rows of unlike length without padding, its
other attentions get a block-diagonal causal mask. An architecture that takes no notice (a recurrent one, or one whose
positions cannot begin anew) would let rows read each other, so `check_packing` tries it on two rows before anything is
learned. Deviation from transformers' flattening collator: that is safe only where a flash kernel is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raglan.errors import GeneratorError
from raglan.generator import HFGenerator
from raglan.generator.batches import UNSCORED, learned, padded

__all__ = ["Pack", "Row", "check_packing", "first_fit_decreasing", "pack_rows", "packed_batch", "row_length"]

Row = dict[str, list[int]]  # input_ids, labels
Pack = dict[str, Any]  # input_ids of all its rows in line; rows


def row_length(row: Row) -> int:
    """Tokens of a row, answer and end token included."""
    return len(row["input_ids"]) + len(row["labels"])


def first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `size`: the longest first, each into the first bin that has room.

    A tree of the bins' room finds that bin, so n rows take n·log n steps. Bins hold 11/9 of the fewest possible, at most
    (Johnson 1973), and with rows of a quarter of the size or less hardly more than the fewest.

    Raises:
        ValueError: a length above `size`.
    """
    if max(lengths, default=0) > size:
        raise ValueError(f"a row of {max(lengths)} tokens does not fit into a pack of {size}")
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [size] * (2 * leaves)  # room[n] is the most room of any bin below node n; bins are the leaves
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[place] else 2 * node + 1
        bins += [[]] if node - leaves == len(bins) else []
        bins[node - leaves].append(place)
        room[node] -= lengths[place]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def pack_rows(rows: Sequence[Row], size: int) -> tuple[list[Pack], float]:
    """Rows in packs of at most `size` tokens, and how much of the packs is filled, 0 to 1."""
    bins = first_fit_decreasing([row_length(row) for row in rows], size)
    packs = [_pack([rows[place] for place in sorted(bin_)]) for bin_ in bins]
    return packs, sum(row_length(row) for row in rows) / (size * max(len(packs), 1))


def _pack(rows: list[Row]) -> Pack:
    return {"input_ids": [token for row in rows for token in (*row["input_ids"], *row["labels"])], "rows": rows}


def packed_batch(packs: Sequence[Pack], pad: int, *, flat: bool) -> dict[str, Tensor]:
    """Packs → {labels (R,T), at (R,T), input_ids (B,L), position_ids (B,L)} of their R rows, of which a mean over rows is.

    `at` is where, in the B·L states in line, the state stands that predicts each label.

    Args:
        flat: all packs in one line without padding, B = 1, as flash kernels want them.
    """
    if flat:
        packs = [_pack([row for pack in packs for row in pack["rows"]])]
    ids, _ = padded([pack["input_ids"] for pack in packs], pad)
    width = ids.shape[1]
    positions, at = [], []
    for line, pack in enumerate(packs):
        own: list[int] = []
        for row in pack["rows"]:
            first = line * width + len(own) + len(row["input_ids"]) - 1
            at.append(list(range(first, first + len(row["labels"]))))
            own += range(row_length(row))
        positions.append([*own, *range(width - len(own))])  # what fills up is a row of its own, and nobody learns it
    rows = [row for pack in packs for row in pack["rows"]]
    labels, _ = padded([row["labels"] for row in rows], UNSCORED)
    inputs = {"input_ids": ids, "position_ids": torch.tensor(positions)}
    return {"labels": labels, "at": padded(at, 0)[0], **learned(rows), **inputs}


def reads_flat(generator: HFGenerator) -> bool:
    """Whether the model's attention takes rows of unlike length without padding."""
    return str(getattr(generator.model.config, "_attn_implementation", "")).startswith("flash")


@torch.no_grad()
def check_packing(generator: HFGenerator) -> None:
    """Refuse a model in which packed rows read each other, or are not what they are apart.

    Raises:
        GeneratorError: a sequence-to-sequence model, the embedded reader, or an architecture that fails the trial.
    """
    name = generator.settings.model
    if generator.is_seq2seq:
        raise GeneratorError(
            f"{name!r} reads a prompt apart from its answer, and such rows cannot be packed",
            hint="data.packing: none, or take a causal model",
        )
    was_training = generator.model.training
    generator.model.eval()
    try:
        together, apart, untouched = _trial(generator)
    except TypeError as fault:
        raise _unpackable(name, str(fault)) from None
    finally:
        generator.model.train(was_training)
    exact = generator.dtype == torch.float32 and next(generator.model.parameters()).dtype == torch.float32
    near = 1e-4 if exact else 5e-2
    if not torch.allclose(together, apart, atol=near, rtol=near):
        raise _unpackable(name, "packed rows have other probabilities than the same rows apart")
    if not torch.allclose(together[1], untouched, atol=1e-6 if exact else 1e-2, rtol=0):
        raise _unpackable(name, "a row's probabilities change with the row before it")


def _trial(generator: HFGenerator) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of two rows packed, (2,T), of the same apart, and of the second behind another first row, (T,)."""
    words = generator.model.get_input_embeddings().num_embeddings
    chance = torch.Generator().manual_seed(0)
    first, second, other = (torch.randint(words, (8,), generator=chance).tolist() for _ in range(3))
    rows = [{"input_ids": ids[:3], "labels": ids[3:]} for ids in (first, second, other)]

    def logprobs(*chosen: Row) -> Tensor:
        batch = packed_batch([_pack(list(chosen))], generator.pad, flat=reads_flat(generator))
        return generator.forward(batch).float().cpu()

    with generator.autocast():
        apart = generator.forward(generator.collate(rows[:2])).float().cpu()
        return logprobs(rows[0], rows[1]), apart, logprobs(rows[2], rows[1])[1]


def _unpackable(name: str, reason: str) -> GeneratorError:
    return GeneratorError(f"rows cannot be packed for {name!r}: {reason}", hint="data.packing: none")
