"""The Engram layer against golden tensors, against a loop over positions, against itself cut into calls."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn import functional as F

from byrote.memory.sequence import carry
from byrote.nn.engram import Engram, Gate, UngatedMemory, convolve

GOLDEN = Path(__file__).parents[1] / "golden" / "engram_forward.safetensors"
CASES = ["branch4_n3", "branch1_n2", "zero_conv", "edge_gates", "short_T1"]
B, T, STREAMS, D, MEMORY = 2, 11, 2, 8, 6


def golden(case):
    with safe_open(GOLDEN, "pt") as file:
        names = [name for name in file.keys() if name.startswith(case + ".")]  # noqa: SIM118
        tensors = {name.removeprefix(case + "."): file.get_tensor(name) for name in names}
        return json.loads(file.metadata()["cases"])[case], tensors


def by_our_names(tensors, group, streams):
    """A group of the reference's parameters under the names and shapes of ours."""

    def gather(pattern):
        return torch.stack([tensors[f"{group}.{pattern.format(m)}"] for m in range(streams)])

    return {
        "key.weight": gather("key_projs.{}.weight").flatten(0, 1),
        "key.bias": gather("key_projs.{}.bias").flatten(),
        "value.weight": tensors[f"{group}.value_proj.weight"],
        "value.bias": tensors[f"{group}.value_proj.bias"],
        "key_gain": gather("norm1.{}.weight"),
        "query_gain": gather("norm2.{}.weight"),
        "conv_gain": gather("short_conv.norms.{}.weight"),
        "conv_weight": tensors[f"{group}.short_conv.conv.weight"].unflatten(0, (streams, -1)).squeeze(2),
    }


def close(got, expected, name, tolerance=2e-6):
    assert got.shape == expected.shape, name
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_golden_forward_and_gradients(case):
    config, tensors = golden(case)
    streams = config["hc_mult"]
    layer = Engram(
        config["hidden_size"],
        tensors["mid.embeddings"].shape[-1],
        num_streams=streams,
        kernel_size=config["kernel_size"],
        dilation=config["dilation"],
        bias=True,
    )
    layer.load_state_dict(by_our_names(tensors, "state", streams))
    hidden = tensors["input.hidden_states"].requires_grad_()
    table = tensors["state.multi_head_embedding.embedding.weight"].requires_grad_()
    rows = tensors["mid.hash_ids"] + tensors["state.multi_head_embedding.offsets"]
    embeddings = table[rows].flatten(2)
    addend, _ = layer(hidden, embeddings)
    close(layer.gates(hidden, embeddings), tensors["mid.gates"], "gates")
    close(addend, tensors["output"], "output")
    (addend * tensors["cotangent"]).sum().backward()
    close(hidden.grad, tensors["grad.hidden_states"], "grad hidden_states")
    close(table.grad, tensors["grad.multi_head_embedding.embedding.weight"], "grad rows")
    for name, expected in by_our_names(tensors, "grad", streams).items():
        close(layer.get_parameter(name).grad, expected, f"grad {name}")


def test_golden_gate_of_the_bf16_kernels():
    """TileKernels' reference: bf16 in and out, float32 inside; eps 1e-20; one stream state is zero."""
    config, tensors = golden("tilekernels_gate_eps1e-20")
    streams, keys, value, key_gain, query_gain = (
        tensors[f"input.{name}"].float().requires_grad_()
        for name in ("hidden_states", "k", "v", "weight_embed", "weight_hidden")
    )
    gate = Gate("sign", config["eps"])
    gates = gate(streams, keys, query_gain, key_gain)
    close(gates, tensors["mid.gate_score"], "gate_score", 1e-6)
    output = streams + gates[..., None] * value[:, None]
    close(output.bfloat16(), tensors["output"], "output", 2**-8)
    (output * tensors["cotangent"].float()).sum().backward()
    for name, leaf in (("hidden_states", streams), ("k", keys), ("v", value)):
        close(leaf.grad.bfloat16(), tensors[f"grad.{name}"], f"grad {name}", 2**-8)
    close(key_gain.grad, tensors["grad.weight_embed"], "grad weight_embed", 1e-5)
    close(query_gain.grad, tensors["grad.weight_hidden"], "grad weight_hidden", 1e-5)


@pytest.mark.parametrize(("rule", "expected"), [("sign", 0.5), ("copysign", 1 / (1 + math.exp(-1e-3)))])
def test_zero_gate_rule(rule, expected):
    layer = make(zero_gate_rule=rule)
    gates = layer.gates(torch.zeros(1, 1, STREAMS, D), torch.randn(1, 1, MEMORY))
    torch.testing.assert_close(gates, torch.full_like(gates, expected))
    streams, embeddings, *_ = inputs()
    torch.testing.assert_close(layer.gates(streams, embeddings), make().gates(streams, embeddings))


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = Engram(D, MEMORY, num_streams=STREAMS, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "gain" in name or "conv" in name:
                parameter.copy_(torch.randn_like(parameter))
    return layer


def inputs(seed=0, tokens=T, dead=0.3):
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(B, tokens, STREAMS, D, generator=generator)
    embeddings = torch.randn(B, tokens, MEMORY, generator=generator)
    alive = torch.rand(B, tokens, generator=generator) >= dead
    starts = torch.rand(B, tokens, generator=generator) < 0.2
    starts[:, 1:] |= ~alive[:, :-1]
    starts[:, 0] = True
    return streams, embeddings, alive, starts


def slow(layer, streams, embeddings, alive, starts):
    """The definition, one position at a time; the documents are found by walking back."""

    def rms(x, gain, eps):
        return x / (x.square().mean() + eps).sqrt() * gain

    addend = torch.zeros_like(streams)
    normed: dict[tuple[int, int, int], torch.Tensor] = {}
    for row in range(streams.shape[0]):
        for now in range(streams.shape[1]):
            if not alive[row, now]:
                continue
            keys, value = layer.key(embeddings[row, now]).view(-1, D), layer.value(embeddings[row, now])
            for m in range(streams.shape[2]):
                key = rms(keys[m], layer.key_gain[m], layer.gate.eps)
                s = (key * rms(streams[row, now, m], layer.query_gain[m], layer.gate.eps)).sum() / D**0.5
                gated = torch.sigmoid(s.sign() * s.abs().clamp_min(1e-6).sqrt()) * value
                addend[row, now, m] = gated
                if not layer.kernel_size:
                    continue
                normed[row, now, m] = rms(gated, layer.conv_gain[m], layer.conv_eps)
                total = torch.zeros(D)
                for tap in range(layer.kernel_size):
                    place = now - (layer.kernel_size - 1 - tap) * layer.dilation
                    between = range(place + 1, now + 1)
                    if place >= 0 and alive[row, place] and not any(starts[row, i] for i in between):
                        total = total + normed[row, place, m] * layer.conv_weight[m, :, tap]
                addend[row, now, m] = gated + F.silu(total)
    return addend


@pytest.mark.parametrize("options", [{}, {"kernel_size": 0}, {"kernel_size": 3, "dilation": 1, "bias": True}])
def test_equal_to_the_slow_twin_with_gradients(options):
    layer = make(**options)
    streams, embeddings, alive, starts = inputs()
    cotangent = torch.randn_like(streams)
    found = []
    for run in (lambda *a: layer(*a)[0], lambda *a: slow(layer, *a)):
        leaves = streams.clone().requires_grad_(), embeddings.clone().requires_grad_()
        layer.zero_grad()
        addend = run(*leaves, alive, starts)
        (addend * cotangent).sum().backward()
        found.append([addend, *(leaf.grad for leaf in leaves), *(p.grad for p in layer.parameters())])
    for fast, expected in zip(*found, strict=True):
        torch.testing.assert_close(fast, expected, atol=1e-5, rtol=1e-5)
    assert (found[0][0][~alive] == 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sets(st.integers(1, T - 1), max_size=5), st.sampled_from([0.0, 0.3, 0.7]))
def test_any_chunking_equals_the_whole(seed, cuts, dead):
    layer = make(dilation=2)
    streams, embeddings, alive, starts = inputs(seed, dead=dead)
    with torch.no_grad():
        whole, columns = layer(streams, embeddings, alive, starts)
        tail = torch.zeros(B, layer.tail_length, STREAMS * D)
        edges = [0, *sorted(cuts), T]
        for begin, end in itertools.pairwise(edges):
            part = [argument[:, begin:end] for argument in (streams, embeddings, alive, starts)]
            addend, read = layer(*part, tail)
            torch.testing.assert_close(addend, whole[:, begin:end])
            torch.testing.assert_close(read, columns[:, begin:end])
            tail = carry(tail, read, part[2], part[3], 0.0)


STEPS = [{}, {"kernel_size": 1}, {"kernel_size": 2, "dilation": 4}, {"bias": True, "zero_gate_rule": "copysign"}]


@pytest.mark.parametrize("options", STEPS)
def test_a_step_of_decoding(options):
    """Rows that go on, begin and are dead; a logit of zero; what is not finite stays in its row."""
    layer, rows = make(**options).eval(), 7
    streams, embeddings, tail = (
        torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3))
        for shape in ((1, STREAMS, D), (1, MEMORY), (layer.tail_length, STREAMS * D))
    )
    streams[5], streams[6, 0, 1, 2] = 0.0, float("nan")
    alive, starts = torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 1, dtype=torch.bool)
    alive[2], starts[1] = False, True
    step = streams, embeddings, alive, starts, tail
    with torch.no_grad():
        found = layer(*step)
    for one, learned in zip(found, layer(*step), strict=True):
        assert one[:6].isfinite().all() and one[6].isnan().any() and (one[2] == 0).all()
        assert torch.equal(one[:6], learned[:6]) and learned.requires_grad  # a backward is possible


def test_a_step_with_other_shapes_is_refused():
    layer, alive = make().eval(), torch.ones(2, 1, dtype=torch.bool)
    streams, embeddings = torch.randn(2, 1, STREAMS, D), torch.randn(2, 1, MEMORY)
    tail = torch.zeros(2, layer.tail_length, STREAMS * D)
    with torch.no_grad():
        for bad in (tail[:, 1:], tail[:1], tail[..., 1:]):
            with pytest.raises(RuntimeError, match=r"shape|size"):
                layer(streams, embeddings, alive, ~alive, bad)


def convolved_slowly(columns, taps, documents, dilation):
    z = torch.zeros_like(columns)
    for row, now in itertools.product(range(len(columns)), range(columns.shape[1])):
        for tap in range(len(taps)):
            place = now - (len(taps) - 1 - tap) * dilation
            if place >= 0 and documents[row, place] == documents[row, now]:
                z[row, now] += taps[tap] * columns[row, place]
    return z


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 12))
def test_convolution_by_its_definition(seed, kernel, dilation, tokens):
    generator = torch.Generator().manual_seed(seed)
    columns, taps = torch.randn(2, tokens, 2, 3, generator=generator), torch.randn(kernel, 2, 3, generator=generator)
    documents = (torch.rand(2, tokens, generator=generator) < 0.3).cumsum(1)
    found = convolve(columns, taps, documents, dilation)
    torch.testing.assert_close(found, convolved_slowly(columns, taps, documents, dilation))


def test_what_is_not_finite_stays_in_its_document():
    columns, taps = torch.randn(1, 6, 1, 4), torch.randn(2, 1, 4)
    columns[0, 1, 0, 2] = float("nan")
    z = convolve(columns, taps, torch.tensor([[0, 0, 0, 1, 1, 1]]), 1)[0]
    assert z[1:3, 0, 2].isnan().all() and z[3:].isfinite().all()
    assert convolve(columns, taps, torch.tensor([[0, 0, 1, 1, 1, 1]]), 1)[0, 2:].isfinite().all()


def test_packed_documents_equal_separate_ones_and_a_start_hides_the_tail():
    layer = make()
    streams, embeddings, *_ = inputs()
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, [0, 4, 5]] = True
    noise = torch.randn(B, layer.tail_length, STREAMS * D)
    packed, _ = layer(streams, embeddings, None, starts, noise)
    parts = [layer(streams[:, a:b], embeddings[:, a:b])[0] for a, b in ((0, 4), (4, 5), (5, T))]
    torch.testing.assert_close(packed, torch.cat(parts, 1))


def test_dead_tokens_leave_no_trace_in_values_or_gradients():
    layer = make()
    streams, embeddings, alive, starts = inputs()
    noisy = torch.where(alive[..., None], embeddings, 100.0).requires_grad_()
    expected, _ = layer(streams, embeddings, alive, starts)
    addend, _ = layer(streams, noisy, alive, starts)
    assert torch.equal(addend, expected) and (addend[~alive] == 0).all()
    addend.square().sum().backward()
    assert (noisy.grad[~alive] == 0).all()
    torch.testing.assert_close(layer(streams, embeddings, alive)[0], expected_without_starts(layer, alive))


def expected_without_starts(layer, alive):
    """Without `starts` a dead token alone is the boundary."""
    streams, embeddings, *_ = inputs()
    starts = torch.zeros_like(alive)
    starts[:, 1:] = ~alive[:, :-1]
    return layer(streams, embeddings, alive, starts)[0]


def test_convolution_starts_at_zero():
    layer = Engram(D, MEMORY, num_streams=STREAMS)
    streams, embeddings, *_ = inputs()
    addend, columns = layer(streams, embeddings)
    gates, value = layer.gates(streams, embeddings), layer.value(embeddings)
    assert torch.equal(addend, gates[..., None] * value[:, :, None])
    assert columns.shape == (B, T, STREAMS * D) and layer.tail_length == 9
    assert Engram(D, MEMORY, kernel_size=0).tail_length == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_computes_the_gate_in_float32(autocast):
    layer = make()
    streams, embeddings, alive, starts = inputs()
    expected, _ = layer(streams, embeddings, alive, starts)
    recorded = []
    layer.gate.register_forward_hook(lambda module, arguments, gates: recorded.append(gates))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            addend, columns = layer(streams, embeddings, alive, starts)
    else:
        arguments = streams.bfloat16(), embeddings.bfloat16(), alive, starts
        addend, columns = layer.bfloat16()(*arguments)
    assert recorded[0].dtype == torch.float32
    assert addend.dtype == columns.dtype == (torch.float32 if autocast else torch.bfloat16)
    torch.testing.assert_close(addend.float(), expected, atol=0.1, rtol=0.05)


def test_compiles_as_one_graph():
    layer = make()
    arguments = inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments)[0], layer(*arguments)[0])


def test_ungated_control():
    layer = UngatedMemory(D, MEMORY)
    streams, embeddings, alive, starts = inputs()
    addend, columns = layer(streams, embeddings, alive, starts)
    assert columns is None and (addend[~alive] == 0).all()
    torch.testing.assert_close(addend[alive][:, 1], layer.value(embeddings)[alive])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_gate_rule": "zero"}, "zero_gate_rule"),
        ({"kernel_size": -1}, "kernel_size"),
        ({"dilation": 0}, "dilation"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Engram(D, MEMORY, **options)
