"""The command that refines ultrasound and MR: what lies where, and what is counted."""

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks.prostate import prostate


def blob(shape, centre, radius):
    axes = torch.meshgrid(*(torch.arange(s, dtype=torch.float32) for s in shape), indexing="ij")
    return (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2).float()


@pytest.fixture
def folder(tmp_path):
    """Two cases of one contrast: a gland that is smaller in the moving image, and a landmark in it."""
    for number in (3, 4):
        for role, shape, centre, radius in (
            ("fixed", (26, 28, 24), (12, 14, 11), 7),
            ("moving", (34,) * 3, (18,) * 3, 6),
        ):
            gland = blob(shape, centre, radius)
            mark = blob(shape, [c + radius / 2 * (axis == 0) for axis, c in enumerate(centre)], 1.5)
            files = {"images": gland + 0.5 * mark, "labels": torch.stack([gland, mark], -1)}
            for kind, values in files.items():
                path = tmp_path / "train" / f"{role}_{kind}" / f"case{number:06}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(values.numpy(), np.eye(4)), path)
    return tmp_path


def test_glands_are_brought_onto_each_other(folder, capsys):
    prostate(str(folder), "B", ("mse",), ("gland", "middle"))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "1 pairs of half B"
    gland, middle = ([cell.strip() for cell in row.strip("|").split("|")] for row in out[3:5])
    assert (gland[:2], middle[:2]) == (["gland", "mse"], ["middle", "mse"])
    overlap = 2 * 6**3 / (6**3 + 7**3)
    assert float(gland[2]) == pytest.approx(overlap, abs=0.02)
    assert float(middle[2]) < overlap
    for row in (gland, middle):
        assert float(row[3]) > 0.95
        assert float(row[6]) < float(row[5])
        assert row[8:] == ["0", "0"]
    assert out[5] == "0 folds"
    assert [row.split(" | ")[0] for row in out[8:]] == ["| as they are", "| center", "| rigid", "| affine", "| auto"]
    still, shifted = (row.strip("| ").split(" | ") for row in out[8:10])
    assert (still[1], shifted[1]) == ("0", "1")
    assert float(shifted[2]) == pytest.approx(overlap, abs=0.02)
    assert float(still[2]) < 0.5 * overlap


def test_a_folder_without_cases_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold \*/fixed_images/case\*.nii.gz of half B, got none in"):
        prostate(str(tmp_path))
