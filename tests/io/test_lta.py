"""FreeSurfer's LTA, from source (moving) to destination (fixed)."""

import sys

import numpy as np
import pytest

from monai_lm.io import read_affine

VOLUME = """valid = 1  # volume info valid
filename = {0}.mgz
volume = {1}
voxelsize = {2}
xras   = -1 0 0
yras   = 0 0 -1
zras   = 0 1 0
cras   = {3}
"""
MATRIX = np.array([[1.1, 0.1, -0.05, 3.0], [-0.2, 0.9, 0.02, -4.0], [0.03, 0.04, 1.2, 5.0], [0, 0, 0, 1]])
SOURCE, DESTINATION = ("a", "10 12 14", "1 1.5 2", "3 4 5"), ("b", "8 9 10", "2 2 2", "-1 2 -3")


def lta(kind, matrix, head="# transform file\n"):
    rows = "\n".join(" ".join(f"{v:.15e}" for v in row) for row in matrix)
    return (
        f"{head}type      = {kind} # LINEAR\nnxforms   = 1\nmean      = 0.0 0.0 0.0\nsigma     = 1.0\n1 4 4\n{rows}\n"
        f"src volume info\n{VOLUME.format(*SOURCE)}dst volume info\n{VOLUME.format(*DESTINATION)}"
    )


def affine(volume):
    size, zooms, centre = (np.array(words.split(), float) for words in volume[1:])
    out = np.eye(4)
    out[:3, :3] = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]]) * zooms
    out[:3, 3] = centre - out[:3, :3] @ (size / 2)
    return out


def test_it_leads_from_the_fixed_to_the_moving_image(tmp_path):
    pytest.importorskip("nitransforms")
    (tmp_path / "x.lta").write_text(lta(1, MATRIX))
    np.testing.assert_allclose(read_affine(tmp_path / "x.lta"), np.linalg.inv(MATRIX), atol=1e-5)
    voxels = np.linalg.inv(affine(DESTINATION)) @ MATRIX @ affine(SOURCE)
    (tmp_path / "x.lta").write_text(lta(0, voxels))
    np.testing.assert_allclose(read_affine(tmp_path / "x.lta"), np.linalg.inv(MATRIX), atol=1e-4)


def test_others_are_refused(tmp_path):
    pytest.importorskip("nitransforms")
    whole = lta(1, MATRIX)
    (tmp_path / "x.lta").write_text("")
    with pytest.raises(ValueError, match=r"x.lta must hold a linear transform, got an empty file"):
        read_affine(tmp_path / "x.lta")
    for content in ("a letter", whole[:100], whole[:400], whole.replace("1.0", "one")):
        (tmp_path / "x.lta").write_text(content)
        with pytest.raises(ValueError, match=r"x.lta must be (an LTA of one transform, got|an invertible)"):
            read_affine(tmp_path / "x.lta")
    for content in (lta(14, MATRIX), lta(0, MATRIX).replace("valid = 1", "valid = 0")):
        (tmp_path / "x.lta").write_text(content)
        with pytest.raises(ValueError, match=r"x.lta must be between RAS .* got type (14 and v|0 and inv)alid"):
            read_affine(tmp_path / "x.lta")


def test_without_nitransforms_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.lta").write_text(lta(1, MATRIX))
    for name in ("nitransforms", "nitransforms.io", "nitransforms.io.lta"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"x.lta must be read with nitransforms, in the freesurfer extra: "):
        read_affine(tmp_path / "x.lta")
