"""The tests of transformers that cannot hold for a class of ours, and why."""

from __future__ import annotations

from typing import NamedTuple


class Exclusion(NamedTuple):
    """`test`: how its name begins; `reason`: what a user of these classes should know."""

    test: str
    suites: tuple[str, ...]
    reason: str


ENGRAM = ("TestEngram", "TestEngramStreams", "TestEngramPrediction")
DLCM = ("TestDLCM", "TestDLCMMemory")

NOT_OURS = (
    Exclusion(
        "test_resize_tokens_embeddings",
        (*ENGRAM, "TestDLCMMemory"),
        "after resizing models it sets vocab_size in a config whose addresses are made for another number of ids: "
        "refused with the remedy, to derive them anew (resizing itself: tests/models/test_vocabulary_size.py)",
    ),
    Exclusion(
        "test_model_weights_reload_no_missing_tied_weights",
        (*ENGRAM, "TestDLCMMemory"),
        "it opens a folder whose weights are all gone: what says which tables belong to them is gone too, and tables "
        "of another model must not be taken, so the folder is refused (tests/models/test_saving.py)",
    ),
    Exclusion(
        "test_inputs_embeds",
        (*ENGRAM, "TestDLCMMemory"),
        "a memory is addressed by token ids, which embeddings do not tell: inputs_embeds alone are refused with the "
        "remedy, to pass input_ids beside them (tests/models/test_inputs.py)",
    ),
    Exclusion(
        "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
        (*ENGRAM, *DLCM),
        "it asks torch's attention for weights, which that does not make: they are refused with the remedy, "
        "attn_implementation='eager', and never None (tests/models/test_shown.py)",
    ),
    Exclusion(
        "test_model_outputs_equivalence",
        ("TestEngram", "TestEngramStreams"),
        "it asks torch's attention for weights (above); TestEngramPrediction, which is eager, takes it",
    ),
    Exclusion(
        "test_model_outputs_equivalence",
        DLCM,
        "it subtracts outputs from each other, which torch does not do with bool ones, `boundaries` and `alive`; "
        "tests/models/test_shown.py compares them",
    ),
)
