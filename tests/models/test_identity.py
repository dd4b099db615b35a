"""A backbone knows its table: its age and its training; and a folder that is there is whole."""

import json
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from byrote import EngramForCausalLM
from tests.models.conftest import logits, make, tables, train


def identities(model) -> list[int]:
    return [table.identity for table in tables(model)]


def resave(folder, change) -> None:
    """The backbone, as another tool writes it."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_runs_of_one_age_are_told_apart(tmp_path, ids):
    """Of two seeds of the data; and forked from one folder, with other rates."""
    for name, settings in (("a", {"seed": 1}), ("b", {"seed": 2})):
        train(make(), **settings).save_pretrained(tmp_path / name)
    for name, rate in (("c", 1e-3), ("d", 2e-3)):
        forked = EngramForCausalLM.from_pretrained(tmp_path / "a")
        train(forked, steps=1, lr=rate).save_pretrained(tmp_path / name)
    for first, second in (("a", "b"), ("c", "d")):
        mixed = shutil.copytree(tmp_path / first, tmp_path / f"{first}{second}")
        shutil.copy(tmp_path / second / "table-1.safetensors", mixed)
        for placement in ("host", "file"):
            with pytest.raises(ValueError, match=r"table-1.*of different trainings.*take both from one"):
                EngramForCausalLM.from_pretrained(mixed, placement=placement)
    model = EngramForCausalLM.from_pretrained(tmp_path / "a")
    model.load_state_dict(EngramForCausalLM.from_pretrained(tmp_path / "b").state_dict())
    with pytest.raises(RuntimeError, match="of different trainings"):
        model(input_ids=ids)
    model.load_tables(tmp_path / "b")
    model(input_ids=ids)


def test_equal_runs_have_equal_identities(tmp_path):
    """Bit for bit, as rows; also one that was resumed."""
    whole, first = train(make(), steps=4), train(make(), steps=4)
    assert identities(whole) == identities(first) and len(set(identities(whole))) == 2
    assert identities(make()) == identities(make()) != identities(make(memory_seed=7))
    for steps in (2, 1):
        model = train(make(), steps=steps)
        assert identities(model) != identities(whole)
    model.save_pretrained(tmp_path)
    assert identities(EngramForCausalLM.from_pretrained(tmp_path)) == identities(model)
    assert identities(EngramForCausalLM.from_pretrained(tmp_path, placement="file")) == identities(model)


def older(folder) -> None:
    """A folder that was written before there were identities."""
    resave(folder, lambda state: {name: value for name, value in state.items() if "identity" not in name})
    for path in folder.glob("table-*.safetensors"):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        about = json.loads(header["__metadata__"]["byrote"])
        del about["identity"]
        header["__metadata__"]["byrote"] = json.dumps(about)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def test_folders_without_identities_go_by_the_generation(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    older(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-5, rtol=0)
    assert identities(loaded) == [0, 0]
    state = {name: value for name, value in model.state_dict().items() if "identity" not in name}
    loaded.load_state_dict(state)  # strict
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-5, rtol=0)
    train(loaded, steps=1).save_pretrained(tmp_path / "on")
    assert 0 not in identities(EngramForCausalLM.from_pretrained(tmp_path / "on"))


@pytest.mark.parametrize("placement", ["host", "file"])
def test_a_backbone_without_its_generation_is_taken_on_trust(model, ids, tmp_path, placement):
    model.save_pretrained(tmp_path)
    for part in ("identity", "generation"):
        resave(tmp_path, lambda state, part=part: {n: value for n, value in state.items() if part not in n})
    with pytest.warns(UserWarning, match=r"table-1\.safetensors: taken on trust"):
        loaded, info = EngramForCausalLM.from_pretrained(tmp_path, placement=placement, output_loading_info=True)
    assert "model.memories.memories.1.generation" in info["missing_keys"]
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert int(EngramForCausalLM.from_pretrained(tmp_path / "again").memory_stack.items()[0][1].generation) == 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shard", [None, "100KB"])
def test_a_save_that_is_killed_leaves_the_old_or_the_new_or_nothing(monkeypatch, tmp_path, ids, shard):
    """Before each change of a folder's entries; the folder holds another model already."""
    old, new = make(seed=1).eval(), train(make(seed=2), steps=1)
    before, after, seen, at = logits(old, ids), logits(new, ids), [], 0
    old.save_pretrained(tmp_path / "old", **({} if shard else {"max_shard_size": "100KB"}))
    acts = {(os, "replace"): os.replace, (pathlib.Path, "unlink"): pathlib.Path.unlink}
    while not seen or seen[-1] != "done":
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"{at}")
        with monkeypatch.context() as patch:
            left = iter(range(at))

            def act(*args, real, left=left, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return real(*args, **kwargs)

            for (owner, name), real in acts.items():
                patch.setattr(owner, name, lambda *args, real=real, act=act, **kwargs: act(*args, real=real, **kwargs))
            try:
                new.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
                seen.append("done")
            except Killed:
                seen.append("killed")
        try:
            found = logits(EngramForCausalLM.from_pretrained(folder), ids)
        except ValueError as error:
            assert seen[-1] == "killed" and "did not come to its end" in str(error)
        else:
            assert torch.equal(found, after if seen[-1] == "done" else before)
        at += 1
    assert seen.count("killed") > 5
    new.save_pretrained(tmp_path / "1")  # what is left of a save is in no one's way
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "1"), ids), after)
    assert not (tmp_path / "1" / ".saving").exists()
