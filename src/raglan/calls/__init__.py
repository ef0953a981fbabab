"""Paid calls to a language model: each journalled before it is sent, none paid twice, none beyond the cap.

The one engine for teacher, judge and critic. `asks` what is asked and its key, `journal` the record that survives a kill,
`money` prices, reserves and the ledger, `limits` when a request may go, `classify` what came back, `structured` JSON out of
text, `endpoint` the wire, `engine` all of it together, `estimate` what the rest will cost.
"""

from raglan.calls.asks import Ask, Outcome, Usage
from raglan.calls.engine import CallEngine

__all__ = ["Ask", "CallEngine", "Outcome", "Usage"]
