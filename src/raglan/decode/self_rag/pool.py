"""Contexts that were computed once, found again by their ids: no prefix passes through the model twice.

A level of the tree needs its hypotheses' histories, then its branches. Each is computed from the longest context that is there:
all of them in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from raglan.decode.self_rag.hypothesis import Ids, whole
from raglan.generator.base import Contexts

__all__ = ["Pool"]


class Pool:
    """Computed contexts by their ids."""

    def __init__(self, contexts: Contexts):
        self.contexts = contexts
        self.place = {tuple(ids): place for place, ids in enumerate(contexts.ids)}

    def reach(self, wanted: Sequence[Sequence[Ids]]) -> Pool:
        """These contexts, each given in pieces, from the longest prefix of whole pieces that is here. One pass, or none."""
        targets = {whole(pieces): self.longest(pieces) for pieces in wanted}
        places = [self.place[prefix] for prefix in targets.values()]
        if all(ids == prefix for ids, prefix in targets.items()):
            return self if len(places) == len(self.place) else Pool(self.contexts.only(places))
        return Pool(self.contexts.branch(places, [ids[len(prefix) :] for ids, prefix in targets.items()]))

    def longest(self, pieces: Sequence[Ids]) -> Ids:
        """The longest prefix of whole pieces that is here. Raises KeyError where not even the first piece is."""
        prefixes = [whole(pieces[:count]) for count in range(len(pieces), 0, -1)]
        found = next((prefix for prefix in prefixes if prefix in self.place), None)
        if found is None:
            raise KeyError(prefixes[-1][:8])
        return found
