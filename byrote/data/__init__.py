"""Text in, packed batches out: corpora, tokenizer, packing. Nothing here knows about models."""
