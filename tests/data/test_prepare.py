"""Preparation: tokenizer, idempotence, the user's files, Hugging Face datasets."""

import dataclasses
import json
import os

import numpy as np
import pytest
from transformers import AutoTokenizer

from byrote.data.documents import read_jsonl
from byrote.data.loader import Loader
from byrote.data.packing import Packer, Tokens
from byrote.data.prepare import Options, default_folder, prepare
from byrote.data.tokenizer import encode_documents, encode_prompt, load_tokenizer, shown, train_tokenizer

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
    os.utime(lines, ns=(1, 1))  # the same bytes
    assert prepare(options, tmp_path / "out", lambda *what: said.append(what)) == meta and not said
    before = (tmp_path / "out/train.tokens.npy").read_bytes()
    prepare(Options(f"files:{lines}", vocab_size=290, validation=0.1), tmp_path / "out")
    prepare(options, tmp_path / "out", lambda *what: said.append(what))
    assert said and (tmp_path / "out/train.tokens.npy").read_bytes() == before


def edit(path, old: str, new: str) -> None:
    """An edit that neither the size nor the time of a file tells of."""
    before = path.stat()
    assert old in path.read_text() and len(old) == len(new)
    path.write_text(path.read_text().replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["files", "hf", "tokenizer"])
def test_an_edit_is_noticed_and_a_run_does_not_go_on_with_another_text(tmp_path, lines, monkeypatch, kind):
    if kind == "hf":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train_tokenizer(texts(50), 270).save_pretrained(tmp_path / "mine")
    name = f"hf:json:{lines}" if kind == "hf" else f"files:{lines}"
    options = Options(name, tokenizer=str(tmp_path / "mine"))
    first, out = prepare(options, tmp_path / "out"), tmp_path / "out"
    assert first["vocab_size"] == 270
    state = Loader(Packer(Tokens.open(out, "train"), 2, 8, 0), 0).state_dict()
    assert prepare(options, out) == first
    if kind == "tokenizer":
        edit(tmp_path / "mine/tokenizer.json", '"<|pad|>"', '"<|pat|>"')
    else:
        edit(lines, "memory", "remory")
    second = prepare(options, out)
    assert second["fingerprint"] != first["fingerprint"]
    loader = Loader(Packer(Tokens.open(out, "train"), 2, 8, 0), 0)
    if second["train"]["tokens"] == first["train"]["tokens"]:
        with pytest.raises(ValueError, match=r"another text or tokenizer.*Resume with the text"):
            loader.load_state_dict(state)


def test_tokens_that_changed_are_another_corpus(tmp_path, lines):
    """An edit that leaves the number of tokens is found by the fingerprint."""
    options, out = Options(f"files:{lines}", vocab_size=259), tmp_path / "out"
    counts = prepare(options, out)["train"]
    state = Loader(Packer(Tokens.open(out, "train"), 2, 8, 0), 0).state_dict()
    edit(lines, "memory", "remory")
    assert prepare(options, out)["train"] == counts
    with pytest.raises(ValueError, match="another text or tokenizer"):
        Loader(Packer(Tokens.open(out, "train"), 2, 8, 0), 0).load_state_dict(state)
    edit(lines, "remory", "memory")
    prepare(options, out)
    Loader(Packer(Tokens.open(out, "train"), 2, 8, 0), 0).load_state_dict(state)
    tokens = np.load(out / "train.tokens.npy")
    tokens[7] += 1
    np.save(out / "train.tokens.npy", tokens)
    with pytest.raises(ValueError, match="another text or tokenizer"):
        Loader(Packer(Tokens.open(out, "train"), 2, 8, 0), 0).load_state_dict(state)


def test_a_prompt_is_encoded_as_training_text_is(tmp_path, lines):
    tokenizer = train_tokenizer(texts(50), 300)
    for text in ("the <|eos|> row", "<|bos|>", "a\u6c34b"):
        assert encode_prompt(tokenizer, text) == encode_documents(tokenizer, [text])[0][:-1].tolist()
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, "row") == encode_documents(tokenizer, ["row"])[0][:-1].tolist()
    with pytest.raises(ValueError, match="no Unicode text"):
        encode_prompt(tokenizer, "\udcff")


def test_characters_of_several_tokens_are_shown_whole():
    tokenizer = train_tokenizer(texts(50), 300)
    ids = encode_prompt(tokenizer, "the \u6c34\u8d64 row")
    pieces = shown(tokenizer, ids)
    assert "".join(pieces).replace("\u00b7", "") == "<|bos|>the \u6c34\u8d64 row" and len(pieces) == len(ids)


def test_only_what_was_made_here_is_replaced(tmp_path, lines, monkeypatch):
    options, out = Options(f"files:{lines}", vocab_size=280), tmp_path / "out"
    other = Options(f"files:{lines}", vocab_size=290)
    out.mkdir()
    for name, content in (("meta.json", '{"options": {}}'), ("thesis.tex", "years of work")):
        (out / name).write_text(content)
    with pytest.raises(ValueError, match=r"not empty and holds no prepared corpus.*--force"):
        prepare(options, out)
    assert (out / "thesis.tex").read_text() == "years of work"
    prepare(options, out, force=True)
    assert not (out / "thesis.tex").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt.*--force"):
        prepare(other, out)
    (out / "notes.txt").unlink()
    assert prepare(other, out)["vocab_size"] == 290  # made here, and nothing else in it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out"]
    (out / "train.tokens.npy").unlink()
    assert prepare(other, out)["vocab_size"] == 290 and (out / "train.tokens.npy").exists()
    with pytest.raises(ValueError, match="is a file; a corpus is a folder"):
        prepare(options, lines)
    monkeypatch.chdir(out)
    with pytest.raises(ValueError, match="holds the folder that you are in"):
        prepare(options, tmp_path, force=True)


@pytest.mark.parametrize("name", ["train.tokens.npy", "train.offsets.npy", "meta.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY", b"[1]"])
def test_a_damaged_corpus_is_named(tmp_path, lines, name, content):
    prepare(Options(f"files:{lines}", vocab_size=280), tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'out' / name} is damaged.*byrote data"):
        Tokens.open(tmp_path / "out", "train")


def test_a_code_corpus_is_left_as_it_is_and_prose_is_reported(tmp_path):
    (tmp_path / "src").mkdir()
    boilerplate = "# " + "the same long line of a licence in each file, " * 2
    for number in range(6):
        code = f"{boilerplate}\n\n\n\nX  = {number}\n\n{boilerplate}\n" + "Y = [\n    1,  2,\n]  \n\n" * (
            3000 if number == 3 else 1
        )
        (tmp_path / f"src/{number}.py").write_text(code)
        (tmp_path / f"src/{number}.md").write_text(f"* a\n\n\n    code  {number}  \n{boilerplate}\n")
        (tmp_path / f"src/{number}.txt").write_text(f"words  {number}\n{boilerplate}\n")
    said = []
    options = Options(f"files:{tmp_path}/src/*", vocab_size=280)
    meta = prepare(options, tmp_path / "out", lambda what, done, total: said.append(what))
    documents = {
        d.name: d.text for part in ("train", "validation") for d in read_jsonl(tmp_path / f"out/documents.{part}.jsonl")
    }
    for file in (tmp_path / "src").glob("*.[pm]*"):
        assert documents[f"{file.as_posix()}#0"] == file.read_text()
    assert documents[f"{tmp_path}/src/1.txt#0"] == "words 1"
    assert meta["cleaning"][".txt"]["documents_changed"] == 6 and meta["cleaning"][".txt"]["lines_dropped"] == 5
    assert meta["cleaning"][".py"]["documents"] == 6 and meta["cleaning"][".py"]["bytes_dropped"] == 0
    assert any(word.startswith("cleaning .txt: of 6 documents 6 changed") for word in said)
    assert any(word.startswith("cleaning .py: 6 documents") and "left as they are" in word for word in said)
    prepare(dataclasses.replace(options, clean=False), tmp_path / "out")
    assert f"words  1\n{boilerplate}\n" in [
        d.text for part in ("train", "validation") for d in read_jsonl(tmp_path / f"out/documents.{part}.jsonl")
    ]


def test_one_file_of_code_is_cut_without_loss(tmp_path):
    code = "".join(f"def f{i}():\n    return  {i}\n\n\n" for i in range(2000))
    (tmp_path / "x.py").write_text(code)
    prepare(Options(f"files:{tmp_path}/x.py", vocab_size=280), tmp_path / "out")
    pieces = [d for part in ("train", "validation") for d in read_jsonl(tmp_path / f"out/documents.{part}.jsonl")]
    assert "".join(d.text for d in sorted(pieces, key=lambda d: int(d.name.split("#")[1]))) == code


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


def test_the_folder_of_a_name():
    assert default_folder("files:../a b/*.txt").as_posix() == "data/files-..-a-b--.txt"


def test_huggingface_dataset(tmp_path, lines, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    meta = prepare(Options(f"hf:json:{lines}", vocab_size=280), tmp_path / "out")
    assert meta["train"]["documents"] + meta["validation"]["documents"] == 40
    with pytest.raises(ValueError, match="has no column 'body'"):
        prepare(Options(f"hf:json:{lines}", text_field="body"), tmp_path / "other")
    with pytest.raises(ValueError, match=r"hf:json:/nowhere\.json cannot be loaded"):
        prepare(Options("hf:json:/nowhere.json"), tmp_path / "other")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl row 1: 'text' is null"):
        prepare(Options(f"hf:json:{bad}"), tmp_path / "other")
