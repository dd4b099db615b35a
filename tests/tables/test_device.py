"""Tables on a device: the bytes, updates and files of RAM. On the CPU here; on a GPU under the marker `gpu`."""

import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.tables import LazyAdam, RamTable, RowAdagrad, SinkhornMomentum, rules
from byrote.tables.codecs import CODECS
from byrote.tables.placements import device
from byrote.tables.placements.device import DeviceTable
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.open import PLACEMENTS, Placement
from byrote.train.optimizer import Optimizer
from tests.tables.alike import assert_same_files, update_alike

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RULES = [LazyAdam(), LazyAdam(max_norm=0.5), RowAdagrad(), SinkhornMomentum()]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rule", RULES)
def test_updates_are_those_of_ram_to_the_bit(rule, codec, compiled, monkeypatch, tmp_path):
    """`compiled` False: the plain rule, which is what runs on an accelerator."""
    if not compiled:
        monkeypatch.setattr(rules, "numba_is_there", lambda: False)
    kwargs = {"digest": "", "std": 1.0, "seed": 3, "codec": codec}
    tables = [RamTable(300, 37, **kwargs), DeviceTable(300, 37, device="cpu", **kwargs)]
    update_alike(tables, rule, 4)
    tables.append(DeviceTable.of(tables[0], "cpu"))
    assert_same_files(tables, tmp_path)


def test_a_device_that_is_not_the_cpu_takes_the_plain_rule(monkeypatch):
    """Nothing is moved to the host for a compiled loop."""
    table = DeviceTable(10, 4, device="cpu", digest="")
    table.device = torch.device("cpu", 0)  # stands for another device: it is not the one that loops are compiled for
    monkeypatch.setattr(LazyAdam, "update_in_place", lambda *args: pytest.fail("a compiled rule ran"))
    table.update(LazyAdam(), torch.tensor([1]), torch.ones(1, 4), 0.1)
    assert table.stats()["rows_touched"] == 1


def tiny(seed: int = 0) -> EngramForCausalLM:
    torch.manual_seed(seed)
    return EngramForCausalLM(EngramConfig.from_preset("nano", memory_initializer_range=1.0))


def train(model: EngramForCausalLM, steps: int, where: str = "cpu") -> EngramForCausalLM:
    optimizer = Optimizer(model.to(where).train(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=generator).to(where)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_model_trains_as_in_ram(tmp_path):
    host, moved = tiny(), tiny()
    moved.memory_stack.move("device", "cpu")
    tables = [model.memory_stack.items()[0][1].table for model in (moved, host)]
    assert [type(table) for table in tables] == [DeviceTable, RamTable] and tables[0].device == torch.device("cpu")
    for name, model in (("host", host), ("moved", moved)):
        train(model, 3).save_pretrained(tmp_path / name)
        model.save_row_state(tmp_path / name)
    for file in ("model.safetensors", "table-1.safetensors", "row-state-1.safetensors"):
        assert (tmp_path / "host" / file).read_bytes() == (tmp_path / "moved" / file).read_bytes()
    moved.load_tables(tmp_path / "host")  # it stays where it was
    assert isinstance(moved.memory_stack.items()[0][1].table, DeviceTable)


def test_an_accelerator_is_needed(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch sees none here: use placement='host'"):
        EngramForCausalLM.from_pretrained(tmp_path / "model", placement="device")
    monkeypatch.undo()
    on_cpu = Placement(lambda tables, _: [DeviceTable.of(table, "cpu") for table in tables])
    monkeypatch.setitem(PLACEMENTS, "device", on_cpu)
    table = EngramForCausalLM.from_pretrained(tmp_path / "model", placement="device").memory_stack.items()[0][1].table
    assert isinstance(table, DeviceTable) and table.device == torch.device("cpu")


def test_only_tables_in_ram_move(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    opened = EngramForCausalLM.from_pretrained(tmp_path, placement="file")
    assert isinstance(opened.memory_stack.items()[0][1].table, FileTable)
    with pytest.raises(ValueError, match="a FileTable cannot be moved: only tables in RAM"):
        opened.memory_stack.move("device", "cpu")


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("codec", CODECS)
    def test_rows_and_files_equal_the_cpu(self, codec, tmp_path):
        kwargs = {"digest": "", "std": 1.0, "seed": 3, "codec": codec}
        tables = [RamTable(300, 37, **kwargs), DeviceTable(300, 37, device=device.accelerator(), **kwargs)]
        rows, values = torch.randperm(300)[:50], torch.randn(50, 37)
        for table in tables:
            table.write(rows, values, {"moment": values})
        assert_same_files(tables, tmp_path)
        there = torch.arange(300, device="cuda").view(3, 100)
        assert torch.equal(tables[1].read(there).cpu(), tables[0].read(there.cpu()))

    def test_a_model_trains(self):
        host, moved = tiny(), tiny().cuda()
        moved.memory_stack.move("device", device.accelerator())
        rows = torch.arange(host.memory_stack.items()[0][1].table.num_rows)
        values = [train(m, 3, "cuda").memory_stack.items()[0][1].table.read(rows) for m in (host, moved)]
        torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)
