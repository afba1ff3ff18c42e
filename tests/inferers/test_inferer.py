"""RegistrationInferer: network → field → refinement."""

import monai.inferers
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.nets import VoxelMorph, VoxelMorphUNet
from torch import Tensor, nn

from monai_lm import RegistrationInferer, convert, refine
from monai_lm.fields import gaussian_smooth, integrate, resample, warp
from monai_lm.guidance import Keypoints

SHAPES = [(20, 22), (12, 13, 14)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(shape: tuple[int, ...], amplitude: float, batch: int = 1, seed: int = 2) -> Tensor:
    ddf = gaussian_smooth(noise(batch, len(shape), *shape, seed=seed), 3.0)
    return ddf * (amplitude / ddf.abs().max())


def inputs_and_field(shape: tuple[int, ...], batch: int = 1) -> tuple[Tensor, Tensor]:
    """Channel 0 moving, channel 1 fixed, and the field between them."""
    moving, ddf = gaussian_smooth(noise(batch, 1, *shape, seed=1), 1.5), smooth(shape, 1.5, batch)
    return torch.cat([moving, warp(moving, ddf)], 1), ddf


class Constant(nn.Module):
    """Network that predicts the same field whatever it sees, and remembers what it saw."""

    def __init__(self, field: Tensor) -> None:
        super().__init__()
        self.field = nn.Parameter(field.clone())
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.field * 1


def test_is_a_monai_inferer():
    assert isinstance(RegistrationInferer(), monai.inferers.Inferer)


# --- the network's own field ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_displacement_is_passed_on(shape):
    inputs, _ = inputs_and_field(shape, batch=2)
    prediction = smooth(shape, 2.0, batch=2, seed=5)
    network = Constant(prediction)
    assert torch.equal(RegistrationInferer("displacement")(inputs, network), prediction)
    assert torch.equal(network.seen[0], inputs)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_velocity_is_integrated(shape, steps):
    inputs, _ = inputs_and_field(shape)
    velocity = smooth(shape, 2.0, seed=5)
    ddf = RegistrationInferer("velocity", integration_steps=steps)(inputs, Constant(velocity))
    torch.testing.assert_close(ddf, integrate(velocity, steps), rtol=0, atol=1e-5)
    assert not torch.equal(ddf, velocity)


@pytest.mark.parametrize("prediction", ["velocity", "displacement"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_uniform_prediction_is_a_shift(prediction, n):
    shift = torch.tensor([0.5, -1.25, 2.0][:n]).view(1, n, *[1] * n)
    field = shift.expand(1, n, *[9] * n)
    ddf = RegistrationInferer(prediction)(torch.zeros(1, 2, *[9] * n), Constant(field))
    torch.testing.assert_close(ddf, field)


@pytest.mark.parametrize("prediction", ["velocity", "displacement"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_coarse_prediction_is_resampled_with_its_units(prediction, n):
    """Between grids whose corner voxels coincide a voxel of 5 is 8 / 4 = 2 voxels of 9."""
    shift = torch.tensor([0.5, -1.25, 2.0][:n]).view(1, n, *[1] * n)
    ddf = RegistrationInferer(prediction)(torch.zeros(1, 2, *[9] * n), Constant(shift.expand(1, n, *[5] * n)))
    torch.testing.assert_close(ddf, (2 * shift).expand(1, n, *[9] * n))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_coarse_velocity_is_integrated_on_its_own_grid(shape):
    coarse = tuple(s // 2 for s in shape)
    velocity = smooth(coarse, 1.0, seed=5)
    ddf = RegistrationInferer("velocity")(torch.zeros(1, 2, *shape), Constant(velocity))
    torch.testing.assert_close(ddf, resample(integrate(velocity, 7), shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(13, 17), (9, 11, 16)])
def test_padding_is_for_the_network_only(shape):
    inputs, _ = inputs_and_field(shape)
    padded = tuple(-(-s // 8) * 8 for s in shape)
    field = smooth(padded, 2.0, seed=5)
    network = Constant(field)
    ddf = RegistrationInferer("displacement", divisible_pad=8)(inputs, network)
    inside = (..., *[slice(s) for s in shape])
    assert torch.equal(ddf, field[inside])
    (seen,) = network.seen
    assert seen.shape == (1, 2, *padded)
    assert torch.equal(seen[inside], inputs)
    outside = seen.clone()
    outside[inside] = 0
    assert torch.count_nonzero(outside) == 0


def test_a_coarse_prediction_belongs_to_the_padded_grid():
    shift = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    network = Constant(shift.expand(1, 2, 8, 8))
    ddf = RegistrationInferer("displacement", divisible_pad=16)(torch.zeros(1, 2, 13, 16), network)
    torch.testing.assert_close(ddf, (shift * 15 / 7).expand(1, 2, 13, 16))


@pytest.mark.parametrize("divisible_pad", [None, 1, 4])
def test_nothing_is_padded_where_nothing_is_missing(divisible_pad):
    network = Constant(torch.zeros(1, 2, 12, 16))
    RegistrationInferer("displacement", divisible_pad=divisible_pad)(torch.zeros(1, 2, 12, 16), network)
    assert network.seen[0].shape == (1, 2, 12, 16)


def test_arguments_go_to_the_network():
    def network(x: Tensor, scale: float, offset: float = 0.0) -> Tensor:
        return torch.full_like(x, scale + offset)

    ddf = RegistrationInferer("displacement")(torch.zeros(1, 2, 6, 6), network, 2.0, offset=0.5)
    assert torch.equal(ddf, torch.full((1, 2, 6, 6), 2.5))


def test_the_networks_field_can_be_trained_through():
    """``refine=None`` keeps the graph: the gradient of a loss on the field reaches the network."""
    network = Constant(smooth((5, 6), 1.0))
    RegistrationInferer("velocity")(torch.zeros(1, 2, 10, 12), network).square().sum().backward()
    assert float(network.field.grad.abs().min()) > 0


def test_half_precision_predictions_become_float32_fields():
    velocity = smooth((10, 12), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        ddf = RegistrationInferer("velocity")(torch.zeros(1, 2, 10, 12), lambda x: velocity.bfloat16())  # noqa: ARG005
    assert ddf.dtype == torch.float32
    assert torch.equal(ddf, integrate(velocity.bfloat16().float(), 7))


# --- refinement -------------------------------------------------------------------------------------------------------

SETTINGS = {"iterations": 12, "similarity": "mse"}


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", SHAPES)
def test_refines_channel_0_onto_channel_1(shape, context):
    inputs, truth = inputs_and_field(shape, batch=2)
    prediction = 0.5 * truth
    expected = refine(inputs[:, 1:], inputs[:, :1], prediction, **SETTINGS).ddf
    with context():
        ddf = RegistrationInferer("displacement", refine=SETTINGS)(inputs, Constant(prediction))
    assert torch.equal(ddf, expected)
    assert not ddf.requires_grad
    start, end = (float(torch.linalg.vector_norm(d - truth, dim=1).mean()) for d in (prediction, ddf))
    assert end < 0.8 * start


def test_refines_the_integrated_velocity_on_the_unpadded_grid():
    inputs, _ = inputs_and_field((13, 17))
    velocity = smooth((8, 12), 0.5, seed=5)
    inferer = RegistrationInferer("velocity", integration_steps=5, divisible_pad=4, refine=SETTINGS)
    start = resample(integrate(velocity, 5), (16, 20))[..., :13, :17]
    expected = refine(inputs[:, 1:], inputs[:, :1], start, **SETTINGS).ddf
    assert torch.equal(inferer(inputs, Constant(velocity)), expected)


def test_the_settings_are_not_used_up():
    inputs, truth = inputs_and_field((12, 14))
    settings = dict(SETTINGS)
    inferer = RegistrationInferer("displacement", refine=settings)
    first, second = (inferer(inputs, Constant(0.5 * truth)) for _ in range(2))
    assert torch.equal(first, second)
    assert settings == SETTINGS


def test_an_empty_refinement_is_a_refinement_with_the_defaults():
    inputs, truth = inputs_and_field((12, 14))
    ddf = RegistrationInferer("displacement", refine={})(inputs, Constant(0.5 * truth))
    assert torch.equal(ddf, refine(inputs[:, 1:], inputs[:, :1], 0.5 * truth).ddf)


@pytest.mark.parametrize("settings", [None, SETTINGS])
def test_meta_tensors_give_the_same_field(settings):
    inputs, truth = inputs_and_field((12, 14))
    inferer = RegistrationInferer("displacement", divisible_pad=8, refine=settings)
    field = torch.nn.functional.pad(0.5 * truth, [0, 2, 0, 4])
    expected = inferer(inputs, Constant(field))
    meta = inferer(MetaTensor(inputs, affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))), Constant(field))
    assert torch.equal(torch.as_tensor(meta), expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "flow"}, "prediction must be 'velocity', 'displacement' or 'features', got 'flow'"),
        ({"integration_steps": 0}, "integration_steps must be at least 1, got 0"),
        ({"divisible_pad": -3}, "divisible_pad must be"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegistrationInferer(**arguments)


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        (torch.zeros(2, 8, 8), r"\(2, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, 8), r"\(1, 3, 8, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8).numpy(), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_inputs_that_do_not_fit(inputs, got):
    message = r"inputs must be \(B, 2, \*S\), channel 0 moving and channel 1 fixed, got " + got
    with pytest.raises((TypeError, ValueError), match=message):
        RegistrationInferer()(inputs, lambda x: x)


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 2, 8),
        torch.zeros(2, 3, 8, 8, 8),
        torch.zeros(1, 2, 8, 8),
        (torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)),
        None,
    ],
    ids=["too few channels", "too many channels", "rank", "3D", "another batch size", "tuple", "None"],
)
@pytest.mark.parametrize("prediction", ["velocity", "displacement"])
def test_networks_that_do_not_fit(prediction, output):
    with pytest.raises((TypeError, ValueError), match=rf"network must return a {prediction} "):
        RegistrationInferer(prediction)(torch.zeros(2, 2, 8, 8), lambda _: output)


def test_refinement_settings_are_checked_by_refine():
    with pytest.raises(ValueError, match="similarity must be one of"):
        RegistrationInferer("displacement", refine={"similarity": "ssim"})(noise(1, 2, 8, 8), torch.zeros_like)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_matched_beside_the_images(shape):
    inputs, _ = inputs_and_field(shape)
    prediction = smooth(shape, 0.5, seed=5)
    settings = {"iterations": 4, "scales": (1,)}
    inferer = RegistrationInferer("displacement", refine=settings, features=lambda x: torch.cat([x > 0, x**2], 1))
    moving, fixed = (torch.cat([x, x > 0, x**2], 1) for x in inputs.split(1, 1))
    expected = refine(fixed, moving, prediction, **settings).ddf
    assert torch.equal(inferer(inputs, Constant(prediction)), expected)
    assert not torch.equal(RegistrationInferer("displacement", refine=settings)(inputs, Constant(prediction)), expected)


def test_features_alone_can_drive_the_refinement():
    """Constant images say nothing; the field comes from the features, here a shift by one voxel."""
    moving = gaussian_smooth(noise(1, 1, 24, 26, seed=1), 1.5)
    shift = torch.zeros(1, 2, 24, 26)
    shift[:, 0] = 1.0
    known = {0.0: moving, 1.0: warp(moving, shift)}
    inputs = torch.cat([torch.zeros_like(moving), torch.ones_like(moving)], 1)
    inputs[..., 0, 0] += 0.5  # not constant
    inferer = RegistrationInferer(
        "displacement", refine={"scales": (1,), "iterations": 50}, features=lambda x: known[float(x[0, 0, 5, 5])]
    )
    out = inferer(inputs, Constant(torch.zeros(1, 2, 24, 26)))
    error = (out - shift)[..., 4:-4, 4:-4].abs().mean()
    assert error < 0.05


@pytest.mark.parametrize(
    ("features", "got"),
    [(lambda x: x[..., 1:], r"\(1, 1, 20, 21\)"), (lambda x: x[0], r"\(1, 20, 22\)"), (lambda _: None, "NoneType")],
)
def test_features_on_another_grid(features, got):
    inputs, _ = inputs_and_field((20, 22))
    inferer = RegistrationInferer("displacement", refine={}, features=features)
    with pytest.raises(ValueError, match=rf"features must return \(B, C, \*S\) .*{got}"):
        inferer(inputs, Constant(smooth((20, 22), 0.5)))


def test_bad_settings_are_found_when_the_inferer_is_made():
    with pytest.raises(TypeError, match=r"refine must be None or keyword arguments of monai_lm\.refine, got 5"):
        RegistrationInferer(refine=5)
    with pytest.raises(TypeError, match=r"refine takes the keyword arguments .*'scales'.* got \['scale'\]"):
        RegistrationInferer(refine={"scale": 1})
    with pytest.raises(ValueError, match="regularizer must be None with a control that compares"):
        RegistrationInferer(refine={"regularizer": "bending", "control": "trust_region"})
    with pytest.raises(ValueError, match="guidance must be None with symmetric=True"):
        RegistrationInferer(
            refine={"guidance": [Keypoints(torch.ones(1, 1, 2), torch.ones(1, 1, 2))], "symmetric": True}
        )
    with pytest.raises(TypeError, match="features must be None or a function of an image, got str"):
        RegistrationInferer(features="labels")


@pytest.mark.parametrize("kind", ["displacement", "velocity"])
def test_a_prediction_that_is_not_finite(kind):
    inputs, _ = inputs_and_field((20, 22))
    prediction = smooth((20, 22), 0.5)
    prediction[0, 0, 3, 3] = float("nan")
    for settings in ({}, None):
        with pytest.raises(ValueError, match=f"the network's {kind} must be finite, got 1 NaN"):
            RegistrationInferer(kind, refine=settings)(inputs, Constant(prediction))


def test_features_are_padded_like_the_networks_input_and_keep_their_values():
    seen = []

    def features(image):
        seen.append(image.shape)
        return image.mul_(0).float() + 0.25  # in place, and no integer

    images = (255 * torch.rand(1, 2, 13, 17)).to(torch.uint8)
    before = images.clone()
    channels = RegistrationInferer("displacement", divisible_pad=4, refine={}, features=features).channels(
        images[:, :1]
    )
    assert seen == [(1, 1, 16, 20)]
    assert channels.shape == (1, 2, 13, 17)
    assert torch.equal(channels[:, :1], images[:, :1].float())
    assert bool((channels[:, 1] == 0.25).all())
    assert torch.equal(images, before)


# --- networks that predict features ---

MATCH = {"scales": (1,), "iterations": (5,)}


@pytest.mark.parametrize("shape", [(13, 18), (9, 11, 16)])
def test_predicted_features_are_registered_on_their_own_grid(shape):
    inputs, _ = inputs_and_field(shape, batch=2)
    padded = [s + -s % 4 for s in shape]
    small = [s // 2 for s in padded]
    features = gaussian_smooth(noise(2, 6, *small, seed=7), 1.0)
    network = Constant(features)
    ddf = RegistrationInferer("features", divisible_pad=4, match=MATCH)(inputs, network)
    field = refine(features[:, 3:], features[:, :3], similarity="mse", **MATCH).ddf
    blocks = ddf[(..., *[slice(0, s // 2 * 2) for s in shape])]
    for _ in range(len(shape)):  # the mean over a block of voxels is the field at the block, inside, where it is linear
        blocks = blocks.unflatten(2, (-1, 2)).mean(3).movedim(2, -1)
    inner = (..., *[slice(1, s // 2 - 1) for s in shape])
    smoothed = field
    for dim in range(2, field.dim()):  # linear interpolation at the quarters of a voxel: weights 1/8, 3/4, 1/8
        count = field.shape[dim]
        padded_field = torch.cat([smoothed.narrow(dim, 0, 1), smoothed, smoothed.narrow(dim, count - 1, 1)], dim)
        smoothed = sum(w * padded_field.narrow(dim, k, count) for k, w in enumerate((0.125, 0.75, 0.125)))
    torch.testing.assert_close(blocks[inner], 2 * smoothed[inner])
    assert ddf.abs().max() > 0.5
    assert list(network.seen[0].shape[2:]) == padded


def test_a_shift_between_features_is_found_and_refined():
    shape = (16, 18, 20)
    image = gaussian_smooth(noise(1, 1, *shape, seed=3), 2.0)
    shift = torch.ones(1, 3, *shape)
    inputs = torch.cat([image, warp(image, shift)], 1)
    inferer = RegistrationInferer("features", match={"scales": (2, 1), "iterations": (30, 30)}, refine=MATCH)
    own = inferer.predict(inputs, nn.Identity())
    inner = (..., *[slice(4, -4)] * 3)
    assert (own - shift)[inner].abs().mean() < 0.15
    torch.testing.assert_close(inferer(inputs, nn.Identity()), inferer.refined(inputs, own).ddf)


@pytest.mark.parametrize(
    ("output", "got"),
    [(torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\)"), (torch.zeros(1, 4, 8), r"\(1, 4, 8\)"), ("codes", "str")],
)
def test_features_for_two_images_are_asked_for(output, got):
    with pytest.raises(ValueError, match=rf"network must return features \(B, 2 · C, \*P\).*2D images, got {got}"):
        RegistrationInferer("features")(torch.zeros(1, 2, 8, 8), lambda _: output)


def test_match_is_for_features_and_is_checked():
    with pytest.raises(ValueError, match="match is for prediction='features', got it with prediction='velocity'"):
        RegistrationInferer(match={})
    with pytest.raises(TypeError, match="match takes the keyword arguments"):
        RegistrationInferer("features", match={"steps": 3})
    with pytest.raises(TypeError, match=r"match must be None or keyword arguments of monai_lm\.refine, got 3"):
        RegistrationInferer("features", match=3)
    with pytest.raises(ValueError, match="the network's features must be finite"):
        RegistrationInferer("features")(torch.zeros(1, 2, 8, 8), lambda _: torch.full((1, 2, 8, 8), float("nan")))


# --- networks of two images and several outputs -----------------------------------------------------------------------


@pytest.mark.parametrize("takes", [("moving", "fixed"), ("fixed", "moving")])
def test_a_network_of_two_images_is_called_in_its_order(takes):
    inputs, ddf = inputs_and_field((20, 22))
    seen = {}

    def network(first, second, scale):
        seen.update(zip(takes, (first, second), strict=True))
        return scale * ddf

    out = RegistrationInferer("displacement", divisible_pad=8, takes=takes)(inputs, network, scale=2)
    torch.testing.assert_close(out, resample(2 * ddf, (24, 24))[..., :20, :22])
    assert torch.equal(seen["moving"][..., :20, :22], inputs[:, :1])
    assert torch.equal(seen["fixed"][..., :20, :22], inputs[:, 1:])
    assert seen["moving"].shape == (1, 1, 24, 24)


@pytest.mark.parametrize("n", [2, 3])
def test_monais_voxelmorph_is_refined_as_its_own_field_would_be(n):
    shape = (16, 18, 20)[:n]
    padded = (16, 32, 32)[:n]
    inputs, _ = inputs_and_field(shape)
    torch.manual_seed(0)
    backbone = VoxelMorphUNet(spatial_dims=n, in_channels=2, unet_out_channels=8, channels=(8, 8, 8, 8),
                              final_conv_channels=(8, 8))  # fmt: skip
    network = VoxelMorph(backbone, spatial_dims=n).eval()
    settings = {"iterations": 3, "scales": (1,)}
    inferer = RegistrationInferer("displacement", divisible_pad=16, refine=settings, takes=("moving", "fixed"))
    with torch.no_grad():
        out = inferer(inputs, network)
        whole = torch.zeros(1, 2, *padded)
        whole[(..., *[slice(s) for s in shape])] = inputs
        own = network(whole[:, :1], whole[:, 1:])[1][(..., *[slice(s) for s in shape])]
    moving, fixed = inputs.split(1, 1)
    assert torch.equal(out, refine(fixed, moving, own, **settings).ddf)


def test_which_output_is_the_field():
    inputs, ddf = inputs_and_field((20, 22))
    outputs = {"warped": inputs[:, :1], "field": ddf, "back": -ddf}
    images = {"inputs": inputs, "network": lambda _: outputs}
    assert torch.equal(RegistrationInferer("displacement", output="back")(**images), -ddf)
    images["network"] = lambda _: tuple(outputs.values())
    assert torch.equal(RegistrationInferer("displacement", output=1)(**images), ddf)
    with pytest.raises(
        ValueError, match=r"network must return a displacement \(B, 2, \*P\), one only unless .* got 2 among"
    ):
        RegistrationInferer("displacement")(**images)
    with pytest.raises(ValueError, match=r"output must be one of the network's \[0, 1, 2\], got 'field'"):
        RegistrationInferer("displacement", output="field")(**images)
    with pytest.raises(ValueError, match=r"takes must be \('moving', 'fixed'\)"):
        RegistrationInferer(takes=("moving",))


def test_what_belongs_to_a_pair_guides_it():
    """In a call, or between prediction and refinement, as in ``refine``."""
    inputs, ddf = inputs_and_field(SHAPES[1])
    network, settings = Constant(0.5 * ddf), {"iterations": 3, "scales": (1,)}
    points = torch.tensor([[[5.0, 6, 7], [8, 4, 5]]])
    guide, mask = Keypoints(points, points + 1, 5.0), torch.ones_like(inputs[:, :1])
    mask[..., :4] = 0
    inferer = RegistrationInferer("displacement", refine=settings)
    moving, fixed = inputs[:, :1], inputs[:, 1:]
    assert torch.equal(
        inferer(inputs, network, guidance=guide), refine(fixed, moving, 0.5 * ddf, guidance=guide, **settings).ddf
    )
    found = inferer.refined(inputs, inferer.predict(inputs, network), guidance=guide, mask=mask)
    assert torch.equal(found.ddf, refine(fixed, moving, 0.5 * ddf, mask, guidance=guide, **settings).ddf)
    with pytest.raises(ValueError, match="refine must be keyword arguments"):
        RegistrationInferer("displacement")(inputs, network, guidance=guide)


# --- networks with conventions and grids of their own -----------------------------------------------------------------


@pytest.mark.parametrize("divisible_pad", [None, 8])
def test_a_field_in_another_convention_is_converted_on_the_grid_it_is_predicted_on(divisible_pad):
    inputs, ddf = inputs_and_field((20, 22))
    size = (20, 22) if divisible_pad is None else (24, 24)
    half = torch.tensor([(s - 1) / 2 for s in size]).view(1, 2, 1, 1)

    def network(*_):
        return (resample(ddf, size) / half).flip(1)

    how = {"divisible_pad": divisible_pad, "takes": ("moving", "fixed")}
    expected = RegistrationInferer("displacement", **how)(inputs, lambda *_: resample(ddf, size))
    out = RegistrationInferer("displacement", **how, convert=convert.from_lapirn)(inputs, network)
    torch.testing.assert_close(out, expected)
    plain = RegistrationInferer("displacement", **how)(inputs, network)
    assert (plain - expected).abs().max() > 0.1


def test_all_that_a_network_returns_is_converted_unless_one_is_named():
    inputs, ddf = inputs_and_field((20, 22))
    outputs = {"warped": inputs[:, :1], "there": ddf, "back": -2 * ddf}
    inferer = RegistrationInferer("displacement", convert=lambda out: out["there"] - out["back"])
    torch.testing.assert_close(inferer(inputs, lambda _: outputs), 3 * ddf)
    inferer = RegistrationInferer("displacement", output="back", convert=torch.neg)
    assert torch.equal(inferer(inputs, lambda _: outputs), 2 * ddf)
    with pytest.raises(ValueError, match=r"network must return a displacement \(B, 2, \*P\), got \(1, 20\)"):
        RegistrationInferer("displacement", convert=lambda out: out["there"][:, 0, :, 0])(inputs, lambda _: outputs)
    with pytest.raises(TypeError, match="convert must be None or a function of what a network returns, got str"):
        RegistrationInferer("displacement", convert="lapirn")


@pytest.mark.parametrize("prediction", ["displacement", "velocity"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_network_of_one_grid_sees_images_and_gives_fields_by_blocks(prediction, n):
    size, own = (20, 22, 18)[:n], (15, 33, 16)[:n]
    inputs, _ = inputs_and_field(size)
    field = smooth(own, 1.0)
    seen = []

    def network(images):
        seen.append(images)
        return field

    out = RegistrationInferer(prediction, network_size=own)(inputs, network)
    assert torch.equal(seen[0], F.interpolate(inputs, size=own, mode=("bilinear", "trilinear")[n - 2]))
    meant = field if prediction == "displacement" else integrate(field, 7)
    torch.testing.assert_close(out, convert.from_coarse(meant, size))
    coarse = field[(..., *[slice(None, None, 2)] * n)]
    out = RegistrationInferer("displacement", network_size=own)(inputs, lambda _: coarse)
    torch.testing.assert_close(out, convert.from_coarse(resample(coarse, own), size))


def test_a_shift_seen_on_the_networks_grid_is_the_shift_of_the_images():
    """By 6 voxels of 24 on the one grid, and 4 of 16 on the other."""
    moving = smooth((24, 30), 1.0)[:, :1]
    inputs = torch.cat([moving, moving.roll(-6, 2)], 1)
    shift = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1)
    out = RegistrationInferer("displacement", network_size=(16, 20))(inputs, lambda _: shift.expand(1, 2, 16, 20))
    torch.testing.assert_close(warp(moving, out)[:, :, :18], inputs[:, 1:, :18])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"network_size": (16,)}, r"network_size must be None or 2 or 3 voxel counts of at least 2, got \(16,\)"),
        ({"network_size": (16, 1)}, "network_size must be None or"),
        ({"network_size": (16, 16), "divisible_pad": 8}, "divisible_pad must be None with network_size, got 8"),
    ],
)
def test_grids_that_are_none(how, message):
    with pytest.raises(ValueError, match=message):
        RegistrationInferer(**how)


def test_a_grid_of_other_dimensions_is_told_when_images_come():
    with pytest.raises(
        ValueError, match=r"network_size must be 2 voxel counts for images \(1, 2, 20, 22\), got \(8, 8, 8\)"
    ):
        RegistrationInferer(network_size=(8, 8, 8))(torch.zeros(1, 2, 20, 22), lambda x: x)
