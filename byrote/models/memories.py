"""The memories of a model as its config describes them, and what a decode state must hold for them."""

from __future__ import annotations

import numpy as np

from byrote.address.vocabulary import resize, vocabulary_digest
from byrote.memory import MemoryStack
from byrote.memory.state import Field
from byrote.models.configuration import MemoryConfig
from byrote.tables import RamTable


def make_memories(config: MemoryConfig, vocabulary: np.ndarray | None) -> MemoryStack | None:
    spec = config.spec
    if spec is None:
        return None
    identity = np.arange(config.vocab_size)
    if vocabulary is None and vocabulary_digest(identity) == spec.vocabulary_digest:
        vocabulary = identity
    elif vocabulary is not None:  # an embedding may be wider than its tokenizer
        vocabulary = resize(vocabulary, max(len(vocabulary), spec.vocab_size), spec.most_classes)

    def make_table(num_rows: int, layer_id: int) -> RamTable:
        return RamTable(
            num_rows,
            config.memory_row_width,
            digest=spec.digest,
            std=config.memory_initializer_range,
            seed=config.memory_seed + layer_id,
            codec=config.memory_codec,
        )

    return MemoryStack(spec, vocabulary, make_table)


def memory_fields(memories: MemoryStack | None, config: MemoryConfig) -> dict[str, Field]:
    """The tails of the memories and of their short convolutions, by the config: a layer may stand in a wrapper."""
    fields = {} if memories is None else memories.fields()
    length = (config.memory_kernel_size - 1) * (len(config.memory_table_sizes) + 1)
    width = config.hidden_size * (1 if config.memory_fusion == "single" else config.num_streams)
    for layer_id in config.memory_layers if length > 0 else ():
        fields[f"convolution.{layer_id}"] = Field(length, (width,), dtype=None)
    return fields
