import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from byrote.lab.inspect.gates import GateTrace, record, to_html, to_terminal, visible
from byrote.nn.engram import Engram

TOKENS = ["<|bos|>", "The", " capital", " of", "\n", "\t", " ", "</script>", " Pa", "ris", ".\n"]


def trace(layers=2, streams=3):
    gates = np.random.default_rng(0).uniform(0.12, 0.88, (layers, len(TOKENS), streams)).astype(np.float32)
    return GateTrace(TOKENS, gates, [1, 5, 9][:layers])


def rendered(renderable, width=80, **options):
    console = Console(width=width, **options)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_saved_and_loaded(tmp_path):
    before = trace()
    before.save(tmp_path / "gates.json")
    after = GateTrace.load(tmp_path / "gates.json")
    assert after.tokens == before.tokens and after.layer_ids == before.layer_ids
    assert after.gates.dtype == np.float32 and np.array_equal(after.gates, before.gates)


def test_another_format_version_is_refused(tmp_path):
    path = tmp_path / "gates.json"
    trace().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7}))
    with pytest.raises(ValueError, match="format_version=7, this program reads 1: record"):
        GateTrace.load(path)


@pytest.mark.parametrize(("shape", "tokens"), [((1, 2), 2), ((1, 3, 1), 2), ((2, 2, 1), 2), ((1, 0, 1), 0)])
def test_gates_that_do_not_fit(shape, tokens):
    with pytest.raises(ValueError, match="gates has shape"):
        GateTrace(["a"] * tokens, np.zeros(shape), [0])


def test_white_space_is_visible():
    shown = [visible(token) for token in ("\n", "\t", "  ", " of", ".\r\n", "\x1b[0m", "", "日本")]
    assert shown == ["⏎", "⇥", "␣␣", " of", ".␍⏎", "\\u{1b}[0m", "∅", "日本"]


def test_scale_covers_the_gates_and_does_not_magnify_noise():
    low, high = trace().scale
    assert (low, high) == (0.1, 0.9)
    for constant in (0.5, 0.47, 1.0, 0.0):
        low, high = GateTrace(["a"], np.full((1, 1, 1), constant), [0]).scale
        assert low <= constant <= high and high - low == pytest.approx(0.1)


def test_terminal_shows_every_layer_within_the_width():
    text = rendered(to_terminal(trace()), width=40)
    assert "layer 1" in text and "layer 5" in text and "gate 0.1" in text
    assert text.count("<|bos|>The capital of⏎") == 2 and text.count("most open:") == 2
    assert max(map(len, text.splitlines())) <= 40


def test_terminal_colors_follow_the_gate():
    gates = np.array([[[0.0], [1.0]]])
    text = rendered(to_terminal(GateTrace(["low", "high"], gates, [0])), force_terminal=True, color_system="truecolor")
    body = next(line for line in text.splitlines() if line.count("48;2;") == 2 and "low" in line)
    assert re.findall(r"48;2;(\d+;\d+;\d+)m(\w+)", body) == [("38;43;49", "low"), ("244;185;66", "high")]


def test_page_holds_the_data_and_nothing_from_elsewhere():
    page = to_html(trace(), "Gates <of> a & b")
    assert "<title>Gates &lt;of&gt; a &amp; b</title>" in page and "{{" not in page
    assert not re.search(r"(src|href)=|https?:|@import|url\(", page)
    assert page.count("</script>") == 2  # the token that looks like one does not end the data
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    assert data["tokens"][7] == "</script>" and data["breaks"] == [4, 10]
    np.testing.assert_allclose(np.array(data["gates"]), trace().gates, atol=1e-4)


class Words:
    """A tokenizer of words."""

    bos_token_id = eos_token_id = None

    def __call__(self, text, **options):
        self.words = text.split()
        return {"input_ids": list(range(len(self.words)))}

    def decode(self, ids):
        return self.words[ids[0]]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(4))
        for i in (1, 3):
            self.layers[i].memory = Engram(16, 8, num_streams=2)
        self.seen = []

    def forward(self, input_ids):
        assert not self.training
        streams = self.embed(input_ids)[:, :, None].expand(-1, -1, 2, -1)
        for i in (1, 3):
            memory, rows = self.layers[i].memory, torch.randn(*input_ids.shape, 8)
            self.seen.append(memory.gates(streams, rows)[0])
            # The recorded pass is the second call of the two.
            streams = streams + memory(streams, rows)[0]
        return SimpleNamespace(logits=streams)


def test_record():
    torch.manual_seed(0)
    model = Model().train()
    recorded = record(model, Words(), "a b c d e")
    assert recorded.tokens == ["a", "b", "c", "d", "e"] and recorded.layer_ids == [1, 3]
    np.testing.assert_array_equal(recorded.gates, torch.stack(model.seen).numpy())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_record_needs_a_memory():
    with pytest.raises(ValueError, match="no Engram layer"):
        record(torch.nn.Linear(2, 2), Words(), "a")
