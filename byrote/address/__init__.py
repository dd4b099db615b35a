"""WHERE: token ids to row ids. Integers only, no parameters and no floats."""

from byrote.address.contracts import CONTRACTS, deepseek_v41, engram
from byrote.address.hashing import canonical_ids, hash_rows, hash_windows, next_tail, windows
from byrote.address.spec import DEAD, AddressSpec, LayerAddress
from byrote.address.vocabulary import compress, normalize, vocabulary_digest

__all__ = [
    "CONTRACTS",
    "DEAD",
    "AddressSpec",
    "LayerAddress",
    "canonical_ids",
    "compress",
    "deepseek_v41",
    "engram",
    "hash_rows",
    "hash_windows",
    "next_tail",
    "normalize",
    "vocabulary_digest",
    "windows",
]
