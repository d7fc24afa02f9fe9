"""BatchNorm and ReLU by `Rows` and by `Kernels`, against each other and against autograd."""

import pytest
import torch
from torch import nn

from models.norm_relu import Kernels, Rows

WAYS = [Rows, Kernels]
SHAPES = [(2, 1, 5, 7), (3, 3, 4, 9), (2, 12, 8, 8), (4, 16, 3, 5), (5, 12, 1, 1), (1, 3, 6, 1)]
STRAIGHT, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
EPS = 1e-3


def make(shape, layout=CHANNELS_LAST, dtype=torch.float64):
    """A conv's output, the gradient of what becomes of it, and a BatchNorm for it."""
    torch.manual_seed(0)
    conv, grad = torch.randn(2, *shape, dtype=torch.float64).unbind()
    conv = conv * torch.rand(shape[1], 1, 1).double().add(0.5) + torch.randn(shape[1], 1, 1)
    bn = nn.BatchNorm2d(shape[1], eps=EPS).double()
    for tensor in (bn.weight, bn.bias, bn.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    return *(t.to(dtype, memory_format=layout) for t in (conv, grad)), bn


def by_autograd(conv, grad, bn, of_batch):
    """Output, and gradients of conv, gamma and beta."""
    conv = conv.clone().requires_grad_()
    out = bn.train(of_batch)(conv).relu()
    return [out.detach(), *torch.autograd.grad(out, (conv, bn.weight, bn.bias), grad)]


def by(way, conv, grad, bn, of_batch):
    """The same; what is given is left as it was."""
    conv, gamma, beta = conv.clone(), bn.weight.detach(), bn.bias.detach()
    mean, var = way.statistics(conv) if of_batch else (bn.running_mean, bn.running_var)
    before = [t.clone() for t in (mean, var, gamma, beta)]
    kept, out = way.forward(conv, mean, var, gamma, beta, EPS)
    found = out.clone()
    of_norm = grad * (out > 0)
    gradients = way.backward(of_norm, kept, mean, var, gamma, EPS, of_batch)
    torch.testing.assert_close([mean, var, gamma, beta], before, rtol=0, atol=0)
    return [found, *gradients]


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("layout", [STRAIGHT, CHANNELS_LAST])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_forward_and_backward_are_autograds(way, shape, layout, of_batch):
    conv, grad, bn = make(shape, layout)
    expected = by_autograd(conv, grad, bn, of_batch)
    assert_same(by(way, conv, grad, bn, of_batch), expected)


@pytest.mark.parametrize("layout", [STRAIGHT, CHANNELS_LAST])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_the_mean_and_the_biased_variance(way, shape, layout):
    conv, *_ = make(shape, layout)
    values = conv.permute(1, 0, 2, 3).reshape(shape[1], -1)
    mean = values.sum(1) / values.shape[1]
    var = (values - mean[:, None]).square().sum(1) / values.shape[1]
    assert_same(way.statistics(conv), (mean, var))


@pytest.mark.parametrize("layout", [STRAIGHT, CHANNELS_LAST])
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_larger_tensor(way, layout):
    """Strides of neither format."""
    conv, grad, bn = make((2, 12, 6, 10), layout)
    conv, grad = (t[:, :, ::2, 1:8] for t in (conv, grad))
    expected = by_autograd(conv, grad, bn, True)
    assert_same(by(way, conv, grad, bn, True), expected)


@pytest.mark.parametrize("way", WAYS)
def test_variance_survives_a_far_mean(way):
    torch.manual_seed(0)
    conv = (torch.randn(8, 12, 16, 16) + 1000).to(memory_format=CHANNELS_LAST)
    mean, var = way.statistics(conv)
    assert mean.dtype == var.dtype == torch.float32
    expected = torch.var_mean(conv.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_narrow_maps_have_wide_statistics(way, narrow, of_batch):
    conv, grad, bn = make((4, 12, 8, 9), dtype=narrow)
    expected = by_autograd(conv.double(), grad.double(), bn, of_batch)
    assert all(t.dtype == torch.float32 for t in way.statistics(conv))
    found = by(way, conv, grad, bn.float(), of_batch)
    assert [t.dtype for t in found] == [narrow] * 2 + [torch.float32] * 2
    resolution = torch.finfo(narrow).eps  # of sums over 288 values: up to a few of these a value
    for actual, exact in zip(found, expected, strict=True):
        error = (actual.double() - exact).abs().max() / exact.abs().max()
        assert error < 2 * resolution


def test_rows_and_kernels_agree_in_float32():
    for shape in SHAPES:
        conv, grad, bn = make(shape, dtype=torch.float32)
        ways = [by(way, conv, grad, bn.float(), True) for way in WAYS]
        assert_same(*ways, 1e-4)
