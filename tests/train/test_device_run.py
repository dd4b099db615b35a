"""`train.placement = "device"`: a run with tables beside the dense part, here on the CPU."""

import shutil

import pytest
import torch

from byrote.data.prepare import prepare
from byrote.tables.placements.device import DeviceTable
from byrote.train.file_tables import tables
from byrote.train.run import make_trainer


def test_tables_on_a_device_need_one(make_recipe, corpus, tmp_path, monkeypatch):
    """`train.device = "cpu"` says that the CPU is meant; `auto` finds none."""
    meta = prepare(make_recipe().data.options, corpus / "prepared")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees none here"):
        make_trainer(make_recipe(placement="device"), tmp_path / "none", corpus / "prepared", meta)
    host = make_recipe(device="cpu", checkpoint_every=4, steps=5)
    make_trainer(host, tmp_path / "host", corpus / "prepared", meta).train()
    recipe = make_recipe(device="cpu", placement="device", checkpoint_every=4, steps=5)
    trainer = make_trainer(recipe, tmp_path / "device", corpus / "prepared", meta)
    assert all(isinstance(table, DeviceTable) for table in tables(trainer.model).values())
    trainer.train()
    shutil.rmtree(tmp_path / "device" / "checkpoints" / "step-000005")
    resumed = make_trainer(recipe, tmp_path / "device", corpus / "prepared", meta, resume=True)
    assert all(isinstance(table, DeviceTable) for table in tables(resumed.model).values())
    resumed.train()
    for file in ("model.safetensors", "table-1.safetensors", "row_state/row-state-1.safetensors"):
        paths = [tmp_path / name / "checkpoints" / "step-000005" / file for name in ("host", "device")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
