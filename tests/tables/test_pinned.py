"""Tables in page-locked memory: those of RAM, and on a GPU (marker `gpu`) rows that it reads by itself."""

import importlib.util
import types
import weakref

import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.memory import prefetch
from byrote.tables import LazyAdam, RamTable
from byrote.tables.codecs import CODECS
from byrote.tables.placements.device import DeviceTable
from byrote.tables.placements.pinned import PinnedTable
from byrote.train.optimizer import Optimizer
from tests.tables.alike import assert_same_files, update_alike

GPU = torch.cuda.is_available()
ABOUT = {"digest": "", "std": 1.0, "seed": 3}


def all_pinned(model):
    return all(isinstance(memory.table, PinnedTable) for _, memory in model.memory_stack.items())


class Runtime:
    """What of the CUDA runtime is called, on a machine without one: it notes what is locked."""

    def __init__(self):
        self.locked = {}

    def cudaHostRegister(self, place, size, flags):
        assert place not in self.locked and size
        self.locked[place] = size

    def cudaHostUnregister(self, place):
        del self.locked[place]


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    return made


@pytest.mark.parametrize("codec", CODECS)
def test_updates_and_files_are_those_of_ram(codec, runtime, tmp_path):
    tables = [RamTable(300, 37, codec=codec, **ABOUT), PinnedTable(300, 37, codec=codec, **ABOUT)]
    tables.append(PinnedTable.of(RamTable(300, 37, codec=codec, **ABOUT)))
    update_alike(tables, LazyAdam(), 3)
    tables.append(PinnedTable.of(tables[0]))
    assert tables[0].rows.data_ptr() != tables[3].rows.data_ptr()  # a file's rows may be mapped
    assert_same_files(tables, tmp_path)


def test_memory_is_locked_once_and_given_back_with_the_table(runtime):
    table = PinnedTable(100, 8, codec="int8", **ABOUT)
    assert not runtime.locked  # nothing is drawn yet
    table.read(torch.tensor([1, 2]))
    table.write(torch.tensor([1]), torch.ones(1, 8))
    assert runtime.locked == {table.rows.data_ptr(): 100 * 12}
    gone = weakref.ref(table)
    del table
    assert gone() is None and not runtime.locked


def test_a_gpu_is_needed(monkeypatch, tmp_path):
    EngramForCausalLM(EngramConfig.from_preset("nano")).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for make in (
        lambda: PinnedTable(10, 4, **ABOUT),
        lambda: EngramForCausalLM.from_pretrained(tmp_path, placement="pinned"),
    ):
        with pytest.raises(ValueError, match="torch sees no GPU: use placement='host'"):
            make()


def test_a_model_keeps_its_tables_pinned(runtime, tmp_path):
    model = EngramForCausalLM(EngramConfig.from_preset("nano")).eval()
    model.save_pretrained(tmp_path)
    pinned = EngramForCausalLM.from_pretrained(tmp_path, placement="pinned")
    assert all_pinned(pinned) and not all_pinned(model)
    pinned.load_tables(tmp_path)
    assert all_pinned(pinned) and len(runtime.locked) == len(pinned.memory_stack.items())
    ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(input_ids=ids).logits, pinned(input_ids=ids).logits)


def test_what_a_gpu_reads_itself_is_queued_and_not_staged(monkeypatch):
    """On one queue, in order: the layer's stream waits for the read, which waits for the row ids."""
    happened = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"event of {self.name}"

        def wait_event(self, event):
            happened.append(f"{self.name} waits for {event}")

        def __enter__(self):
            happened.append(f"on {self.name}")

        def __exit__(self, *raised):
            happened.append("off")

    class Ids(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            happened.append(f"kept for {stream.name}")

    class Queued(DeviceTable):
        def read(self, rows):
            happened.append("read")
            return super().read(rows.as_subclass(torch.Tensor)).as_subclass(Ids)

    cuda = types.SimpleNamespace(current_stream=lambda device: Stream("layer"), stream=lambda stream: stream)
    monkeypatch.setattr(prefetch.torch, "cuda", cuda)
    monkeypatch.setattr(prefetch, "_stream", lambda device: Stream("side"))
    table, times = Queued(20, 4, device="cpu", **ABOUT), prefetch.Times()
    rows = torch.tensor([3, 5])
    reading = prefetch.Reading(table, rows.as_subclass(Ids), times)
    assert happened == ["on side", "side waits for event of layer", "read", "kept for side", "off"]
    values = reading.take()
    assert torch.equal(values.as_subclass(torch.Tensor), table.rows[rows])
    assert happened[5:] == ["layer waits for event of side", "kept for layer"]
    assert times.read == times.waited == 0  # the host cannot tell how long it took
    table.write(rows, torch.ones(2, 4))
    late = prefetch.Reading(table, rows.as_subclass(Ids), times)
    table.write(rows, torch.zeros(2, 4))
    assert late.take() is None


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("codec", CODECS)
def test_a_gpu_reads_the_rows(codec):
    """Without a GPU: the same kernel in Triton's interpreter."""
    host = RamTable(300, 40, codec=codec, **ABOUT)
    rows = torch.randint(0, 300, (3, 100), generator=torch.Generator().manual_seed(0))
    if GPU:
        assert torch.equal(PinnedTable.of(host).read(rows.cuda()).cpu(), host.read(rows))
        return
    from byrote.tables.loops.triton import decode

    values = decode(host.rows.view(torch.uint8), rows.flatten(), CODECS[codec], 40)
    assert torch.equal(values.view(3, 100, 40), host.read(rows))


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.gpu
def test_a_model_on_a_gpu_trains_as_with_tables_in_ram():
    outcomes = []
    for pinned in (False, True):
        torch.manual_seed(0)
        model = EngramForCausalLM(EngramConfig.from_preset("nano", memory_initializer_range=1.0)).cuda().train()
        if pinned:
            model.memory_stack.move("pinned")
        optimizer = Optimizer(model, lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=generator).cuda()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        table = model.memory_stack.items()[0][1].table
        outcomes.append(table.read(torch.arange(table.num_rows)))
    torch.testing.assert_close(*outcomes, atol=1e-4, rtol=1e-4)
