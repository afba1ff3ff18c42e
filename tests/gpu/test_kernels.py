"""Every operation of an iteration on the device, in float32, against the CPU in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from monai_lm import fields
from monai_lm.fields.topology import folded_cells
from monai_lm.kernels.reference import box_sum, eulerian_gradient
from monai_lm.similarity import LNCC, MI, MSE, NCC
from monai_lm.similarity.weighted import Weighted, with_weight
from monai_lm.solver.descent import LM, WindowedLM, pull_back
from monai_lm.solver.method import Method
from monai_lm.solver.pyramid import make_level, move_field, shrink
from monai_lm.solver.smoothing import Elastic
from monai_lm.solver.trust import Trust, initial_trust

SIZES = {2: (33, 28), 3: (21, 18, 23)}


class Inputs(NamedTuple):
    """Two images ``(2, 1, *S)`` and two fields ``(2, n, *S)``, in voxels."""

    image: Tensor
    other: Tensor
    ddf: Tensor
    step: Tensor

    @property
    def levels(self):
        """The grid of the images, and half of it."""
        size = self.image.shape[2:]
        return [make_level(size, [1.0, 2.0, 1.5][: len(size)], scale) for scale in (1, 2)]

    @property
    def trust(self):
        return initial_trust(self.ddf, self.ddf.new_tensor([2.0, 3.0]), 1.0)

    def compared(self, measure):
        return measure.loss_and_derivative(self.image, self.other)

    def compared_within(self, measure):
        """With a mask, as the engine calls it."""
        mask = (self.other > self.other.mean()).to(self.other)
        reference = Weighted(measure).reference(with_weight(self.other, mask))
        return Weighted(measure).evaluate(self.image, reference)

    def judged(self):
        trust = self.trust
        return Method().judge(trust, 0.5 * trust.loss, 1)[2]


KERNELS = {
    "warp": lambda x: fields.warp(x.image, x.ddf),
    "warp, zeros": lambda x: fields.warp(x.image, x.ddf, padding_mode="zeros"),
    "warp, nearest": lambda x: fields.warp(x.image.round(), x.ddf.round(), mode="nearest"),
    "compose": lambda x: fields.compose(x.ddf, x.step),
    "integrate": lambda x: fields.integrate(x.ddf, 5),
    "invert": lambda x: fields.invert(0.3 * x.step)[0],
    "resample": lambda x: fields.resample(x.ddf, [s + 3 for s in x.ddf.shape[2:]]),
    "sample points": lambda x: fields.sample_points(x.ddf, 5 + x.ddf.flatten(2).transpose(1, 2)),
    "gaussian": lambda x: fields.gaussian_smooth(x.ddf, 1.5),
    "box sum": lambda x: box_sum(x.image, 2),
    "jacobian": lambda x: fields.jacobian_determinant(x.ddf),
    "folded cells": lambda x: folded_cells(3 * x.step).to(x.step),
    "folded cells, composed": lambda x: folded_cells(x.step, 1e-3, 0.3 * x.ddf).to(x.step),
    "repair": lambda x: fields.repair(2 * x.step),
    "LNCC": lambda x: x.compared(LNCC()),
    "MSE": lambda x: x.compared(MSE()),
    "NCC": lambda x: x.compared(NCC()),
    "MI": lambda x: x.compared(MI()),
    "LNCC, weighted": lambda x: x.compared_within(LNCC()),
    "MSE, weighted": lambda x: x.compared_within(MSE()),
    "MI, weighted": lambda x: x.compared_within(MI()),
    "eulerian gradient": lambda x: eulerian_gradient(x.image, x.other),
    "pull back": lambda x: pull_back(x.ddf, x.step),
    "initial trust": lambda x: x.trust.damping,
    "direction": lambda x: LM().direction(x.ddf, x.trust, [1.0] * x.ddf.shape[1], 0.5),
    "direction, window 3": lambda x: WindowedLM(3).direction(x.ddf, x.trust, [1.0] * x.ddf.shape[1], 0.5),
    "advance": lambda x: advanced(x),
    "judge": lambda x: x.judged(),
    "shrink": lambda x: shrink(x.image, x.levels[1]),
    "move field": lambda x: move_field(x.ddf, *x.levels),
}


def advanced(x):
    """The residual after a step that is composed into it, and smoothed."""
    moved, out = fields.compose(x.ddf, x.step), x.ddf.clone()
    Elastic(0.5).relax(moved, (1.0,) * moved.shape[1], x.trust.length, out)
    return out


@pytest.fixture
def inputs(smooth_image, smooth_field):
    """``inputs(n, dtype, device)``: the same numbers each time."""

    def make(n, dtype, device):
        size = SIZES[n]
        images = [5 * smooth_image((2, 1, *size), 1.5, seed) for seed in (0, 1)]
        displacements = [smooth_field((2, n, *size), amplitude, 3.0, seed) for seed, amplitude in ((2, 3.0), (3, 2.0))]
        return Inputs(*(t.to(dtype).to(device) for t in (*images, *displacements)))

    return make


def tensors_of(out):
    if isinstance(out, Trust):
        return [out.damping, out.reference, out.loss]
    return list(out) if isinstance(out, tuple) else [out]


def largest_difference(out, expected):
    """Over the largest value that is expected."""
    differences = []
    for got, right in zip(tensors_of(out), tensors_of(expected), strict=True):
        differences.append(float((got.cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-30)))
    return max(differences)


@pytest.mark.parametrize("n", [2, 3], ids=["2D", "3D"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_agree_with_float64_on_the_cpu(name, n, any_device, inputs, record_property):
    expected = KERNELS[name](inputs(n, torch.float64, "cpu"))
    out = KERNELS[name](inputs(n, torch.float32, any_device))
    assert all(t.device == any_device for t in tensors_of(out))
    difference = largest_difference(out, expected)
    record_property("largest_difference", difference)
    assert difference < (2e-3 if name in ("invert", "repair") else 1e-4)  # these two stop at bounds of their own
