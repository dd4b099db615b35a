"""The rule against torch's on matrices, and against a singular value decomposition on stacks of them."""

import math

import pytest
import torch

from byrote.train.muon import COEFFICIENTS, Muon, orthogonalize

SHAPES = [(24, 64), (64, 24), (48, 48), (1, 16), (16, 1)]


def gradients(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_decomposition(matrix, coefficients):
    """The slow twin: U p(S / |S|) V^T in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_is_a_polynomial_of_the_singular_values(shape, name):
    stack = gradients(2, 3, *shape)
    result = orthogonalize(stack, COEFFICIENTS[name])
    for i in range(2):
        for j in range(3):
            expected = by_decomposition(stack[i, j], COEFFICIENTS[name]).float()
            torch.testing.assert_close(result[i, j], expected, atol=2e-5, rtol=0)
            assert torch.equal(result[i, j], orthogonalize(stack[i, j], COEFFICIENTS[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_singular_values(shape, dtype):
    """Hybrid's bound of 5.4e-4 is what exact arithmetic has for S / |S| from 3e-4 on; bfloat16 cannot reach it."""
    rounding = 0.0 if dtype == torch.float32 else 8e-3
    values = torch.linalg.svdvals(orthogonalize(gradients(5, *shape), COEFFICIENTS["hybrid"], dtype).double())
    assert (values - 1).abs().max() < 5.4e-4 + rounding
    values = torch.linalg.svdvals(orthogonalize(gradients(5, *shape), COEFFICIENTS["jordan"], dtype).double())
    smallest = torch.linalg.svdvals(gradients(5, *shape)).amin() / math.sqrt(shape[0] * shape[1])
    assert values.max() < 1.21 + rounding and values.min() > min(0.68, 100 * float(smallest)) - rounding


def test_the_bounds_that_the_docstring_states():
    def end(name, least):
        x = torch.logspace(math.log10(least), 0, 100_001, dtype=torch.float64)
        for a, b, c in COEFFICIENTS[name]:
            x = a * x + b * x**3 + c * x**5
        return float(x.min()), float(x.max())

    low, high = end("jordan", 3e-3)
    assert low > 0.68 and high < 1.205
    low, high = end("hybrid", 3e-4)
    assert low > 1 - 5.4e-4 and high < 1 + 5.4e-4


def test_nothing_to_orthogonalize():
    stack = torch.stack([torch.zeros(4, 6), gradients(4, 6)])
    result = orthogonalize(stack)
    assert not result[0].any() and result[1].any()
    one_direction = gradients(4, 1) @ gradients(1, 6)
    assert torch.linalg.matrix_norm(orthogonalize(one_direction)) == pytest.approx(1, abs=6e-4)


@pytest.mark.parametrize("adjust, scale", [("match_rms_adamw", "rms"), (None, "jordan")])
@pytest.mark.parametrize(
    "dtype, nesterov", [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torchs_muon_on_matrices(shape, dtype, nesterov, adjust, scale):
    """To the last bit; over steps in which the rate changes.

    Not bfloat16 without Nesterov: there torch 2.13 normalizes its momentum buffer in place.
    """
    rule = Muon(momentum=0.9, nesterov=nesterov, coefficients="jordan", scale=scale, dtype=torch.bfloat16)
    theirs = torch.nn.Parameter(gradients(*shape, seed=9, dtype=dtype))
    ours, momentum = theirs.detach().clone(), torch.zeros(*shape, dtype=dtype)
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    optimizer = torch.optim.Muon([theirs], **settings)
    for step in range(4):
        rate = optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        theirs.grad = gradients(*shape, seed=step, dtype=dtype)
        optimizer.step()
        direction, momentum = rule.direction(theirs.grad, momentum)
        ours.mul_(1 - rate * 0.1).add_(direction, alpha=-rate * rule.length(ours.shape))
        assert torch.equal(momentum, optimizer.state[theirs]["momentum_buffer"])
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("scale", ["rms", "jordan"])
def test_blocks_and_stacks_are_matrices_of_their_own(scale, coefficients):
    rule = Muon(scale=scale, coefficients=coefficients)
    gradient, momentum = gradients(3, 2 * 8, 12), gradients(3, 2 * 8, 12, seed=1)
    direction, after = rule.direction(gradient, momentum, blocks=2)
    assert direction.shape == after.shape == gradient.shape
    assert rule.length(gradient.shape, 2) == rule.length(gradient[0, :8].shape)
    for expert in range(3):
        for half in (slice(0, 8), slice(8, 16)):
            alone, moved = rule.direction(gradient[expert, half], momentum[expert, half])
            assert torch.equal(direction[expert, half], alone) and torch.equal(after[expert, half], moved)
    together, _ = rule.direction(gradient, momentum)
    assert not torch.allclose(together, direction, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_lengths(shape):
    gradient = gradients(*shape)
    direction, _ = Muon().direction(gradient, torch.zeros(*shape))
    step = Muon().length(gradient.shape) * direction
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=6e-4)
    step = Muon(scale="jordan").length(gradient.shape) * direction
    assert torch.linalg.matrix_norm(step, 2) == pytest.approx(max(1, shape[0] / shape[1]) ** 0.5, rel=6e-4)


def test_what_is_given_stays_as_it_is():
    gradient, momentum = gradients(4, 6), gradients(4, 6, seed=1)
    copies = gradient.clone(), momentum.clone()
    Muon().direction(gradient, momentum)
    assert torch.equal(gradient, copies[0]) and torch.equal(momentum, copies[1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"momentum": 1.0}, "momentum is 1.0; it must lie in"),
        ({"coefficients": "v5"}, "coefficients is 'v5'; it must be one of"),
        ({"scale": "adamw"}, "scale is 'adamw'; it must be"),
        ({"dtype": torch.float16}, "dtype is torch.float16; give"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Muon(**settings)


def test_shapes_that_are_refused():
    with pytest.raises(ValueError, match="vectors to AdamW"):
        orthogonalize(torch.zeros(4))
    with pytest.raises(ValueError, match="has no 2 blocks"):
        Muon().direction(torch.zeros(3, 4), torch.zeros(3, 4), blocks=2)
