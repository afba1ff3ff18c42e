"""OnFixedGridd: what lies on the fixed grid says so."""

import torch
from monai.data import MetaTensor

from monai_lm.transforms import OnFixedGridd


def test_metadata_become_those_of_the_fixed_image_and_the_pair():
    fixed, moving = (
        MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([k, k, k, 1.0]))) for k in (2.0, 3.0)
    )
    data = {"fixed": fixed, "moving": moving, "name": "a__b", "pred": torch.ones(3, 4, 4, 4)}
    out = OnFixedGridd(["pred", "absent"])(data)
    assert torch.equal(out["pred"].affine, fixed.affine)
    assert torch.equal(torch.as_tensor(out["pred"].meta["moving_affine"]), moving.affine)
    assert out["pred"].meta["filename_or_obj"] == "a__b.nii.gz"
    assert torch.equal(out["pred"].as_tensor(), data["pred"])
    assert "absent" not in out
