"""Networks: what their parts are fed, and where their outputs go."""

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.utils import pixelunshuffle
from torch import nn
from torch.nn import functional as F

from monai_lm.inferers import networks
from monai_lm.inferers.networks import SemanticRegistrationNet, StructureCodes


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


# --- codes of structures ---


def coded(factor=2, labels=4):
    """A segmenter that sees structure ``k`` where the first voxel of a block is ``k / 10``."""

    def logits(channels):
        return -1e4 * torch.stack([(channels[:, 0] - k / 10).abs() for k in range(labels)], 1)

    return StructureCodes(Recorder(logits), labels, codes=3, factor=factor)


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 6)])
def test_a_voxel_has_the_code_of_its_structure_channel_by_channel(shape):
    small = torch.randint(4, (2, 2, *[s // 2 for s in shape]), generator=torch.Generator().manual_seed(0))
    images = small / 10
    for axis in range(2, images.dim()):
        images = images.repeat_interleave(2, axis)
    net = coded()
    parts = [[small[:, k : k + 1] / 10, net.codes[small[:, k]].movedim(-1, 1)] for k in range(2)]
    torch.testing.assert_close(net(images), torch.cat([*parts[0], *parts[1]], 1))
    assert net.codes.shape == (4, 3)


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 6)])
def test_features_are_the_codes_on_the_grid_of_the_image(shape):
    """Blocks of one structure have its code in the middle; the corners of both grids coincide, so means are kept."""
    small = torch.randint(4, (1, 1, *[s // 2 for s in shape]), generator=torch.Generator().manual_seed(1))
    image = small / 10
    for axis in range(2, image.dim()):
        image = image.repeat_interleave(2, axis)
    net = coded()
    codes = net(image)[:, 1:]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    torch.testing.assert_close(net.features(image), F.interpolate(codes, scale_factor=2, mode=mode))
    constant = torch.full((1, 1, *shape), 0.2)
    assert torch.allclose(net.features(constant), net.codes[2].view(1, 3, *[1] * len(shape)), atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2])
def test_codes_of_a_doubtful_voxel_are_weighted_by_the_probabilities(factor):
    net = StructureCodes(Recorder(lambda x: torch.stack([0 * x[:, 0], x[:, 0], -x[:, 0]], 1)), 3, 2, factor)
    image = torch.rand(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("blxyz,lk->bkxyz", net.logits(image).softmax(1), net.codes)
    torch.testing.assert_close(net(image)[:, 1:], expected)
    torch.testing.assert_close(net(image)[:, :1], F.avg_pool3d(image, factor))


def test_codes_have_length_1_and_keep_apart_and_the_background_is_nothing():
    codes = StructureCodes(nn.Identity(), 140, 16).codes
    assert torch.equal(codes[0], torch.zeros(16))
    torch.testing.assert_close(codes[1:].norm(dim=1), torch.ones(139))
    cosines = (codes[1:] @ codes[1:].T).fill_diagonal_(-1)
    assert cosines.max() < 0.45
    assert torch.equal(codes, StructureCodes(nn.Identity(), 140, 16).codes)


@pytest.mark.parametrize("n", [2, 3])
def test_positions_count_from_the_centre_of_the_content(n):
    image = torch.zeros(2, 1, *[20] * n)
    image[(0, 0, *[slice(4, 10)] * n)] = 1  # centre 6.5
    image[(1, 0, *[slice(8, 14)] * n)] = 1
    net = coded()
    net.logits(image)
    seen = net.segmenter.seen[:, -n:]
    for axis in range(n):
        shape = [1] * n
        shape[axis] = 10
        for pair, centre in ((0, 6.5), (1, 10.5)):
            expected = ((2 * torch.arange(10.0) + 0.5 - centre) / 50).view(shape).expand([10] * n)
            torch.testing.assert_close(seen[pair, axis], expected)


def test_a_patch_with_its_centre_is_seen_as_a_part_of_the_whole():
    image = torch.rand(1, 1, 16, 12, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    net = coded()
    net.logits(image)
    whole = net.segmenter.seen
    patch = image[:, :, 4:12, 2:12, 8:20]
    net.logits(patch, torch.tensor([[4 + 3.5 - 7.5, 2 + 4.5 - 5.5, 8 + 5.5 - 9.5]]))
    torch.testing.assert_close(net.segmenter.seen, whole[:, :, 2:6, 1:6, 4:10])


def test_an_image_without_content_has_its_centre_in_the_middle():
    net = coded()
    net.logits(torch.zeros(1, 1, 4, 4, 4))
    torch.testing.assert_close(net.segmenter.seen[0, -3:, 0, 0, 0], torch.full((3,), -1 / 50))


def test_code_networks_can_be_scripted():
    net = StructureCodes(nn.Conv3d(11, 5, 1), 5, 4)
    images = torch.rand(2, 2, 8, 10, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.jit.script(net)(images), net(images))


@pytest.mark.parametrize("n", [2, 3])
def test_networks_can_be_exported(n):
    """As ``torch.export`` does it: from one pair, for any other on that grid, one without content too."""
    conv = nn.Conv2d if n == 2 else nn.Conv3d
    semantic = SemanticRegistrationNet(conv(2**n, 3 * 2**n, 1), conv(6 * 2**n, n, 1))
    shape = (1, 2, *(8, 10, 12)[:n])
    for net in (semantic, StructureCodes(conv(2**n + n, 5, 1), 5, 4)):
        exported = torch.export.export(net.eval(), (torch.zeros(shape),)).module()
        image = torch.zeros(shape)
        image[..., 2:5, 1:4] = torch.rand(image[..., 2:5, 1:4].shape, generator=torch.Generator().manual_seed(0))
        for images in (image, torch.zeros(shape)):
            torch.testing.assert_close(exported(images), net(images))


def test_codes_of_grids_and_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"image must have a grid divisible by 2, got shape \(1, 1, 7, 8\)"):
        coded()(torch.zeros(1, 1, 7, 8))
    for arguments, name in (((1,), "labels"), ((3, 1), "codes"), ((3, 2, 0), "factor"), ((True,), "labels")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
            StructureCodes(nn.Identity(), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("brain_mri_registration", (32, 48, 32)), ("hippocampus_mr_registration", (64, 64, 64))]
)
def test_the_networks_of_the_bundles_can_be_exported(name, size, tmp_path):
    bundle = Path(__file__).parents[2] / "bundles" / name
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    net = parser.get_parsed_content("network_def").eval()
    net.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    torch.export.save(torch.export.export(net, (torch.zeros(1, 2, *size),)), tmp_path / "model.pt2")
    images = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(images), net(images))
