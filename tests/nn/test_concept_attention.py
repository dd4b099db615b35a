"""Attention from tokens to concepts: kernels against loops and against one another, and the two weightings."""

import copy
import math

import pytest
import torch

from byrote.nn.concept_attention import (
    NOWHERE,
    WEIGHTINGS,
    ConceptAttention,
    Places,
    dense,
    flex,
    replicated,
    sdpa,
    varlen,
)

ROWS, TOKENS, HEADS, GROUPS, DIM = 3, 24, 4, 2, 8


def place(boundaries, starts, alive):
    """Places of tokens without a past; documents are named by where they start."""
    steps = torch.arange(boundaries.shape[1]).expand_as(boundaries)
    document = torch.where(starts, steps, -1).cummax(dim=1).values
    position = torch.where(document >= 0, steps - document, 0)
    document = torch.where(alive, document, NOWHERE - 1)
    most = int(boundaries.sum(dim=1).max())
    places = [torch.full((len(boundaries), most), NOWHERE) for _ in range(2)]
    for row, formed in enumerate(boundaries):
        for kept, values in zip(places, (document, position), strict=True):
            kept[row, : int(formed.sum())] = values[row, formed]
    return Places(document, position, *places)


def make(packed, padded, seed=0):
    """Random boundaries, rows of two documents if `packed`, with padding on either side if `padded`."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    starts = torch.zeros_like(alive)
    starts[:, 0] = True
    if padded:
        alive[1, :5] = False
        alive[2, 19:] = False
        starts[1, 0], starts[1, 5] = False, True
    if packed:
        starts[0, 9] = starts[1, 14] = starts[2, 1] = True
    boundaries = ((torch.rand(ROWS, TOKENS, generator=generator) < 0.3) | starts) & alive
    places = place(boundaries, starts, alive)
    most = places.concept_document.shape[1]
    query = torch.randn(ROWS, HEADS, TOKENS, DIM, generator=generator)
    key, value = torch.randn(2, ROWS, GROUPS, most, DIM, generator=generator)
    return query, key, value, places, alive, boundaries


def loop(query, key, value, places, boundaries, weighting):
    """Token by token: count for how many tokens each concept was the newest, then weigh the scores."""
    out = torch.zeros_like(query)
    for row in range(ROWS):
        counts, document, at = {}, None, 0
        for t in range(TOKENS):
            if places.token_document[row, t] < 0:
                continue
            if places.token_document[row, t] != document:
                counts, document = {}, places.token_document[row, t]
            if boundaries[row, t]:
                counts[at] = 0
                at += 1
            counts[at - 1] += 1
            seen = torch.tensor(list(counts))
            weights = torch.tensor([float(n) for n in counts.values()])
            for head in range(HEADS):
                group = head * GROUPS // HEADS
                shares = (key[row, group, seen] @ query[row, head, t] / math.sqrt(DIM)).exp()
                if weighting == "replicated":
                    shares = shares * weights
                out[row, head, t] = (shares / shares.sum()) @ value[row, group, seen]
    return out


SHAPES = pytest.mark.parametrize(("packed", "padded"), [(False, False), (True, False), (False, True), (True, True)])


@SHAPES
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_dense_and_sdpa_against_a_loop(packed, padded, weighting):
    query, key, value, places, alive, boundaries = make(packed, padded)
    expected = loop(query, key, value, places, boundaries, weighting)
    for kernel in (dense, sdpa):
        out = kernel(query, key, value, places, weighting)
        assert out.isfinite().all()
        torch.testing.assert_close(out * alive[:, None, :, None], expected, atol=1e-5, rtol=0)


def values_and_gradients(run, tensors, alive):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = run(*leaves) * alive[:, None, :, None]
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@SHAPES
def test_replicated_keys_are_log_counts(packed, padded):
    """Equation 17 to the letter = the ragged form with log n_k(t) added, by both kernels; uniform is another."""
    *tensors, places, alive, _ = make(packed, padded)
    letter = values_and_gradients(lambda *x: replicated(*x, places), tensors, alive)
    for kernel in (dense, sdpa):
        ragged = values_and_gradients(lambda *x, k=kernel: k(*x, places, "replicated"), tensors, alive)
        for ours, theirs in zip(ragged, letter, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        uniform = values_and_gradients(lambda *x, k=kernel: k(*x, places, "uniform"), tensors, alive)
        assert (uniform[0] - letter[0]).abs().max() > 0.01


@SHAPES
def test_kernels_agree_on_gradients(packed, padded):
    *tensors, places, alive, _ = make(packed, padded, seed=1)
    for weighting in WEIGHTINGS:
        results = [
            values_and_gradients(lambda *x, k=kernel, w=weighting: k(*x, places, w), tensors, alive)
            for kernel in (dense, sdpa)
        ]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@torch.no_grad()
def test_flex(weighting):
    query, key, value, places, alive, _ = make(packed=True, padded=True)
    mask = alive[:, None, :, None]
    out = flex(query, key, value, places, weighting)
    torch.testing.assert_close(out * mask, dense(query, key, value, places, weighting) * mask, atol=1e-5, rtol=0)


def test_flex_has_no_backward_on_a_cpu():
    query, key, value, places, *_ = make(packed=False, padded=False)
    with pytest.raises(ValueError, match=r"kernel='flex' has no backward on a CPU: use 'sdpa'"):
        flex(query, key.requires_grad_(), value, places, "replicated")


def test_varlen_says_what_it_is_for():
    query, key, value, places, *_ = make(packed=False, padded=False)
    for weighting in WEIGHTINGS:
        with pytest.raises(ValueError, match=rf"weighting='{weighting}', torch.float32 on cpu: use 'sdpa'"):
            varlen(query, key, value, places, weighting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_past", [False, True])
def test_varlen(with_past):
    """Also for tokens that have a past, which it leaves to another kernel."""
    *tensors, places, alive, _ = make(packed=True, padded=True)
    tensors = [tensor.cuda().bfloat16() for tensor in tensors]
    places = Places(*(x.cuda() for x in vars(places).values()))
    if with_past:
        tensors[0], alive = tensors[0][:, :, 12:], alive[:, 12:]
        places = Places(
            places.token_document[:, 12:],
            places.token_position[:, 12:],
            places.concept_document,
            places.concept_position,
        )
    ours, theirs = (
        values_and_gradients_on_cuda(lambda *x, k=kernel: k(*x, places, "replicated"), tensors, alive)
        for kernel in (varlen, dense)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=3e-2, rtol=3e-2)


def values_and_gradients_on_cuda(run, tensors, alive):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = run(*leaves) * alive[:, None, :, None].cuda()
    out.float().square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@SHAPES
def test_counts_of_places(packed, padded):
    """What a token sees and how often, counted; documents and padding see nothing of one another."""
    *_, places, alive, boundaries = make(packed, padded)
    seen, counts, newest = places.visible(), places.multiplicity(), places.newest()
    for row in range(ROWS):
        formed = boundaries[row].nonzero().squeeze(1).tolist()
        for t in alive[row].nonzero().squeeze(1).tolist():
            same = [k for k, s in enumerate(formed) if places.token_document[row, s] == places.token_document[row, t]]
            visible = [k for k in same if formed[k] <= t]
            assert seen[row, t].nonzero().squeeze(1).tolist() == visible
            ends = {k: formed[k + 1] if k + 1 in same else TOKENS for k in visible}
            wanted = [min(t + 1, ends[k]) - formed[k] for k in visible]
            assert counts[row, t, visible].tolist() == wanted and newest[row, t] == visible[-1]
            assert sum(wanted) == places.token_position[row, t] + 1
    assert not seen[~alive].any()


def test_who_has_a_past():
    *_, places, _, _ = make(packed=True, padded=False)

    def cut(first):
        tokens = places.token_document[:, first:], places.token_position[:, first:]
        rest = Places(*tokens, places.concept_document, places.concept_position)
        begins = torch.ones_like(tokens[0], dtype=torch.bool)
        begins[:, 1:] = tokens[0][:, 1:] != tokens[0][:, :-1]
        return rest.goes_on(begins)

    assert not cut(0)
    assert cut(1) and cut(15)
    alone = Places(*(x[:1] for x in vars(places).values()))
    begins = torch.ones(1, TOKENS - 9, dtype=torch.bool)
    begins[:, 1:] = False  # a document that starts with the tokens at hand, behind the concepts of another
    fresh = Places(alone.token_document[:, 9:], alone.token_position[:, 9:], *list(vars(alone).values())[2:])
    assert not fresh.goes_on(begins)


def layer(**options):
    torch.manual_seed(0)
    module = ConceptAttention(16, 24, HEADS, GROUPS, DIM, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return module


def test_the_whole_layer_by_its_formula():
    """Norms on inputs and on each head, no positions: written out for one row."""
    module = layer(weighting="uniform", kernel="dense")
    *_, places, alive, boundaries = make(packed=False, padded=False)
    h, z = torch.randn(ROWS, TOKENS, 16), torch.randn(ROWS, places.concept_document.shape[1], 24)
    out = module(h, *module.keys(z), places)

    def norm(gain, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain.weight

    query = module.q_proj(norm(module.token_norm, h)).view(ROWS, TOKENS, HEADS, DIM)
    key = module.k_proj(norm(module.concept_norm, z)).view(ROWS, -1, GROUPS, DIM)
    value = module.v_proj(norm(module.concept_norm, z)).view(ROWS, -1, GROUPS, DIM)
    heads = loop(
        norm(module.q_norm, query).transpose(1, 2),
        norm(module.k_norm, key).transpose(1, 2),
        value.transpose(1, 2),
        places,
        boundaries,
        "uniform",
    )
    expected = module.o_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert alive.all()


@pytest.mark.parametrize("tokens", [3, TOKENS])
@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
def test_kernels_by_name(kernel, tokens):
    """By few tokens and by many."""
    module = layer(kernel=kernel)
    twin = copy.deepcopy(module)
    twin.kernel = "dense"
    *_, places, _, _ = make(packed=True, padded=False)
    places = Places(
        places.token_document[:, -tokens:],
        places.token_position[:, -tokens:],
        places.concept_document,
        places.concept_position,
    )
    h, z = torch.randn(ROWS, tokens, 16), torch.randn(ROWS, places.concept_document.shape[1], 24)
    torch.testing.assert_close(module(h, *module.keys(z), places), twin(h, *twin.keys(z), places), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "mean"}, r"weighting='mean': it must be one of \('replicated', 'uniform'\)"),
        ({"kernel": "flash"}, r"kernel='flash': it must be one of"),
    ],
)
def test_unknown_words(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)
