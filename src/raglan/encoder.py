"""Text → vectors, by any sentence-transformers model or DPR encoder, with one tower or two.

Two names for two acts: `embed_*` has no gradient and is batched, `forward` has gradient and is for training. Prompts,
pooling, normalisation and similarity are the model's own. With cosine similarity vectors leave here with length 1, so that
everywhere else similarity is an inner product.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor

from raglan.artifact import directory_fingerprint, read_manifest, write_manifest
from raglan.dpr import dpr_folder, model_file, open_dpr, save_dpr
from raglan.embedded import embedded_model
from raglan.errors import CheckpointError, IndexMismatch, RecipeError
from raglan.quiet import without_bars
from raglan.recipe import EncoderSettings
from raglan.weights import read_json

__all__ = ["Encoder", "Text", "bfloat16_is_faster", "compute_device", "open_tower"]

log = logging.getLogger(__name__)
Side = Literal["query", "passage"]
Text = str | tuple[str, str]  # a text, or the tokenizer's pair of title and text
PIECE = 512  # texts encoded between two words of progress


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies bfloat16 in hardware: a GPU that supports it, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compute_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Encoder:
    """A query tower and a passage tower, which may be one and the same.

    Attributes:
        similarity: "cosine" or "dot".
        dimension: D.
        query_tower, passage_tower: sentence-transformers models; identical objects for a one-tower encoder.
        pairs: whether passages go to the tokenizer as pairs of title and text, as DPR wants them.
        gamma: the temperature a tuned query tower was tuned at, from its manifest.
    """

    def __init__(self, passage_tower: SentenceTransformer, query_tower: SentenceTransformer, settings: EncoderSettings):
        self.pairs = settings.model != "embedded" and dpr_folder(settings.model) is not None
        self.passage_tower, self.query_tower, self.settings = passage_tower, query_tower, settings
        if passage_tower.similarity_fn_name not in ("cosine", "dot"):
            raise RecipeError(
                f"encoder {settings.model!r} compares by {passage_tower.similarity_fn_name}; raglan needs cosine or dot"
            )
        self.similarity: str = str(passage_tower.similarity_fn_name)
        self.dimension = int(passage_tower.get_embedding_dimension() or 0)
        if query_tower.get_embedding_dimension() != self.dimension:
            raise RecipeError(
                f"query tower has {query_tower.get_embedding_dimension()} dimensions, passage tower {self.dimension}"
            )
        fast = settings.dtype == "bfloat16" or (settings.dtype == "auto" and bfloat16_is_faster())
        self.dtype = torch.bfloat16 if fast else torch.float32
        self._passage_fingerprint: str | None = None
        self.gamma: float | None = None
        self._query_prompt = settings.query_prompt

    @classmethod
    def open(cls, settings: EncoderSettings, *, query_encoder: Path | None = None) -> Encoder:
        """Load the towers. `query_encoder` is a folder that `save_query_tower` wrote.

        Raises:
            CheckpointError: a model that cannot be loaded.
            IndexMismatch: a query tower that was tuned against another passage tower.
        """
        passage = open_tower(settings.model, settings)
        query = passage if settings.query_model is None else open_tower(settings.query_model, settings)
        encoder = cls(passage, query, settings)
        if query_encoder is not None:
            encoder._adopt(query_encoder)
        return encoder

    def embed_queries(self, texts: Sequence[str], *, batch_size: int | None = None) -> np.ndarray:
        """(n,) texts → (n,D) float32, no gradient."""
        return self._embed("query", texts, batch_size)

    def embed_passages(
        self, texts: Sequence[Text], *, batch_size: int | None = None, seen: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """(n,) texts or pairs → (n,D) float32, no gradient. `seen` is told how many more are done, every few hundred."""
        order = sorted(range(len(texts)), key=lambda place: -_length(texts[place]))  # like lengths together: less padding
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(order), PIECE):
            places = order[start : start + PIECE]
            vectors[places] = self._embed("passage", [texts[place] for place in places], batch_size)
            if seen is not None:
                seen(len(places))
        return vectors

    def overlong(self, texts: Sequence[Text]) -> int:
        """How many texts have more tokens than the passage tower reads; their ends are in no vector."""
        limit, tokenizer = self.passage_tower.max_seq_length, self.passage_tower.tokenizer
        if not limit or not hasattr(tokenizer, "backend_tokenizer"):
            return 0
        plain = _plain(tokenizer)
        return sum(len(encoding) > limit for encoding in plain.encode_batch_fast(list(texts)))

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where the passage tower's tokens of each text begin and end, in characters, its special tokens left out.

        Raises:
            RecipeError: a tokenizer that does not say where its tokens stand.
        """
        if not hasattr(self.passage_tower.tokenizer, "backend_tokenizer"):
            raise RecipeError(f"the tokenizer of {self.settings.model!r} has no offsets", hint="use an encoder with a fast one")
        plain = _plain(self.passage_tower.tokenizer)
        return [encoding.offsets for encoding in plain.encode_batch(list(texts), add_special_tokens=False)]

    def reads(self, query: str) -> bool:
        """Whether the query tower reads a query to its end."""
        limit, tokenizer = self.query_tower.max_seq_length, self.query_tower.tokenizer
        if not limit or not callable(tokenizer):
            return True
        return len(tokenizer((self._prompt("query") or "") + query, truncation=False, verbose=False)["input_ids"]) <= limit

    def forward(self, features: dict[str, Tensor], *, side: Side = "query") -> Tensor:
        """Features (see `features`) of one side → (B,D), with gradient into that side's tower."""
        with self._autocast():
            vectors: Tensor = self._tower(side)(dict(features), **self._task(side))["sentence_embedding"]
        return self._normalised(vectors.float())

    def features(self, texts: Sequence[Text], *, side: Side = "query") -> dict[str, Tensor]:
        """What `forward` takes, on the CPU."""
        features: dict[str, Any] = self._tower(side).preprocess(list(texts), prompt=self._prompt(side), **self._task(side))
        whole = {k: torch.full((len(texts),), v) for k, v in features.items() if isinstance(v, int)}  # a prompt's length
        return {**whole, **{name: value for name, value in features.items() if isinstance(value, Tensor)}}

    def split(self) -> SentenceTransformer:
        """Give the query side a tower of its own, with storage of its own, and return it. Passage vectors stay valid."""
        if self.query_tower is self.passage_tower:
            self.passage_fingerprint  # noqa: B018 - taken before anything can move
            self.query_tower = copy.deepcopy(self.passage_tower)
        self.passage_tower.requires_grad_(False)
        return self.query_tower

    def snapshot(self, **settings: Any) -> Encoder:
        """This encoder with a passage tower of its own that no longer learns: what a new index is built by.

        Args:
            settings: what changes of the encoder's settings, as the folders its towers will be in.
        """
        passage = copy.deepcopy(self.passage_tower).eval().requires_grad_(False)
        taken = Encoder(passage, self.query_tower, self.settings.model_copy(update=settings))
        taken.pairs = self.pairs  # the folders may not be there yet
        taken.gamma, taken._query_prompt = self.gamma, self._query_prompt
        return taken

    @property
    def passage_fingerprint(self) -> str:
        """Names what passage vectors depend on: the passage tower's weights, its prompt, its limit. Taken once."""
        if self._passage_fingerprint is None:
            self._passage_fingerprint = self._passage_tower_now()
        return self._passage_fingerprint

    def passage_tower_moved(self, since: str) -> bool:
        """Whether the passage tower, as it is now, is another than the one of this fingerprint."""
        return self._passage_tower_now() != since

    def _passage_tower_now(self) -> str:
        digest = hashlib.sha256(_weights(self.passage_tower))
        digest.update(repr((self._prompt("passage"), self.passage_tower.max_seq_length, self.similarity)).encode())
        modules: list[Any] = list(self.passage_tower)
        parts = [module.get_config_dict() for module in modules if hasattr(module, "get_config_dict")]
        digest.update(repr([sorted(part.items(), key=str) for part in parts]).encode())
        digest.update(_vocabulary(self.passage_tower.tokenizer))
        digest.update(b"pairs" if self.pairs else b"")
        return digest.hexdigest()[:16]

    @property
    def query_fingerprint(self) -> str:
        """Names what query vectors depend on, as the query tower is now."""
        digest = hashlib.sha256(_weights(self.query_tower))
        digest.update(repr((self._prompt("query"), self.query_tower.max_seq_length, self.similarity)).encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """What the knowledge base's manifest keeps of its encoder."""
        return {
            "model": self.settings.model, "passage_fingerprint": self.passage_fingerprint,
            "similarity": self.similarity, "dimension": self.dimension, "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip

    def save_passage_tower(self, folder: Path) -> None:
        """Write the passage tower for `knowledge.encoder.model`: as a sentence-transformers model, or as the DPR it was."""
        if self.pairs:
            save_dpr(self.passage_tower, folder)
        else:
            with without_bars():
                self.passage_tower.save(str(folder), create_model_card=False)

    def save_query_tower(self, folder: Path, **figures: Any) -> None:
        """Write the query tower as a sentence-transformers model that remembers its passage tower.

        Raises:
            CheckpointError: the passage tower has learned since the vectors were made, so no index belongs to the two.
        """
        if self.passage_tower_moved(self.passage_fingerprint):
            raise CheckpointError(
                f"the passage tower has learned, and the vectors are those of {self.passage_fingerprint}",
                hint="take a snapshot(), encode the passages by it, and save the query tower from there",
            )
        with without_bars():
            self.query_tower.save(str(folder), create_model_card=False)
        told = {**self.identity, "query_prompt": self._prompt("query"), **figures}
        write_manifest(folder, "query encoder", {**told, "weights": directory_fingerprint(folder)})

    def _adopt(self, folder: Path) -> None:
        manifest = read_manifest(folder, "query encoder")
        if manifest["passage_fingerprint"] != self.passage_fingerprint:
            raise IndexMismatch(
                f"{folder} was tuned against passage encoder {manifest['model']!r} ({manifest['passage_fingerprint']}), "
                f"not against {self.settings.model!r} ({self.passage_fingerprint})",
                hint="use the knowledge base it was tuned on, or train the query encoder again",
            )
        self.query_tower = open_tower(str(folder), self.settings)
        self.gamma = manifest.get("gamma")
        if self._query_prompt is None:
            self._query_prompt = manifest.get("query_prompt")

    def _embed(self, side: Side, texts: Sequence[Text], batch_size: int | None) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        tower = self._tower(side)
        encode = tower.encode_query if side == "query" else tower.encode_document
        with self._autocast():
            vectors = encode(
                list(texts), batch_size=batch_size or self.settings.batch_size, prompt=self._prompt(side),
                convert_to_tensor=True, show_progress_bar=False, normalize_embeddings=self.similarity == "cosine",
            )  # fmt: skip
        return np.asarray(self._normalised(vectors.float()).cpu().numpy(), dtype=np.float32)

    def normalised(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (n,D) made elsewhere by this encoder, as it would give them: of length 1 where it compares by cosine."""
        return np.asarray(self._normalised(torch.from_numpy(vectors).float()).numpy())

    def _tower(self, side: Side) -> SentenceTransformer:
        return self.query_tower if side == "query" else self.passage_tower

    def _normalised(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def _autocast(self) -> AbstractContextManager[Any]:
        """The encoder's own precision, whatever a trainer runs around it: queries are learned as they will be asked."""
        return torch.autocast(self.passage_tower.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _prompt(self, side: Side) -> str | None:
        given = self._query_prompt if side == "query" else self.settings.passage_prompt
        if given is not None:
            return given
        prompts = self._tower(side).prompts
        names = ("query",) if side == "query" else ("document", "passage", "corpus")
        return next((prompts[name] for name in names if prompts.get(name)), None)

    def _task(self, side: Side) -> dict[str, str]:
        """Routers (two towers in one model) are told which side it is; other models are told nothing."""
        routed = any(type(module).__name__ == "Router" for module in self.query_tower)
        return {"task": side} if routed else {}


def open_tower(name: str, settings: EncoderSettings) -> SentenceTransformer:
    """One tower: `embedded`, a folder or a hub name, of a sentence-transformers model or a DPR encoder.

    Raises:
        CheckpointError: a model that cannot be loaded, or one that writes.
    """
    folder, device = str(embedded_model()) if name == "embedded" else name, str(compute_device())
    _refuse_generators(name, folder)
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        dpr = dpr_folder(folder)
        with without_bars():
            tower = SentenceTransformer(folder, device=device) if dpr is None else open_dpr(dpr, device=device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as fault:
        raise CheckpointError(
            f"encoder {name!r} cannot be loaded: {str(fault).splitlines()[0]}",
            hint="give `embedded`, a folder with a sentence-transformers model or a DPR encoder, or a hub name and a network",
        ) from None
    if settings.max_tokens is not None:
        tower.max_seq_length = settings.max_tokens
    return tower


def _refuse_generators(name: str, folder: str) -> None:
    """sentence-transformers would take BART, T5 or a causal model and average its states, which are no embeddings."""
    config = model_file(folder, "config.json")
    if config is None or model_file(folder, "modules.json") is not None:
        return
    told = read_json(config)
    classes = told.get("architectures") or []
    if told.get("is_encoder_decoder") or any(kind.endswith(("ForConditionalGeneration", "ForCausalLM")) for kind in classes):
        raise CheckpointError(
            f"encoder {name!r} is a model that writes ({', '.join(classes) or told.get('model_type')}), not one that embeds",
            hint="put it under generator.model; an encoder is `embedded`, a sentence-transformers model or a DPR encoder",
        )


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _vocabulary(tokenizer: Any) -> bytes:
    """What a tokenizer does to text, without the padding and truncation that every call sets anew."""
    return bytes(_plain(tokenizer).to_str(), "utf-8") if hasattr(tokenizer, "backend_tokenizer") else b""


def _plain(tokenizer: Any) -> Tokenizer:
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    return plain


def _weights(tower: SentenceTransformer) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.dim() else b"")
    return digest.digest()
