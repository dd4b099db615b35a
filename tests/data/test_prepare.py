"""Preparation: tokenizer, idempotence, the user's files, Hugging Face datasets."""

import json
import os

import numpy as np
import pytest
from transformers import AutoTokenizer

from byrote.data.documents import read_jsonl
from byrote.data.packing import Tokens
from byrote.data.prepare import Options, default_folder, prepare
from byrote.data.sources import PIECE, cut, file_documents, find_files
from byrote.data.tokenizer import encode_documents, load_tokenizer, train_tokenizer

WORDS = "the a of in memory model table row token river city north south old new large".split()  # noqa: SIM905


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 80)) + f". Item {i}\u00e9." for i in range(count)]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40)))
    return path


def test_tokenizer_is_deterministic_and_lossless(tmp_path):
    first, second = train_tokenizer(texts(50), 300), train_tokenizer(iter(texts(50)), 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert [first.bos_token_id, first.eos_token_id, first.pad_token_id, len(first)] == [0, 1, 2, 300]
    text = "Caf\u00e9 \u6c34\n  x <|eos|> y"
    [ids] = encode_documents(first, [text])
    assert ids[0] == 0 and ids[-1] == 1 and ids.dtype == np.int32
    assert not np.isin(ids[1:-1], [0, 1, 2]).any() and first.decode(ids[1:-1]) == text
    first.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded("the row").input_ids == [0, *encode_documents(first, ["the row"])[0][1:-1]]
    assert load_tokenizer(tmp_path / "tokenizer").pad_token_id == 2


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(texts(1), 258)
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "nowhere")


def test_prepare_writes_the_folder_and_is_idempotent(tmp_path, lines):
    options = Options(f"files:{lines}", vocab_size=280, validation=0.1)
    said = []
    meta = prepare(options, tmp_path / "out", lambda *what: said.append(what))
    assert said and meta["train"]["documents"] == 36 and meta["validation"]["documents"] == 4
    assert meta["licence"] == "your own" and meta["vocab_size"] == 280
    for part in ("train", "validation"):
        tokens, documents = (
            Tokens.open(tmp_path / "out", part),
            read_jsonl(tmp_path / f"out/documents.{part}.jsonl"),
        )
        assert len(tokens) == meta[part]["tokens"] and len(tokens.offsets) == len(documents) + 1
        assert sum(len(d.text.encode()) for d in documents) == meta[part]["bytes"]
        assert (tokens.tokens[tokens.offsets[:-1]] == 0).all() and (tokens.tokens[tokens.offsets[1:] - 1] == 1).all()
        assert tokens.predicted == len(tokens) - len(documents)
    said.clear()
    assert prepare(options, tmp_path / "out", lambda *what: said.append(what)) == meta and not said
    before = (tmp_path / "out/train.tokens.npy").read_bytes()
    prepare(Options(f"files:{lines}", vocab_size=290, validation=0.1), tmp_path / "out")
    prepare(options, tmp_path / "out", lambda *what: said.append(what))
    assert said and (tmp_path / "out/train.tokens.npy").read_bytes() == before
    said.clear()
    os.utime(lines, ns=(1, 1))
    prepare(options, tmp_path / "out", lambda *what: said.append(what))
    assert said


def test_prepare_with_a_tokenizer_of_the_users(tmp_path, lines):
    train_tokenizer(texts(50), 270).save_pretrained(tmp_path / "mine")
    meta = prepare(Options(f"files:{lines}", tokenizer=str(tmp_path / "mine")), tmp_path / "out")
    assert meta["vocab_size"] == 270


def test_prepare_errors(tmp_path, lines):
    with pytest.raises(ValueError, match="validation is 1"):
        Options(validation=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no prepared corpus"):
        prepare(Options(f"files:{lines}"), tmp_path / "full")
    with pytest.raises(ValueError, match="no text file matches"):
        prepare(Options("files:/nowhere/*.txt"), tmp_path / "out")
    with pytest.raises(ValueError, match="has no field 'body'; it has"):
        prepare(Options(f"files:{lines}", text_field="body"), tmp_path / "out")
    with pytest.raises(ValueError, match="run `byrote data` first"):
        Tokens.open(tmp_path / "out", "train")


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.txt").write_text("one")
    (tmp_path / "a/two.md").write_text("two")
    (tmp_path / "a/no.bin").write_bytes(b"\xff")
    assert [f.name for f in find_files([str(tmp_path / "a"), str(tmp_path / "**/*.txt")])] == [
        "one.txt",
        "two.md",
    ]
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        list(file_documents([tmp_path / "bad.txt"], "text"))
    long = "\n\n".join(["x" * 3000] * 20)
    pieces = list(cut(long))
    assert "\n\n".join(pieces) == long and all(len(piece) >= PIECE for piece in pieces[:-1]) and len(pieces) == 3
    assert default_folder("files:../a b/*.txt").as_posix() == "data/files-..-a-b--.txt"


def test_huggingface_dataset(tmp_path, lines, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    meta = prepare(Options(f"hf:json:{lines}", vocab_size=280), tmp_path / "out")
    assert meta["train"]["documents"] + meta["validation"]["documents"] == 40
    with pytest.raises(ValueError, match="has no column 'body'"):
        prepare(Options(f"hf:json:{lines}", text_field="body"), tmp_path / "other")
