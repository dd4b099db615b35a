"""The combination of embedding and streams, by the formula; and shifting."""

import torch
from torch import nn

from byrote.nn.hyper import MeanExit
from byrote.nn.mtp import PredictionModule, shift


class Double(nn.Module):
    def forward(self, streams, factor):
        return streams * factor, "else"


def make(streams=4):
    torch.manual_seed(0)
    module = PredictionModule(8, Double(), MeanExit())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module, torch.randn(2, 5, 8), torch.randn(2, 5, streams, 8)


def rms(x, gain):
    return x / (x.square().mean() + 1e-6).sqrt() * gain


def test_embedding_first_and_each_stream_by_itself():
    module, embeddings, streams = make()
    combined = module.combine(embeddings, streams)
    for b, t, n in ((0, 0, 0), (1, 4, 3), (0, 2, 1)):
        e, h = rms(embeddings[b, t], module.embed_norm.weight), rms(streams[b, t, n], module.hidden_norm.weight)
        expected = module.project.weight[:, :8] @ e + module.project.weight[:, 8:] @ h
        torch.testing.assert_close(combined[b, t, n], expected, atol=1e-5, rtol=1e-5)


def test_what_the_head_reads():
    module, embeddings, streams = make()
    hidden, output = module(embeddings, streams, 2.0)
    assert output[1] == "else"
    left = 2 * module.combine(embeddings, streams)
    torch.testing.assert_close(output[0], left)
    torch.testing.assert_close(hidden[1, 3], rms(left[1, 3].mean(dim=0), module.norm.weight), atol=1e-5, rtol=1e-5)


def test_the_residual_keeps_its_precision_under_autocast():
    module, embeddings, streams = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.project(torch.cat([streams, streams], dim=-1)).dtype == torch.bfloat16
        assert module.combine(embeddings, streams).dtype == torch.float32


def test_shift():
    values = torch.arange(1, 11).view(2, 5)
    assert shift(values, 2, empty=-100).tolist() == [[3, 4, 5, -100, -100], [8, 9, 10, -100, -100]]
    assert shift(values, 0).equal(values)
    assert shift(values, 7, empty=0).equal(torch.zeros_like(values))
    assert shift(values[..., None].float(), 4)[0, :, 0].tolist() == [5, 0, 0, 0, 0]
