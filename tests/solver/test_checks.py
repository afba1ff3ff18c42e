"""Every check names the argument, what was expected and what came."""

import re
import warnings

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_lm.fields.finite import check_number
from monai_lm.solver.checks import (
    check_field,
    check_images,
    check_shown,
    check_spacing,
    plain,
    plain_images,
)

CPU = torch.device("cpu")


def refusal(kind, message):
    """Expect an error with exactly this message."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_plain_gives_a_detached_float32_tensor_without_metadata():
    image = MetaTensor(torch.ones(1, 4, 4, dtype=torch.float64, requires_grad=True))
    out = plain("fixed", image)
    assert type(out) is torch.Tensor
    assert out.dtype == torch.float32
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float16])
def test_plain_converts_any_real_dtype(dtype):
    out = plain("moving", torch.tensor([0, 1], dtype=dtype))
    assert out.dtype == torch.float32
    assert out.tolist() == [0, 1]


def test_plain_does_not_copy_float32():
    image = torch.rand(1, 1, 4, 4)
    assert plain("fixed", image).data_ptr() == image.data_ptr()


def test_plain_makes_pairs_contiguous_and_leaves_an_expanded_batch_alone():
    turned = torch.randn(2, 6, 5, 4, 1).permute(0, 4, 3, 2, 1)
    for value in (turned, turned.half()):
        made = plain("fixed", value, half=True)
        assert made.is_contiguous()
        assert torch.equal(made, value)
    one = torch.randn(1, 1, 4, 5, 6).expand(3, -1, -1, -1, -1)
    assert plain("fixed", one).data_ptr() == one.data_ptr()


def test_plain_refuses_what_is_no_tensor():
    with refusal(TypeError, "fixed must be a torch.Tensor, got ndarray"):
        plain("fixed", np.zeros((1, 1, 4, 4)))
    with refusal(TypeError, "ddf must be a torch.Tensor, got NoneType"):
        plain("ddf", None)


def test_plain_refuses_complex_tensors():
    with refusal(TypeError, "moving must be real, got dtype torch.complex64"):
        plain("moving", torch.zeros(2, dtype=torch.complex64))


def test_images_of_one_shape_pass(size):
    image = torch.rand(2, 3, *size)
    assert check_images(image, image.clone()) is None


@pytest.mark.parametrize(("name", "position"), [("fixed", 0), ("moving", 1)])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4), "{} must be (B, C, H, W) or (B, C, H, W, D), got shape (4, 4)"),
        ((1, 1, 4, 4, 4, 4), "{} must be (B, C, H, W) or (B, C, H, W, D), got shape (1, 1, 4, 4, 4, 4)"),
        ((0, 1, 4, 4), "{} must not be empty, got shape (0, 1, 4, 4)"),
        ((1, 0, 4, 4), "{} must not be empty, got shape (1, 0, 4, 4)"),
        ((1, 1, 4, 1), "{} must have at least 2 voxels along every axis, got shape (1, 1, 4, 1)"),
    ],
)
def test_images_of_a_bad_shape_are_refused(name, position, shape, message):
    images = [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)]
    images[position] = torch.zeros(shape)
    with refusal(ValueError, message.format(name)):
        check_images(*images)


@pytest.mark.parametrize("shape", [(1, 1, 4, 5), (2, 1, 4, 4), (1, 1, 4, 4, 4)])
def test_images_on_different_grids_are_refused(shape):
    message = (
        "fixed and moving must have the same batch size and grid, "
        f"got shapes (1, 1, 4, 4) and {shape}; resample one onto the other first"
    )
    with refusal(ValueError, message):
        check_images(torch.zeros(1, 1, 4, 4), torch.zeros(shape))


def test_images_with_different_channels_are_refused(size):
    with refusal(ValueError, "fixed and moving must have the same channels, got 1 and 2"):
        check_images(torch.zeros(1, 1, *size), torch.zeros(1, 2, *size))


def test_images_on_different_devices_are_refused(size):
    with refusal(ValueError, "fixed and moving must be on one device, got cpu and meta"):
        check_images(torch.zeros(1, 1, *size), torch.zeros(1, 1, *size, device="meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "position"), [("fixed", 0), ("moving", 1)])
def test_images_that_are_not_finite_are_refused(size, value, name, position):
    images = torch.zeros(2, 1, 1, *size)
    images[position].view(-1)[:2] = value
    way_out = f"; a background of NaN becomes one of zeros by {name}.nan_to_num(0), and a mask keeps it from counting"
    with refusal(ValueError, f"{name} must be finite, got 2 NaN or infinite values{way_out}"):
        check_shown(name, images[position], None)
    mask = torch.ones(1, 1, *size)
    mask.view(-1)[:1] = 0
    with refusal(
        ValueError, f"{name} must be finite, got 1 NaN or infinite values where neither mask nor lesion hides it"
    ):
        check_shown(name, images[position], mask)
    mask.view(-1)[1] = 0
    check_shown(name, images[position], mask)


@pytest.mark.parametrize("offset", [0, 10**8, -(10**8)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_an_offset_that_float32_has_no_digits_beside_is_taken_off(size, dtype, offset):
    images = [torch.randint(0, 1000, (2, 1, *size), generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    fixed, moving = plain_images(*((image + offset).to(dtype) for image in images))
    assert fixed.dtype == moving.dtype == torch.float32
    differences = (images[0] - images[1]).float()
    assert torch.equal(fixed - moving, differences)
    assert (not offset) or max(float(fixed.abs().max()), float(moving.abs().max())) < 1000
    apart = plain_images((images[0] + offset).to(dtype), images[1].to(dtype))  # each has its own
    assert torch.equal(apart[0].diff(dim=2), images[0].diff(dim=2).float())
    assert torch.equal(apart[1].diff(dim=2), images[1].diff(dim=2).float())


def test_a_field_on_the_grid_passes(size):
    assert check_field("ddf", torch.zeros(2, len(size), *size), 2, size, CPU) is None


def test_a_field_of_another_shape_is_refused():
    message = "ddf must be (B, n, *S) = (2, 3, 4, 5, 6) on the grid of fixed, got shape (2, 3, 4, 5, 7)"
    with refusal(ValueError, message):
        check_field("ddf", torch.zeros(2, 3, 4, 5, 7), 2, (4, 5, 6), CPU)
    message = "velocity must be (B, n, *S) = (1, 2, 4, 5) on the grid of fixed, got shape (1, 4, 5, 2)"
    with refusal(ValueError, message):
        check_field("velocity", torch.zeros(1, 4, 5, 2), 1, (4, 5), CPU)


def test_a_field_on_another_device_is_refused():
    with refusal(ValueError, "ddf must be on the device of fixed, meta, got cpu"):
        check_field("ddf", torch.zeros(1, 2, 4, 5), 1, (4, 5), torch.device("meta"))


def test_a_field_that_is_not_finite_is_refused(size):
    field = torch.zeros(1, len(size), *size)
    field.view(-1)[0] = float("nan")
    with refusal(ValueError, "ddf must be finite, got 1 NaN or infinite values"):
        check_field("ddf", field, 1, size, CPU)


@pytest.mark.parametrize(("value", "minimum", "exclusive"), [(0, 0, False), (1, 0, True), (0.5, 0, True), (3, 3, 0)])
def test_a_number_in_range_passes(value, minimum, exclusive):
    assert check_number("step", value, minimum, exclusive) is None


@pytest.mark.parametrize(
    ("value", "exclusive", "message"),
    [
        (-0.1, False, "step must be at least 0, got -0.1"),
        (0, True, "step must be greater than 0, got 0"),
        (float("nan"), False, "step must be at least 0, got nan"),
        (float("nan"), True, "step must be greater than 0, got nan"),
    ],
)
def test_a_number_out_of_range_is_refused(value, exclusive, message):
    with refusal(ValueError, message):
        check_number("step", value, 0, exclusive)


def test_an_infinite_number_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"step must be .*finite.*, got inf"):
        check_number("step", float("inf"), 0)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("1", "str"), (None, "NoneType"), (True, "bool"), ([1], "list"), (1j, "complex"), (np.complex64(1j), "complex64")],
)
def test_what_is_no_number_is_refused(value, kind):
    with refusal(TypeError, f"damping must be a number, got {kind}"):
        check_number("damping", value, 0)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numpy_numbers_pass(value):
    assert check_number("step", value, 0) is None


def test_spacing_defaults_to_ones():
    assert check_spacing(None, 2) == (1.0, 1.0)
    assert check_spacing(None, 3) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("spacing", [(1, 2, 3), [1.0, 2.0, 3.0], np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])])
def test_spacing_becomes_a_tuple_of_floats(spacing):
    out = check_spacing(spacing, 3)
    assert out == (1.0, 2.0, 3.0)
    assert all(type(s) is float for s in out)


@pytest.mark.parametrize("spacing", [(1, 2), (1, 1, 1, 1), (1, 0, 1), (1, -1, 1), (1, 1, float("nan")), (1e999, 1, 1)])
def test_bad_spacing_is_refused(spacing):
    with refusal(ValueError, f"spacing must be 3 positive numbers, one per axis, got {spacing}"):
        check_spacing(spacing, 3)


@pytest.mark.parametrize("spacing", [(1e200, 1.0, 1.0), (1.0, 1e-7, 1.0)])
def test_edges_that_differ_beyond_reason_are_refused(spacing):
    """Their ratio would overflow where nobody can tell why."""
    with refusal(ValueError, f"spacing must not differ by more than a factor of a million between axes, got {spacing}"):
        check_spacing(spacing, 3)
    assert check_spacing((1e5, 1.0, 1.0), 3) == (1e5, 1.0, 1.0)


@pytest.mark.parametrize(
    "spacing", [2.0, "abc", "123", (1, None, 1), object()], ids=["number", "text", "digits", "None", "object"]
)
def test_spacing_that_is_no_sequence_of_numbers_is_refused_by_name(spacing):
    with pytest.raises((TypeError, ValueError), match="spacing must be 3 positive numbers, one per axis, got"):
        check_spacing(spacing, 3)


def test_a_volume_without_its_channel_axis_is_told():
    volume = torch.rand(1, 17, 8, 9, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"fixed is taken for 17 channels in 2D, got shape \(1, 17, 8, 9\)"):
        check_images(volume, volume)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images(volume[:, :16], volume[:, :16])
        check_images(volume[:, None], volume[:, None])
