"""A recipe: one YAML file, a whole experiment, checked before anything is computed.

All faults are reported at once, each with where it stands, its value, and the nearest valid name. `a.b.c=value` on the
command line overrides a key; `train.…` overrides every stage's training arguments too. Relative paths are relative to
the recipe's folder. `raglan schema` prints the JSON schema with which editors complete and check recipes.
"""

from raglan.recipe.load import load_recipe, recipe_schema
from raglan.recipe.settings import (
    AnswerObjective,
    BM25Index,
    ChunkSettings,
    ClassifyDecode,
    ConcatDecode,
    DecodeSettings,
    DenseIndex,
    EncoderSettings,
    EvaluateSettings,
    GeneratorSettings,
    HybridIndex,
    IndexSettings,
    KnowledgeSettings,
    LessonData,
    LsrObjective,
    MarginalObjective,
    PriorSettings,
    PromptSettings,
    QuestionData,
    RagSequenceDecode,
    RagTokenDecode,
    Recipe,
    RetrieverSettings,
    SampleSettings,
    StageSettings,
    StalenessSettings,
)

__all__ = [
    "AnswerObjective",
    "BM25Index",
    "ChunkSettings",
    "ClassifyDecode",
    "ConcatDecode",
    "DecodeSettings",
    "DenseIndex",
    "EncoderSettings",
    "EvaluateSettings",
    "GeneratorSettings",
    "HybridIndex",
    "IndexSettings",
    "KnowledgeSettings",
    "LessonData",
    "LsrObjective",
    "MarginalObjective",
    "PriorSettings",
    "PromptSettings",
    "QuestionData",
    "RagSequenceDecode",
    "RagTokenDecode",
    "Recipe",
    "RetrieverSettings",
    "SampleSettings",
    "StageSettings",
    "StalenessSettings",
    "load_recipe",
    "recipe_schema",
]
