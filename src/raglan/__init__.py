"""raglan trains the retriever and the generator of a retrieval-augmented system as one piece."""

__version__ = "0.1.0"
