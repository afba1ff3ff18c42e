"""SemanticRegistrationNet: what its parts are fed, and where their outputs go."""

import pytest
import torch
from monai.networks.utils import pixelunshuffle
from torch import nn

from monai_lm import networks
from monai_lm.networks import SemanticRegistrationNet


class Recorder(nn.Module):
    """Apply a function and remember the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        self.seen = x
        return self.function(x)


def threshold_logits(blocks):
    """Per voxel, for 3 labels: logit 0 for the background, 10·v and -10·v for the others, in pixel-shuffle order."""
    values = torch.stack([torch.zeros_like(blocks), 10 * blocks, -10 * blocks], 1)
    return values.flatten(1, 2)


def network(n, factor=2):
    return SemanticRegistrationNet(Recorder(threshold_logits), Recorder(lambda x: x[:, :n]), factor)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 6)])
def test_logits_and_features_lie_voxel_on_voxel(shape, factor):
    image = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    net = network(len(shape), factor)
    expected = torch.cat([torch.zeros_like(image), 10 * image, -10 * image], 1)
    assert torch.equal(net.logits(image), expected)
    torch.testing.assert_close(net.features(image), expected.softmax(1)[:, 1:])
    assert net.segmenter.seen.shape == (2, factor ** len(shape), *[s // factor for s in shape])


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 6)])
def test_registration_sees_images_and_labels_of_both(shape):
    n = len(shape)
    images = torch.rand(3, 2, *shape, generator=torch.Generator().manual_seed(1))
    net = network(n)
    out = net(images)
    assert out.shape == (3, n, *[s // 2 for s in shape])
    moving, fixed = images.split(1, 1)
    channels = torch.cat([moving, fixed, net.features(moving), net.features(fixed)], 1)
    seen = net.registration.seen.unflatten(1, (6, 2**n))
    first = channels[(..., *[slice(None, None, 2)] * n)]
    last = channels[(..., *[slice(1, None, 2)] * n)]
    torch.testing.assert_close(seen[:, :, 0], first)
    torch.testing.assert_close(seen[:, :, -1], last)


def test_grids_channels_and_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"image must have a grid divisible by 2, got shape \(1, 1, 7, 8\)"):
        network(2).logits(torch.zeros(1, 1, 7, 8))
    with pytest.raises(ValueError, match=r"images must be \(B, 2, \*S\), .* got shape \(1, 3, 8, 8\)"):
        network(2)(torch.zeros(1, 3, 8, 8))
    for factor in (0, 1.5, True):
        with pytest.raises(ValueError, match="factor must be a whole number of at least 1, got"):
            network(2, factor)


@pytest.mark.parametrize("size", [(4, 6), (4, 6, 8)])
def test_blocks_become_channels_as_monai_makes_them(size, random_tensor):
    image, n = random_tensor((2, 3, *size)), len(size)
    channels = networks._to_channels(image, 2)
    assert torch.equal(channels, pixelunshuffle(image, n, 2))
    assert torch.equal(networks._to_voxels(channels, 2), image)
