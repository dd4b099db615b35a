"""A small prepared corpus, and a recipe of seconds."""

import json
from pathlib import Path

import numpy as np
import pytest

from byrote.data.prepare import Options, prepare
from byrote.train.recipe import Recipe

WORDS = "the a of in memory model table row token river city north south old new large".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(5, 60)))) + f" {i}." for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(options(folder), folder / "prepared")
    return folder


def options(folder: Path) -> Options:
    return Options(f"files:{folder / 'texts.jsonl'}", vocab_size=280)


@pytest.fixture
def make_recipe(corpus):
    def make(model=None, **train) -> Recipe:
        settings = {
            "steps": 9,
            "batch_size": 8,
            "warmup": 3,
            "log_every": 1,
            "eval_every": 4,
            "sample_tokens": 4,
        }
        data = {
            "corpus": options(corpus).name,
            "vocab_size": 280,
            "folder": str(corpus / "prepared"),
            "length": 24,
        }
        return Recipe.from_dict(
            {"model": {"preset": "nano", **(model or {})}, "data": data, "train": {**settings, **train}}
        )

    return make
