"""What a Self-RAG answer says of how it came about: plain numbers, strings and lists, ready for JSON.

form, retrieved            the form, and whether any passage was retrieved
decisions                  p_R, p_N, p_C, r, δ and the outcome, one a decision
prompt                     the question as ids; a candidate's own ids behind it are its `context`
candidates                 passage, rank, components, final score, flags, and why it was pruned
standings                  labels or options with what they come to, best first
levels                     long form: of each depth the candidates, which name their parent; `best` names the answers' ends
cost                       calls, positions computed and reused, ids generated, retrievals, passages, seconds
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from raglan.decode.self_rag.drawing import tree_lines
from raglan.decode.self_rag.rules import Decision
from raglan.decode.self_rag.work import Branch, Question, Written
from raglan.marked_prompt import MarkedPrompt

__all__ = ["branch_trace", "decision_trace", "finite", "raw_text", "short_trace", "told"]

PROBABILITIES = (("p(Retrieval)", "p_retrieve"), ("p(No Retrieval)", "p_no"), ("p(Continue)", "p_continue"))


def finite(value: float) -> float | None:
    """A number for JSON, which has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def raw_text(prompt: MarkedPrompt, ids: Sequence[int]) -> str:
    """A text with its reflection tokens spelled out, and without the end token."""
    schema = prompt.schema
    runs = groupby(ids, key=lambda token: token if token in schema.controls else None)
    return "".join(
        prompt.text(list(run)) if control is None else schema.spelling(control) * len(list(run)) for control, run in runs
    )


def decision_trace(decision: Decision) -> dict[str, Any]:
    """A decision. Probabilities are None where the reply lacked them."""
    return {
        "p_retrieve": finite(decision.yes), "p_no": finite(decision.no), "p_continue": finite(decision.cont),
        "r": finite(decision.r), "threshold": decision.threshold, "retrieve": decision.retrieve,
        "fallback": decision.fallback, "flags": list(decision.flags),
    }  # fmt: skip


def branch_trace(branch: Branch, written: Written | None, *, chosen: bool) -> dict[str, Any]:
    """A candidate: what was written to a branch, or why nothing was."""
    hit = branch.hit
    told: dict[str, Any] = {
        "passage": hit.passage.id if hit is not None else None, "title": hit.passage.title if hit is not None else "",
        "rank": hit.rank if hit is not None else None, "rel": branch.rel if hit is not None else None,
        "bound": finite(branch.bound), "pruned": branch.pruned, "chosen": chosen, "context": list(branch.ids),
    }  # fmt: skip
    if written is None:
        return told
    parts = written.parts
    return told | {
        "text": written.text, "raw": written.raw, "ids": list(written.marked.ids), "finish": written.marked.finish,
        "seq": finite(parts.seq), "rel": parts.rel if hit is not None else None, "sup": parts.sup, "use": parts.use,
        "final": finite(written.final), "logprob": finite(written.logprob), "flags": list(written.flags),
    }  # fmt: skip


def short_trace(
    question: Question, chosen: Written | None, *, flags: Sequence[str], standings: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """The whole story of one answer of the short form."""
    assert question.decision is not None
    every: list[tuple[Branch, Written | None]] = []
    for branch in question.branches:
        every += [(branch, one) for one in branch.written] or [(branch, None)]
    spent = question.spent
    return {
        "form": "short",
        "retrieved": question.retrieved,
        "decisions": [decision_trace(question.decision)],
        "prompt": list(question.prompt),
        "candidates": [branch_trace(branch, one, chosen=one is not None and one is chosen) for branch, one in every],
        "options": [[finite(p) for p in row] for row in question.each],
        "standings": [[label, finite(score)] for label, score in standings],
        "flags": list(flags),
        "cost": {
            "calls": spent.calls, "computed": spent.computed, "reused": spent.reused, "generated": spent.generated,
            "retrievals": int(question.retrieved), "passages": len(question.read), "seconds": round(spent.seconds, 6),
        },
    }  # fmt: skip


def told(trace: Mapping[str, Any]) -> list[str]:
    """A trace in lines for people: the decision, a line a candidate, labels or options, and the cost."""
    lines = [_decided(decision) for decision in trace["decisions"]]
    lines += [f"reworded, as nothing was relevant: {text!r}" for text in trace.get("reworded", ())]
    lines += [_candidate(candidate) for candidate in trace.get("candidates", ())]
    if trace["form"] == "long":
        lines += [f"{'*' if line.best else ' '} {'  ' * line.depth}{line.text}" for line in tree_lines(trace)]
    lines += [f"{label!r}: {_number(score)}" for label, score in trace.get("standings", ())]
    lines += [f"flags: {', '.join(trace['flags'])}"] if trace.get("flags") else []
    cost = trace["cost"]
    return [*lines, "cost: " + ", ".join(f"{name} {value:.4g}" for name, value in cost.items())]


def _decided(decision: Mapping[str, Any]) -> str:
    outcome = "retrieve" if decision["retrieve"] else "do not retrieve"
    outcome += f" ({decision['fallback']})" if decision["fallback"] else ""
    against = "the likeliest token" if decision["threshold"] is None else f"δ {decision['threshold']:.4g}"
    against += ", as decode.retrieve says whatever r is" if _set(decision) else ""
    masses = " ".join(f"{name} {_number(decision[key])}" for name, key in PROBABILITIES)
    return f"{outcome}: r {_number(decision['r'])} against {against}; {masses}"


def _set(decision: Mapping[str, Any]) -> bool:
    """Whether the outcome is none of r's doing: `always` below the threshold, or `never` above it."""
    r, threshold = decision["r"], decision["threshold"]
    if None in (r, threshold) or decision["fallback"] or decision.get("decision") == "continue":
        return False
    return bool(decision["retrieve"] != (r > threshold))


def _candidate(candidate: Mapping[str, Any]) -> str:
    mark = "*" if candidate["chosen"] else " "
    title = candidate["title"] or candidate["passage"]
    name = "without passage" if title is None else f"[{candidate['rank']}] {title}"
    if candidate["pruned"]:
        return f"{mark} {name}: rel {_number(candidate['rel'])}, left out ({candidate['pruned']})"
    if "final" not in candidate:
        return f"{mark} {name}: rel {_number(candidate['rel'])}"
    figures = " ".join(f"{name} {_number(candidate[name])}" for name in ("final", "seq", "rel", "sup", "use"))
    flags = f" ({', '.join(candidate['flags'])})" if candidate["flags"] else ""
    return f"{mark} {name}: {figures}{flags}: {candidate['raw']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
