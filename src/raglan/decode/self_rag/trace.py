"""What a Self-RAG answer says of how it came about: plain numbers, strings and lists, ready for JSON."""
