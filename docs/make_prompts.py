"""Write docs/concepts/synthesis-prompts.md from the prompt files: `python docs/make_prompts.py` (or `make docs`)."""

from __future__ import annotations

from pathlib import Path

from raglan.synthesis.endpoint import load_prompts
from raglan.synthesis.endpoint.prompts import STEPS

HEAD = """# What the teacher is asked

Generated from the files in [`synthesis/endpoint`](../../src/raglan/synthesis/endpoint) by `make docs`; do not edit. These are
all words that a teacher behind an endpoint is ever sent, beside a cell's factors and what other calls said. The hash names a
step's wording together with the notes and words of its language; it is in the record of every example, as
`metadata.synth.seen.prompts`; where a draft was given a style or an answer, the hash there names these words, too. A step's
system message is the same in every call. `synthesis.writing.prompts` names a folder with files of one's own.

Whoever writes passages sees facts and no question. Whoever answers sees `{prompt}`: question, instruction and passages as the
student will see them, and nothing else.
"""
NAMES = {"en": "English", "zh": "Chinese"}


def page() -> str:
    parts = [HEAD]
    for language, prompts in load_prompts().items():
        parts.append(f"## {NAMES[language]}\n")
        for step in STEPS:
            system, user = prompts.steps[step]
            told = "\n\n".join(f"```text\n{text}\n```" for text in (system, user))
            parts.append(f"### {step} ({language})\n\n`{prompts.hashes[step]}`\n\n{told}\n")
        notes = "\n".join(f"- `{name}` {text}" for name, text in prompts.notes.items())
        parts.append(f"### Notes of single cells ({language})\n\n{notes}\n")
        given = "\n\n".join(f"`{name}`\n\n```text\n{text}\n```" for name, text in prompts.given.items())
        parts.append(f"### What a draft is given ({language})\n\n{given}\n")
        words = "\n".join(f"- `{name}` {text}" for name, text in {**prompts.words, **prompts.languages}.items())
        parts.append(f"### Lengths and languages of passages ({language})\n\n{words}\n")
        families = "\n".join(
            f"- `{name}` {prompts.family_words[name]}: {', '.join(tasks)}" for name, tasks in prompts.families.items()
        )
        parts.append(f"### Families of tasks ({language})\n\n{families}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "concepts" / "synthesis-prompts.md").write_text(page(), encoding="utf-8")
