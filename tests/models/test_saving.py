"""A saved folder holds the whole model; what is missing, damaged or of another moment is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from byrote import EngramConfig, EngramForCausalLM
from byrote.models.engram import EngramModel
from byrote.tables import RamTable
from byrote.tables.files.checksums import verify
from byrote.tables.placements.file import FileTable
from tests.models.conftest import VOCABULARY, logits, make, tables, train


def biases(model):
    return {name: buffer for name, buffer in model.named_buffers() if "selection_bias" in name}


@pytest.mark.parametrize("load", [EngramForCausalLM, AutoModelForCausalLM])
def test_round_trip(model, ids, tmp_path, load):
    model.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is EngramForCausalLM and not loaded.training
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    for ours, theirs in zip(tables(loaded), tables(model), strict=True):
        assert torch.equal(ours.rows, theirs.rows) and ours.generation == theirs.generation == 3
    for name, bias in biases(loaded).items():
        assert torch.equal(bias, biases(model)[name]) and bias.any()


def test_saving_again_gives_the_same_bytes(model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    EngramForCausalLM.from_pretrained(first).save_pretrained(second)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_saving_over_the_folder_that_was_loaded(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = train(EngramForCausalLM.from_pretrained(tmp_path))
    expected = logits(loaded, ids)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_tables_are_not_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "table-1.safetensors",
        "table-2.safetensors",
    ]
    sizes = {table.num_rows for table in tables(model)}
    assert not any(sizes & set(value.shape) for value in model.state_dict().values())


def test_a_folder_has_a_config_only_when_it_is_whole(model, tmp_path, monkeypatch):
    def full_disk(folder):
        raise OSError("no space left")

    monkeypatch.setattr(model.model.memories, "save_tables", full_disk)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_other_ranks_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "rank-1", is_main_process=False)
    assert not list((tmp_path / "rank-1").glob("table-*"))


def test_half_precision(model, ids, tmp_path):
    """The router's bias moves by 0.001 a step: bfloat16 would lose it."""
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, bias in biases(loaded).items():
        assert bias.dtype == torch.float32 and torch.equal(bias, biases(model)[name])
    assert all(memory.generation.dtype == torch.int64 for _, memory in loaded.model.memories.items())
    assert torch.equal(loaded.model.memories.vocabulary, model.model.memories.vocabulary)
    assert torch.equal(tables(loaded)[0].rows, tables(model)[0].rows)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(loaded, ids).float(), expected, atol=0.1, rtol=0.1)
    loaded.save_pretrained(tmp_path / "half")
    again = EngramForCausalLM.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}  # the config says so
    for name, bias in biases(again).items():
        assert bias.dtype == torch.float32 and torch.equal(bias, biases(model)[name])


def test_shards(model, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = EngramForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_loading_info(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = EngramForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_pipeline_from_a_folder(model, word_tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    here = pipeline("text-generation", model=model, tokenizer=word_tokenizer, device="cpu")
    assert generate("t3 t4 t5", **options) == here("t3 t4 t5", **options)


def test_the_trunk_alone(model, ids, tmp_path):
    """AutoModel opens what EngramForCausalLM saved, tables too, and what the trunk itself saved."""
    model.save_pretrained(tmp_path / "whole")
    expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
    trunk = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(trunk) is EngramModel
    assert torch.equal(trunk(input_ids=ids, use_cache=False).last_hidden_state, expected)
    trunk.save_pretrained(tmp_path / "trunk")
    again = AutoModel.from_pretrained(tmp_path / "trunk")
    assert torch.equal(again(input_ids=ids, use_cache=False).last_hidden_state, expected)


def damage(name):
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-64])

    return cut


def swap(folder: Path) -> None:
    """The table of the other layer: other sizes."""
    (folder / "table-1.safetensors").write_bytes((folder / "table-2.safetensors").read_bytes())


DAMAGE = {
    "missing table": (
        lambda folder: (folder / "table-2.safetensors").unlink(),
        "table-2.safetensors: no such table",
    ),
    "truncated table": (damage("table-1.safetensors"), "table-1.safetensors: truncated"),
    "another layer's table": (swap, "table-1.safetensors: num_rows is"),
    "older table": (
        lambda folder: save_older(folder),
        "saved at generation 3 of its table, the table is at 0",
    ),
    "another seed's table": (lambda folder: save_other(folder), "table-1.safetensors: digest is"),
}


def save_older(folder: Path) -> None:
    tables(make())[0].save(folder / "table-1.safetensors")


def save_other(folder: Path) -> None:
    tables(make(memory_seed=4))[0].save(folder / "table-1.safetensors")


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_when_the_folder_is_opened(model, ids, tmp_path, spoil, message):
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        EngramForCausalLM.from_pretrained(tmp_path)
    expected = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        model.load_tables(tmp_path)
    assert torch.equal(logits(model, ids), expected)  # neither table was replaced


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"x" * 100])
@pytest.mark.parametrize("shards", [False, True])
def test_a_damaged_backbone_is_refused(model, tmp_path, content, shards):
    model.save_pretrained(tmp_path, max_shard_size="50KB" if shards else "1GB")
    path = sorted(tmp_path.glob("model*.safetensors"))[-1]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: "):
        EngramForCausalLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises((ValueError, OSError), match=path.name):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_a_backbone_that_another_tool_saved(model, ids, tmp_path):
    """Without metadata it opens as before; without the buffers that tie it to its tables it says what is missing."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights, path)
    opened = EngramForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened.eval(), ids), logits(model, ids))
    save_file({name: value for name, value in weights.items() if not name.endswith("vocabulary")}, path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: the weights lack .*\.vocabulary"):
        EngramForCausalLM.from_pretrained(tmp_path)
    save_file({name: value for name, value in weights.items() if not name.endswith("generation")}, path)
    with pytest.warns(UserWarning, match="taken on trust"):
        opened = EngramForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened.eval(), ids), logits(model, ids))


def test_a_plain_load_state_dict_is_found_at_the_next_forward(model, ids, tmp_path):
    other = make(seed=5)
    other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="generation 3 of its table, the table is at 0"):
        other(input_ids=ids)
    model.save_pretrained(tmp_path)
    other.load_tables(tmp_path)
    assert torch.equal(logits(other.eval(), ids), logits(model, ids))
    older = make().state_dict()
    model.load_state_dict(older)
    with pytest.raises(RuntimeError, match="generation 0 of its table, the table is at 3"):
        model(input_ids=ids)


def test_load_state_dict_with_assign(model, ids):
    other = make(seed=5)
    other(input_ids=ids)  # the generation has been checked once
    other.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="load_tables"):
        other(input_ids=ids)


def test_a_vocabulary_travels_with_the_model(ids, folded, tmp_path):
    model = train(make(vocabulary=folded))
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(loaded.model.memories.vocabulary, torch.from_numpy(folded))
    config = EngramConfig.from_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RuntimeError, match="vocabulary map is not set"):
        fresh(input_ids=ids)
    fresh.load_state_dict(model.state_dict())
    fresh.load_tables(tmp_path)
    assert torch.equal(logits(fresh.eval(), ids), logits(model, ids))


def test_weights_with_another_vocabulary_are_refused(ids, folded, tmp_path):
    model, other = make(vocabulary=folded), make(vocabulary=np.arange(VOCABULARY)[::-1] // 2)
    state = model.state_dict() | {"model.memories.vocabulary": other.model.memories.vocabulary}
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="vocabulary map has digest"):
        model(input_ids=ids)


def test_from_config_needs_no_tokenizer(ids):
    model = AutoModelForCausalLM.from_config(EngramConfig.from_preset("nano", vocab_size=VOCABULARY))
    assert model(input_ids=ids).logits.shape == (2, 12, VOCABULARY)


def test_the_meta_device_draws_no_rows():
    with torch.device("meta"):
        model = make(memory_table_sizes=[10**8, 10**8])
    assert all(table._rows is None and table.stats()["bytes"] > 10**9 for table in tables(model))


def test_opening_draws_no_rows(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)

    def rows(table):
        assert table._rows is not None, "rows were drawn"
        return table._rows

    monkeypatch.setattr(RamTable, "rows", property(rows))
    assert torch.equal(tables(EngramForCausalLM.from_pretrained(tmp_path))[0].rows, tables(model)[0].rows)


def test_another_placement_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"placement must be one of 'host', .*, got 'disk'"):
        EngramForCausalLM.from_pretrained(tmp_path, placement="disk")


def test_another_config_than_the_folder_has(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"memory_row_width": 16}))
    with pytest.raises((ValueError, RuntimeError), match=r"width is 8, the model needs 16|size mismatch|ismatched"):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_tables_stay_in_their_files(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "a")
    loaded = EngramForCausalLM.from_pretrained(tmp_path / "a", placement="file")
    assert all(isinstance(table, FileTable) for table in tables(loaded))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    for folder in ("b", "a"):  # over itself too
        loaded.save_pretrained(tmp_path / folder)
        for path in (tmp_path / "a").glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / folder / path.name).read_bytes()
    assert torch.equal(logits(loaded, ids), logits(EngramForCausalLM.from_pretrained(tmp_path / "a"), ids))


def test_training_tables_that_are_only_read_is_refused_and_changes_nothing(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, placement="file")
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    with pytest.raises(ValueError, match=r"reading only.*placement='host'.*train.placement='file'"):
        train(loaded)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    loaded.memory_stack.requires_grad_(False)
    loaded.zero_grad()
    train(loaded)
    after = loaded.state_dict()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(logits(loaded, ids), logits(loaded, ids)) and tables(loaded)[0].generation == 3


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-5])])
def test_a_missing_or_truncated_table_in_place(model, tmp_path, spoil):
    model.save_pretrained(tmp_path)
    spoil(tmp_path / "table-2.safetensors")
    with pytest.raises(ValueError, match=r"table-2.safetensors: (no such|truncated)"):
        EngramForCausalLM.from_pretrained(tmp_path, placement="file")


def test_checksums_on_request(model, tmp_path):
    model.save_pretrained(tmp_path, checksums=True)
    assert verify(tmp_path / "table-1.safetensors") == verify(tmp_path / "table-2.safetensors") == []
    train(model).save_pretrained(tmp_path)  # those of other bytes do not stay
    assert not list(tmp_path.glob("*.sums"))
    model.save_pretrained(tmp_path, checksums=True)
    assert len(list(tmp_path.glob("*.sums"))) == 2


@pytest.mark.parametrize("codec", ["bf16", "bf16-stochastic", "fp8", "int8", "int4"])
def test_a_codec_is_kept_with_the_config_and_trains(codec, ids, tmp_path):
    model = make(memory_codec=codec)
    before = [table.rows.clone() for table in tables(model)]
    train(model)
    assert all(not torch.equal(old, table.rows) for old, table in zip(before, tables(model), strict=True))
    model.save_pretrained(tmp_path)
    for placement in ("host", "file"):
        loaded = EngramForCausalLM.from_pretrained(tmp_path, placement=placement)
        assert loaded.config.memory_codec == codec
        assert {memory.table.codec for _, memory in loaded.memory_stack.items()} == {codec}
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match=r"memory_codec='fp7'.*'bf16-stochastic'"):
        EngramConfig.from_preset("nano", memory_codec="fp7")


def test_a_cache_changes_no_bit_and_is_for_files(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, placement="file", cache="100KB")
    for _ in range(3):
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    stats = [memory.table.stats() for _, memory in loaded.memory_stack.items()]
    assert all(0 < each["hits"] < 1 and each["cache_bytes"] <= 50_000 for each in stats)
    with pytest.raises(ValueError, match=r"reading only.*placement='host'"):
        train(loaded)
    with pytest.raises(ValueError, match=r"cache='1MB'.*placement='file'"):
        EngramForCausalLM.from_pretrained(tmp_path, cache="1MB")
    with pytest.raises(ValueError, match="a cache of '12 apples'"):
        EngramForCausalLM.from_pretrained(tmp_path, placement="file", cache="12 apples")
