"""Look inside a model: one file a question. Numbers in a dataclass, then terminal, JSON, page."""
