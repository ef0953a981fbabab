"""How many training seeds stand behind a comparison of untuned and tuned.

    an interval      the luck of the questions
    the seeds        the luck of the training: the same recipe, trained and measured again with `seed=…`

An interval over questions says nothing of the second, so evaluation and report say how many seeds there are, or that there is
one. Runs of one recipe with several seeds lie side by side in runs/<name>; what else was changed is another comparison.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from raglan.artifact import MANIFEST, read_manifest
from raglan.evaluate import KIND, compared_systems, evaluation_folder
from raglan.recipe import Recipe
from raglan.stages import finished_parts

__all__ = ["ENOUGH", "over_seeds", "seed_lines"]

ENOUGH = 3  # seeds, from which on a comparison says something of their luck
Figures = Mapping[str, float]


def over_seeds(recipe: Recipe) -> dict[int, Figures]:
    """Training seed → after − before of each figure, for all seeds that this recipe was trained and measured with.

    Empty where nothing was trained, or nothing measured. Another seed counts if all else is as the recipe has it now.
    """
    systems = compared_systems(recipe) if recipe.evaluate is not None else []
    if len(systems) < 2:
        return {}
    tuned, seeds = systems[-1][0], {recipe.seed}
    for path in (recipe.run / "evaluations").glob(f"{tuned}-*/{MANIFEST}"):
        told = json.loads(path.read_text(encoding="utf-8"))
        seeds |= {told["seed"]} if told.get("system") == tuned and isinstance(told.get("seed"), int) else set()
    found = {seed: _differences(recipe.model_copy(update={"seed": seed}), tuned) for seed in sorted(seeds)}
    return {seed: figures for seed, figures in found.items() if figures is not None}


def _differences(recipe: Recipe, tuned: str) -> Figures | None:
    """Of one seed; None where it is not finished."""
    settings = recipe.evaluate
    assert settings is not None
    finished = finished_parts(recipe, warn=False)
    systems = [finished[0], finished[-1]]
    folders = [evaluation_folder(recipe, settings, *system) for system in systems]
    if systems[-1][0] != tuned or not all((folder / MANIFEST).is_file() for folder in folders):
        return None
    before, after = (read_manifest(folder, KIND)["figures"] for folder in folders)
    return {name: after[name]["mean"] - before[name]["mean"] for name in after if name in before}


def seed_lines(found: Mapping[int, Figures], name: str) -> list[str]:
    """In words: how many seeds, and one figure's difference by seed in points, where there are several."""
    if not found:
        return []
    listed = ", ".join(map(str, found))
    if len(found) == 1:
        return [f"one training seed ({listed}): the intervals say nothing of its luck; at least {ENOUGH} seeds would"]
    few = "" if len(found) >= ENOUGH else f"; at least {ENOUGH} are wanted"
    lines = [f"{len(found)} training seeds ({listed}){few}"]
    values = {seed: 100 * figures[name] for seed, figures in found.items() if name in figures}
    if values:
        each = ", ".join(f"{value:+.1f}" for value in values.values())
        lines.append(f"{name} by seed: {each}; mean {sum(values.values()) / len(values):+.1f}")
    return lines
