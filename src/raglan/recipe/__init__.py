"""A recipe: one YAML file, a whole experiment, checked before anything is computed.

All faults are reported at once, each with where it stands, its value, and the nearest valid name. `a.b.c=value` on the
command line overrides a key; `train.…` overrides every stage's training arguments too. Relative paths are relative to
the recipe's folder. `raglan schema` prints the JSON schema with which editors complete and check recipes.
"""

from raglan.recipe.data import (
    DevTask,
    FeedbackData,
    InstructionMix,
    LessonData,
    LsrMixData,
    MixSource,
    QuestionData,
    Unanswerable,
)
from raglan.recipe.decode import (
    ABSTENTION,
    ClassifyDecode,
    ConcatDecode,
    DecodeSettings,
    EnsembleDecode,
    RagSequenceDecode,
    RagTokenDecode,
    SampleSettings,
    TurnSettings,
)
from raglan.recipe.grid import GridFolders, GridSettings, GridTask
from raglan.recipe.knowledge import (
    BM25Index,
    ChunkSettings,
    DenseIndex,
    EncoderSettings,
    HybridIndex,
    IndexSettings,
    KnowledgeSettings,
    VectorSettings,
)
from raglan.recipe.load import load_recipe, recipe_schema
from raglan.recipe.objective import (
    AnswerObjective,
    LearnedTurns,
    LsrObjective,
    MarginalObjective,
    StalenessSettings,
    TargetSettings,
)
from raglan.recipe.parts import (
    QA_PROMPTS,
    GeneratorSettings,
    PriorSettings,
    PromptSettings,
    RetrieveAgain,
    RetrieverSettings,
    RewriteSettings,
    ScorerSettings,
    SelfRagPromptSettings,
    Shot,
)
from raglan.recipe.self_rag import (
    CalibrationSettings,
    PruneSettings,
    RequireSettings,
    SelfRagDecode,
    WeightSettings,
)
from raglan.recipe.settings import EvaluateSettings, Recipe, StageSettings
from raglan.recipe.sweep import SweepSettings

__all__ = [
    "ABSTENTION",
    "QA_PROMPTS",
    "AnswerObjective",
    "BM25Index",
    "CalibrationSettings",
    "ChunkSettings",
    "ClassifyDecode",
    "ConcatDecode",
    "DecodeSettings",
    "DenseIndex",
    "DevTask",
    "EncoderSettings",
    "EnsembleDecode",
    "EvaluateSettings",
    "FeedbackData",
    "GeneratorSettings",
    "GridFolders",
    "GridSettings",
    "GridTask",
    "HybridIndex",
    "IndexSettings",
    "InstructionMix",
    "KnowledgeSettings",
    "LearnedTurns",
    "LessonData",
    "LsrMixData",
    "LsrObjective",
    "MarginalObjective",
    "MixSource",
    "PriorSettings",
    "PromptSettings",
    "PruneSettings",
    "QuestionData",
    "RagSequenceDecode",
    "RagTokenDecode",
    "Recipe",
    "RequireSettings",
    "RetrieveAgain",
    "RetrieverSettings",
    "RewriteSettings",
    "SampleSettings",
    "ScorerSettings",
    "SelfRagDecode",
    "SelfRagPromptSettings",
    "Shot",
    "StageSettings",
    "StalenessSettings",
    "SweepSettings",
    "TargetSettings",
    "TurnSettings",
    "Unanswerable",
    "VectorSettings",
    "WeightSettings",
    "load_recipe",
    "recipe_schema",
]
