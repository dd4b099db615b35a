import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from byrote import DLCMConfig, DLCMForCausalLM
from byrote.cli.main import app
from byrote.lab.inspect.concept_losses import TokenLosses, by_index, since_boundary, token_losses
from byrote.lab.inspect.concepts import SegmentTrace, record, to_html, to_terminal

TOKENS = ["The", " cat", " sat", "\n", "</script>", " on", " mat"]
P = np.array([1.0, 0.2, 0.7, 0.1, 0.5, 0.49, 0.3], dtype=np.float32)


def build(**fields) -> DLCMForCausalLM:
    torch.manual_seed(0)
    return DLCMForCausalLM(DLCMConfig(vocab_size=64, initializer_range=0.2, **fields)).eval()


def test_segments_of_both_conventions():
    assert SegmentTrace(TOKENS, P, 0.5, opens=False).segments == [[0], [1, 2], [3, 4], [5, 6]]
    assert SegmentTrace(TOKENS, P, 0.5, opens=True).segments == [[0, 1], [2, 3], [4, 5, 6]]
    assert SegmentTrace(TOKENS, P, 0.99, opens=True).segments == [list(range(7))]


def test_terminal_shows_every_token_once():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(to_terminal(SegmentTrace(TOKENS, P, 0.5, opens=False)))
    shown = capture.get()
    assert "7 tokens, 3 concepts, 2.33 tokens a concept" in shown and "The cat sat⏎" in shown
    assert "least sure: </script> 0.500 @4   on 0.490 @5" in shown


def test_page_cannot_be_broken_out_of():
    page = to_html(SegmentTrace(TOKENS, P, 0.5, opens=False), "<b>title</b>")
    assert page.count("</script>") == 2 and "<b>title" not in page and "{{" not in page


def test_recorded_as_the_model_cuts(word_tokenizer):
    model = build()
    text = "t5 t6 t7 t8 t5 t9"
    trace = record(model, word_tokenizer, text)
    ids = torch.tensor([word_tokenizer(text)["input_ids"]])
    found = model(input_ids=ids, use_cache=False)
    assert np.array_equal(trace.boundaries, found.boundaries[0].numpy())
    assert [place for segment in trace.segments for place in segment] == list(range(ids.shape[1]))
    assert not model.training


def test_without_concepts_there_is_nothing_to_show(word_tokenizer):
    with pytest.raises(ValueError, match="the model has no concepts"):
        record(build(num_concept_layers=0, num_decoder_layers=0), word_tokenizer, "t5")
    with pytest.raises(ValueError, match="the text has no tokens"):
        record(build(), word_tokenizer, "")


def test_command(tmp_path, word_tokenizer):
    build().save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["concepts", str(tmp_path), "t5 t6 t7", "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "tokens a concept" in result.output and "<!doctype html>" in (tmp_path / "page.html").read_text()


def test_tokens_since_the_boundary():
    boundaries = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    assert since_boundary(boundaries).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


def test_losses_of_tokens_add_up_to_the_loss():
    model = build()
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 4] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(12).expand(3, -1)}
    found = token_losses(model, [batch])
    assert len(found.nats) == len(found.index) == 3 * 10
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
    assert float(found.nats.mean()) == pytest.approx(float(expected), abs=1e-5)


def test_losses_by_index():
    ours = TokenLosses(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 1, 0, 3]))
    theirs = TokenLosses(torch.tensor([2.0, 2.0, 2.0, 4.0]), None)
    assert by_index(ours, theirs) == [(0, 2, 2.0, 2.0), (1, 1, 2.0, 2.0), (3, 1, 5.0, 4.0)]
