"""Fixtures that several packages use."""

import gc
import os

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels for a GPU run on the CPU

# Files that take longest begin first, so that no process is left alone with one of them in the end.
LONGEST = (
    "tables/test_log.py",
    "test_readme.py",
    "train/test_sharded_run.py",
    "lab/test_runner.py",
    "train/test_trainer.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


def pytest_collection_finish():
    gc.freeze()  # what was imported: a collection takes 0.4 s over all of it, and the stock Trainer asks for many


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def word_tokenizer():
    """64 words, `t0` .. `t63`, split at blanks; t0 pads."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(64)}, unk_token="t1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", unk_token="t1")
