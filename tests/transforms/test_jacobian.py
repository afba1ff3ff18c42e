"""JacobianDeterminant(d): known maps, whatever the grids on either side, with and without the logarithm."""

import math
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImaged

from monai_lm.apps.jacobian import jacobian_field
from monai_lm.io import write_ddf
from monai_lm.transforms import JacobianDeterminant, JacobianDeterminantd, LoadDDFd

AFFINE = torch.tensor([[0, -1.5, 0, 9.0], [2.0, 0, 0, -4.0], [0, 0, 1.0, 3.0], [0, 0, 0, 1]], dtype=torch.float64)
SIZES = pytest.mark.parametrize("size", [(7, 6), (6, 5, 7)], ids=["2D", "3D"])


def linear(size, matrix):
    """The field of ``x -> (1 + matrix) x``."""
    voxels = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"))
    return torch.einsum("ac,c...->a...", matrix, voxels)


@pytest.fixture
def matrix(random_tensor):
    return lambda n: 0.2 * random_tensor((n, n))


@SIZES
def test_a_linear_map_has_its_determinant_and_its_logarithm_everywhere(size, matrix):
    change = matrix(len(size))
    expected = float(torch.det(torch.eye(len(size)).double() + change))
    ddf = linear(size, change)
    for given in (ddf, ddf.float().numpy()):
        out = JacobianDeterminant()(given)
        assert not isinstance(out, MetaTensor)
        torch.testing.assert_close(out, torch.full((1, *size), expected), rtol=1e-5, atol=0)
        torch.testing.assert_close(JacobianDeterminant(log=True)(given), out.log())


def test_the_logarithm_has_a_floor_where_a_map_turns_over():
    mirrored = linear((5, 6), torch.diag(torch.tensor([-2.0, 0.0], dtype=torch.float64)))
    assert (JacobianDeterminant()(mirrored) == -1).all()
    assert JacobianDeterminant(log=True)(mirrored).unique().tolist() == pytest.approx([math.log(1e-3)])


@SIZES
def test_spacing_does_not_matter_and_the_affine_stays(size, matrix):
    ddf, out = linear(size, matrix(len(size))).float(), []
    for spacing in (1.0, 2.5):
        affine = AFFINE @ torch.diag(torch.tensor([spacing, 1, 1, 1], dtype=torch.float64))
        meta = {"filename_or_obj": "a/fixed.nii.gz", "moving_affine": affine.clone()}
        out.append(JacobianDeterminant()(MetaTensor(ddf, affine=affine, meta=meta)))
        assert out[-1].shape == (1, *size)
        assert torch.equal(out[-1].affine, affine)
        assert out[-1].meta["filename_or_obj"] == "a/fixed.nii.gz"
    assert torch.equal(*(o.as_tensor() for o in out))
    assert torch.equal(out[0].as_tensor(), JacobianDeterminant()(ddf))


@SIZES
def test_the_determinant_is_that_in_space_whatever_the_grid_that_the_field_leads_to(size, matrix):
    n, change = len(size), matrix(len(size))
    there = torch.diag(torch.tensor([-0.5, 3.0, 1.0, 1.0], dtype=torch.float64)) @ AFFINE  # mirrored, other edges
    between = torch.linalg.solve(there, AFFINE)[:n, :n]
    ddf = linear(size, between @ (torch.eye(n).double() + change) - torch.eye(n).double())
    out = JacobianDeterminant()(MetaTensor(ddf, affine=AFFINE, meta={"moving_affine": there}))
    expected = float(torch.det(torch.eye(n).double() + change))
    torch.testing.assert_close(out.as_tensor(), torch.full((1, *size), expected), rtol=1e-5, atol=0)


def test_the_dictionary_version_stores_what_the_array_version_gives(matrix):
    data = {"ddf": linear((5, 6), matrix(2)), "other": linear((4, 5, 6), matrix(3))}
    out = JacobianDeterminantd("ddf")(data)
    assert list(out) == ["ddf", "other", "jacobian"]
    assert out["ddf"] is data["ddf"]
    assert torch.equal(out["jacobian"], JacobianDeterminant()(data["ddf"]))
    both = pickle.loads(pickle.dumps(JacobianDeterminantd(["ddf", "other"], ["one", "two"], log=True)))(data)
    for key, name in (("ddf", "one"), ("other", "two")):
        assert torch.equal(both[name], JacobianDeterminant(log=True)(data[key]))
    assert torch.equal(JacobianDeterminantd("other", None)(data)["other"], JacobianDeterminant()(data["other"]))
    assert "jacobian" not in JacobianDeterminantd("field", allow_missing_keys=True)(data)
    with pytest.raises(KeyError, match="field"):
        JacobianDeterminantd("field")(data)


def test_a_pipeline_writes_what_the_command_line_does(tmp_path, matrix):
    ddf = linear((6, 5, 7), matrix(3)).numpy()
    write_ddf(tmp_path / "field.nii.gz", ddf, AFFINE.numpy())
    save = {"output_dir": tmp_path, "output_postfix": "jacobian", "separate_folder": False, "print_log": False}
    pipeline = Compose([LoadDDFd("ddf"), JacobianDeterminantd("ddf"), SaveImaged("jacobian", **save)])
    pipeline({"ddf": tmp_path / "field.nii.gz"})
    jacobian_field(tmp_path / "field.nii.gz", tmp_path / "command.nii.gz")
    ours, command = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("field_jacobian", "command"))
    np.testing.assert_allclose(ours.affine, command.affine, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.get_fdata(), command.get_fdata(), rtol=1e-6)


@pytest.mark.parametrize(("keys", "output_keys"), [(["a", "b"], "jacobian"), (["a", "b"], ["c", "c"]), ("a", [])])
def test_output_keys_are_one_per_key(keys, output_keys):
    with pytest.raises(ValueError, match="output_keys must be one per key of"):
        JacobianDeterminantd(keys, output_keys)


@pytest.mark.parametrize(
    ("ddf", "message"),
    [
        (torch.zeros(2, 4, 4, 4), r"ddf must be \(n, \*S\).* got shape \(2, 4, 4, 4\)"),
        (torch.zeros(3, 4, 4, 1), "at least 2 voxels along every axis"),
        (torch.full((2, 4, 4), torch.nan), "ddf must be finite"),
    ],
)
def test_what_is_no_field_is_refused(ddf, message):
    with pytest.raises(ValueError, match=message):
        JacobianDeterminant()(ddf)
