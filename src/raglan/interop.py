"""Checkpoints in Hugging Face's RAG layout (`facebook/rag-token-nq` and its kin): taken apart to be used and tuned here, and
put together again so that transformers opens them.

    config.json                           rag.json, untouched; recipe.yaml says the same as a recipe
    rag.question_encoder.*                query_encoder/      a sentence-transformers model: BERT, [CLS], inner product
    rag.ctx_encoder.*, where it is there  passage_encoder/    transformers' DPRContextEncoder
    rag.generator.*                       generator/          BART or T5
    question_encoder_tokenizer/           in query_encoder/ (and passage_encoder/)
    generator_tokenizer/                  in generator/
    generation_config.json                the same

Tensors are renamed and never computed with, so their bits stay. The index that config.json names (`dataset`, `index_name`,
`index_path`, `passages_path`) is not followed: the recipe names a knowledge base instead. Either folder appears whole, by
one rename, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DPRConfig, DPRContextEncoder, RagConfig

from raglan.artifact import read_manifest, write_json
from raglan.dpr import DEFAULTS, as_dpr, copy_tokenizer, dpr_folder, misfits, vector_size, write_tower
from raglan.encoder import open_tower
from raglan.errors import CheckpointError
from raglan.generator import HFGenerator, open_merged
from raglan.generator.adapter import adapter_base, is_adapter
from raglan.rag import PRIOR
from raglan.recipe import GeneratorSettings, MarginalObjective, PromptSettings, Recipe
from raglan.stages import Parts
from raglan.vocabulary import save_tokenizer
from raglan.weights import lacking, read_json, read_tensors, without, without_copies, write_tensors

__all__ = ["export_rag", "import_rag", "merge_adapter"]

MODELS = {"RagSequenceForGeneration": "sequence", "RagTokenForGeneration": "token"}
GENERATORS = {"bart": "BartForConditionalGeneration", "t5": "T5ForConditionalGeneration"}
USUAL = {  # what transformers takes where config.json is silent
    "n_docs": 5, "title_sep": " / ", "doc_sep": " // ", "max_combined_length": 300, "retrieval_vector_size": 768,
    "label_smoothing": 0.0,
}  # fmt: skip
QUESTIONS, CONTEXTS, GENERATOR = "rag.question_encoder.question_encoder.", "rag.ctx_encoder.", "rag.generator."
QUESTION_WORDS, GENERATOR_WORDS = "question_encoder_tokenizer", "generator_tokenizer"
WHOLE = "give a folder as transformers' RagSequenceForGeneration (or RagToken…) and RagTokenizer save it"


def import_rag(folder: Path, out: Path) -> Path:
    """Take a RAG checkpoint apart into folders that raglan opens, with a recipe to start from; returns the recipe's path.

    Args:
        folder: config.json, weights (safetensors, or an old pytorch_model.bin), and the two tokenizer folders.
        out: the folder to make.

    Raises:
        CheckpointError: another kind of folder, one that is not whole, or an `out` that is taken.
    """
    folder = Path(folder)
    with _appearing(out) as parts:
        config = _rag_config(folder)
        tensors = read_tensors(folder)
        questions, contexts = config["question_encoder"], without(CONTEXTS, tensors)
        words = folder / QUESTION_WORDS
        write_tower(parts / "query_encoder", questions, without(QUESTIONS, tensors), tokenizer=words, source=folder)
        if contexts:
            _write_passage_encoder(parts / "passage_encoder", questions, contexts, folder)
        _write_generator(parts / "generator", config["generator"], without(GENERATOR, tensors), folder)
        shutil.copyfile(folder / "config.json", parts / "rag.json")
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", parts / "generation_config.json")
        passages = "passage_encoder" if contexts else "facebook/dpr-ctx_encoder-single-nq-base"
        (parts / "recipe.yaml").write_text(_recipe(folder.resolve().name, config, passages), encoding="utf-8")
    return Path(out) / "recipe.yaml"


def export_rag(recipe: Recipe, parts: Parts, out: Path, *, trained: Collection[str] | None = None) -> Path:
    """Write a system in Hugging Face's RAG layout; returns the folder.

    The configuration that an import kept beside the generator is written back with its unknown fields, changed only where
    the recipe says something else. A system that came from elsewhere gets a new one, if its parts are those of RAG.

    Args:
        recipe: what is told of prompt, K and method.
        parts: the tuned parts; what is None there is the recipe's own.
        out: the folder to make.
        trained: the stages that made the parts, of which the last that marginalises tells the method; default, all.

    Raises:
        CheckpointError: parts or settings that the layout cannot express, all of them named, or an `out` that is taken.
    """
    with _appearing(out) as folder:
        home = Path(recipe.generator.model).parent  # where an import puts the generator, and rag.json beside it
        imported = Path(recipe.generator.model).is_dir() and (home / "rag.json").is_file()
        kept = read_json(home / "rag.json") if imported else {}
        encoder = recipe.knowledge.encoder
        source = str(parts.query_encoder or recipe.retriever.query_encoder or encoder.query_model or encoder.model)
        tower = open_tower(source, encoder).float()
        generator = _open_generator(recipe, parts)
        aim = _objective(recipe, trained)
        _check(recipe, parts, kept, aim, tower, source, generator)
        questions, weights = as_dpr(tower)
        questions = _changed(kept.get("question_encoder", {"model_type": "dpr"}), questions, DEFAULTS)
        config = _config(recipe, kept, aim, questions, _generator_config(recipe, parts, kept, generator))
        tensors = {f"{QUESTIONS}{name}": value for name, value in weights.items()}
        own = without_copies(generator.model, generator.model.state_dict())
        tensors |= {f"{GENERATOR}{name}": value for name, value in own.items()}
        if passages := _passage_encoder(recipe, parts, home if imported else None):
            tensors |= {f"{CONTEXTS}{name}": value for name, value in read_tensors(passages).items()}
        if missing := lacking(_bare_generator(config["generator"]), own):
            raise CheckpointError(
                f"generator {generator.settings.model!r} has not the shape that {home / 'rag.json'} tells of: {missing[0]}",
                hint="the folder of an import holds the parts of one checkpoint: keep other models elsewhere",
            )
        write_tensors(folder / "model.safetensors", tensors)
        write_json(folder / "config.json", config)
        if imported and (home / "generation_config.json").is_file():
            begins = config["generator"].get("forced_bos_token_id")
            answers = read_json(home / "generation_config.json")
            write_json(folder / "generation_config.json", _changed(answers, {"forced_bos_token_id": begins}, {}))
        save_tokenizer(tower.tokenizer, folder / QUESTION_WORDS)
        save_tokenizer(generator.tokenizer, folder / GENERATOR_WORDS)
    return Path(out)


def merge_adapter(recipe: Recipe, parts: Parts, out: Path, *, dtype: Literal["base", "float32", "bfloat16", "float16"]) -> Path:
    """Write a recipe's generator as one plain model that transformers and vLLM open: base + s·BA, and the tokenizer.

    Args:
        parts: whose generator it is; the recipe's own where there is none.
        out: the folder to make.
        dtype: of the weights that are written, `base` for those that the base is kept in. Sums are float32.

    Raises:
        CheckpointError: no adapter; one that does not fit; a quantised base; an `out` that is taken.
    """
    settings = _tuned(recipe, parts)
    if settings.adapter is None and not is_adapter(settings.model):
        raise CheckpointError(
            f"generator {settings.model!r} has no adapter to merge",
            hint="name one as generator.adapter, or train with generator.lora",
        )
    base = settings.model if settings.adapter is not None else adapter_base(settings.model)
    with _appearing(out) as folder:
        kind = _stored(base) if dtype == "base" else dtype
        generator = open_merged(settings.model_copy(update={"dtype": kind}), recipe.prompt)
        if not generator.is_seq2seq:  # as the published tokenizers of such models are
            _turn_left(generator.tokenizer)
        generator.save(folder, merged=True, dtype=kind)
    return Path(out)


def _turn_left(tokenizer: Any) -> None:
    """Padding and truncation on the left. Only what a tokenizer was made with is saved, as it is by then."""
    for name in ("padding_side", "truncation_side"):
        setattr(tokenizer, name, "left")
        tokenizer.init_kwargs[name] = "left"


def _stored(base: str) -> str:
    """The precision that a model's weights are kept in."""
    try:
        told = str(AutoConfig.from_pretrained(base).dtype).removeprefix("torch.")
    except (OSError, ValueError, KeyError, TypeError):
        return "float32"  # what is wrong with it is told when it is loaded
    return told if told in ("bfloat16", "float16") else "float32"


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all is done."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already", hint="name a folder that is not, or remove it first")
    half = out.with_name(out.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        yield half
        os.replace(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)


# in


def _rag_config(folder: Path) -> dict[str, Any]:
    """config.json of a RAG checkpoint whose parts are of known kinds and whose vectors have one size."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json", hint=WHOLE)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "rag":
        raise CheckpointError(f"{folder} holds a model of type {config.get('model_type')!r}, not 'rag'", hint=WHOLE)
    if _over(config) is None:
        raise CheckpointError(
            f"{folder}/config.json names architectures {config.get('architectures')}; known are {', '.join(MODELS)}",
            hint="put the one that it was trained as into `architectures`",
        )
    for part, kinds in (("question_encoder", ["dpr"]), ("generator", list(GENERATORS))):
        kind = config[part].get("model_type") if isinstance(config.get(part), dict) else None
        if kind not in kinds:
            raise CheckpointError(
                f"{folder}/config.json tells of a {part} of type {kind!r}; raglan reads {' and '.join(kinds)}",
                hint="other parts have no form in which both raglan and transformers' RAG could use them",
            )
    size, told = vector_size(config["question_encoder"]), config.get("retrieval_vector_size", USUAL["retrieval_vector_size"])
    if size != told:
        raise CheckpointError(
            f"the question encoder of {folder} gives {size} numbers, but retrieval_vector_size is {told}",
            hint=f"if the passage vectors have {size}, correct retrieval_vector_size in its config.json",
        )
    return config


def _over(config: Mapping[str, Any]) -> str | None:
    return next((MODELS[name] for name in config.get("architectures") or [] if name in MODELS), None)


def _write_passage_encoder(folder: Path, questions: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path) -> None:
    """The passage tower of an end-to-end run, as transformers' DPRContextEncoder; it has the question encoder's shape."""
    with torch.device("meta"):
        model = DPRContextEncoder(DPRConfig(**questions))
    _check_whole(lacking(model, tensors), source, CONTEXTS)
    copy_tokenizer(source / QUESTION_WORDS, folder)
    write_tensors(folder / "model.safetensors", without_copies(model, tensors))
    write_json(folder / "config.json", {**questions, "architectures": ["DPRContextEncoder"]})


def _write_generator(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path) -> None:
    model = _bare_generator(config)
    _check_whole(lacking(model, tensors), source, GENERATOR)
    copy_tokenizer(source / GENERATOR_WORDS, folder)
    write_tensors(folder / "model.safetensors", without_copies(model, tensors))
    own = {key: value for key, value in config.items() if key != "return_dict"}  # files of 2020 ask for tuples
    write_json(folder / "config.json", {**own, "architectures": [GENERATORS[config["model_type"]]]})


def _bare_generator(config: Mapping[str, Any]) -> Any:
    """The model of a config without storage: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config))


def _check_whole(missing: list[str], source: Path, part: str) -> None:
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of {part}*: {', '.join(missing[:3])}…",
            hint="its files are incomplete, or of another shape than its config.json says",
        )


def _recipe(name: str, config: Mapping[str, Any], passages: str) -> str:
    """A recipe that says what a RAG config says. Strings are written as JSON, which YAML reads."""
    told = {**USUAL, **config}
    prefix, over = config["generator"].get("prefix") or "", _over(config)
    title_sep = told["title_sep"].replace("{", "{{").replace("}", "}}")
    arrow = "" if passages == "passage_encoder" else "<- "
    template, alone = f"{prefix}{{passages}}{told['doc_sep']}{{question}}", f"{prefix}{{question}}"
    return f"""\
# Made by `raglan checkpoint import`. To fill in: what is marked with an arrow.
name: {json.dumps(re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip("_.-") or "rag")}

knowledge:
  path: kb
  documents: documents  # <- a file or a folder
  chunk: {{max_tokens: 128}}  # null where the rows of .jsonl, .csv or .parquet are passages as they stand
  encoder:
    model: {json.dumps(passages)}  # {arrow}what the query encoder was trained with
    query_model: query_encoder
    dtype: float32  # inner products of this size need it
  indexes: {{dense: {{kind: dense}}}}
retriever: {{k: {told["n_docs"]}}}

prompt:
  template: {json.dumps(template, ensure_ascii=False)}
  passage: {json.dumps(f"{{title}}{title_sep}{{text}}", ensure_ascii=False)}
  no_passage: {json.dumps(alone, ensure_ascii=False)}
  max_tokens: {told["max_combined_length"]}
  question_form: query_decoded  # as transformers feeds it: in the query encoder's spelling

generator: {{model: generator}}
decode: {{kind: rag_{over}}}

# for `raglan train`
data: {{kind: questions, path: questions.jsonl}}  # <- questions with answers
objective:
  kind: marginal
  over: {over}
  k: {told["n_docs"]}
  label_smoothing: {float(told["label_smoothing"])}
  rates: {{query_encoder: 1.0e-5}}
train: {{learning_rate: 3.0e-5}}
"""


# out


def _open_generator(recipe: Recipe, parts: Parts) -> HFGenerator:
    """The generator in float32, with its adapter merged if it has one."""
    return open_merged(_tuned(recipe, parts).model_copy(update={"dtype": "float32"}), recipe.prompt)


def _tuned(recipe: Recipe, parts: Parts) -> GeneratorSettings:
    own = recipe.generator
    return own if parts.generator is None else own.model_copy(update={"model": parts.generator, "adapter": None})


def _check(
    recipe: Recipe, parts: Parts, kept: Mapping[str, Any], aim: MarginalObjective | None, tower: SentenceTransformer,
    source: str, generator: HFGenerator,
) -> None:  # fmt: skip
    """Refuse what the layout has no place for, all at once."""
    faults = [*_finding_faults(recipe, parts, tower, source), *_reading_faults(recipe, generator)]
    if _method(recipe, kept, aim) is None:
        faults.append(f"decode.kind is {recipe.decode.kind!r}: transformers' RAG answers by rag_sequence or rag_token")
    if faults:
        raise CheckpointError(
            "\n  ".join(["the RAG layout cannot express this system:", *faults]),
            hint="it takes a BERT query encoder with [CLS] pooling and inner product, BART or T5, and a prompt such as "
            "template '{passages} // {question}' with passage '{title} / {text}'",
        )


def _finding_faults(recipe: Recipe, parts: Parts, tower: SentenceTransformer, source: str) -> Iterator[str]:
    yield from (f"query encoder {source!r}: {reason}" for reason in misfits(tower))
    prompt = recipe.knowledge.encoder.query_prompt
    if prompt if prompt is not None else tower.prompts.get("query"):
        yield f"query encoder {source!r}: it puts a prompt before queries, transformers puts none"
    if parts.passage_encoder is not None and dpr_folder(str(parts.passage_encoder)) is None:
        yield f"passage encoder {recipe.knowledge.encoder.model!r}: it was tuned, and is no DPR"
    prior = recipe.retriever.prior
    learned = read_manifest(parts.prior, PRIOR)["values"] if parts.prior is not None else {}
    if prior.kind != "dense" or learned.get("temperature", prior.temperature) not in (None, 1.0):
        yield "retriever.prior: transformers' is the softmax of q·d, with temperature 1"


def _reading_faults(recipe: Recipe, generator: HFGenerator) -> Iterator[str]:
    kind, layout = generator.model.config.model_type, generator.prompt.layout
    if kind not in GENERATORS:
        yield f"generator {generator.settings.model!r}: its model is {kind!r}, a RAG checkpoint holds {' or '.join(GENERATORS)}"
    elif layout != "joined" or _separators(recipe.prompt) is None:
        yield (
            "prompt: transformers writes prefix, title, title_sep, text, doc_sep and question, in this order, which is not "
            f"template {recipe.prompt.template!r} of passages {recipe.prompt.passage!r} in layout {layout!r}"
        )


def _passage_encoder(recipe: Recipe, parts: Parts, home: Path | None) -> Path | None:
    """The passage encoder that belongs into the checkpoint: one that was tuned, or came in one. Others stay outside."""
    if parts.passage_encoder is not None:
        return parts.passage_encoder
    came = home is not None and recipe.knowledge.encoder.model == str(home / "passage_encoder")
    return Path(recipe.knowledge.encoder.model) if came else None


def _separators(prompt: PromptSettings) -> tuple[str, str, str] | None:
    """(prefix, title_sep, doc_sep) that say the same as template and passage; None where nothing does."""
    pieces = [(text, field) for text, field, _, _ in Formatter().parse(prompt.passage)]
    prefix, passages, rest = prompt.template.partition("{passages}")
    doc_sep, question, after = rest.partition("{question}")
    again = any(name in text for text in (prefix, doc_sep, after) for name in ("{question}", "{passages}"))
    if len(pieces) != 2 or [field for _, field in pieces] != ["title", "text"] or pieces[0][0]:
        return None
    return None if again or not passages or not question or after.strip() else (prefix, pieces[1][0], doc_sep)


def _objective(recipe: Recipe, trained: Collection[str] | None) -> MarginalObjective | None:
    """The last of these trainings, or of all, that marginalises."""
    aims = [stage.objective for name, stage in recipe.trainings().items() if trained is None or name in trained]
    return next((aim for aim in reversed(aims) if isinstance(aim, MarginalObjective)), None)


def _method(recipe: Recipe, kept: Mapping[str, Any], aim: MarginalObjective | None) -> str | None:
    """Sequence or token: as it was trained, else as it answers, else as it came."""
    if aim is not None:
        return str(aim.over)
    kind = recipe.decode.kind
    return kind.removeprefix("rag_") if kind.startswith("rag_") else _over(kept)


def _config(
    recipe: Recipe, kept: Mapping[str, Any], aim: MarginalObjective | None, questions: Mapping[str, Any],
    generator: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The kept config, or a new one, where it differs from the recipe."""
    separators = _separators(recipe.prompt)
    assert separators is not None
    method = _method(recipe, kept, aim)
    told = {
        "architectures": [name for name, over in MODELS.items() if over == method], "n_docs": recipe.retriever.k,
        "title_sep": separators[1], "doc_sep": separators[2], "max_combined_length": recipe.prompt.max_tokens,
        "retrieval_vector_size": vector_size(questions),
    }  # fmt: skip
    if aim is not None:
        told["label_smoothing"] = aim.label_smoothing
    parts: dict[str, Any] = {"question_encoder": dict(questions), "generator": dict(generator)}
    if not kept:
        same = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        shared: dict[str, Any] = {**parts, **{key: generator.get(key) for key in same}}
        new = json.loads(RagConfig(**shared).to_json_string(use_diff=False))
        return _changed({**new, **parts}, told, USUAL)
    return _of_today({**_changed(kept, told, USUAL), **{name: _of_today(part) for name, part in parts.items()}})


def _generator_config(recipe: Recipe, parts: Parts, kept: Mapping[str, Any], generator: HFGenerator) -> dict[str, Any]:
    """The generator's own config; one tuned here begins answers as it was tuned to."""
    separators = _separators(recipe.prompt)
    assert separators is not None
    config = dict(kept.get("generator") or json.loads(generator.model.config.to_json_string(use_diff=False)))
    if (config.get("prefix") or "") != separators[0]:
        config["prefix"] = separators[0]
    if (parts.generator or not kept) and len(generator.prefix) > 1:
        config["forced_bos_token_id"] = generator.prefix[1]
    return config


def _changed(kept: Mapping[str, Any], told: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """`kept` with what is told otherwise; what it leaves to the usual value stays unsaid."""
    return {**kept, **{key: value for key, value in told.items() if kept.get(key, usual.get(key)) != value}}


def _of_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is written is float32, whatever came; and transformers 5 has no way left to return the tuples of 2020."""
    told = {"dtype": "float32", "torch_dtype": "float32", "return_dict": True}
    return {**config, **{key: value for key, value in told.items() if config.get(key) is not None}}
