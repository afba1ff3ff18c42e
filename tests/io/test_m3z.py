"""FreeSurfer's morphs, made as ``GCAMwrite`` writes them: places of nodes in voxels of the source or in RAS."""

import gzip
import struct

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from monai_lm.apps.info import describe_file
from monai_lm.io import guess_format, read_ddf, read_m3z_ddf

NODES, OTHER = (7, 6, 5), (12, 11, 13)
TURN = Rotation.from_euler("XYZ", (20, -35, 50), degrees=True).as_matrix()
NODE = np.dtype([("before", ">f4", 3), ("place", ">f4", 3), ("node", ">i4", 3)])


def about(matrix):
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix, (7.0, -20.0, 30.0)
    return out


ATLASES = {
    "RAS": about(np.diag([1.5, 2.0, 3.0])),
    "LPS": about(np.diag([-1.5, -2.0, 3.0])),
    "LAS": about(np.diag([-1.5, 2.0, 3.0])),
    "LIA": about(np.array([[-1.2, 0, 0], [0, 0, 1.5], [0, -1.0, 0]])),
    "oblique": about(TURN @ np.diag([1.5, -2.0, 2.5])),
}
MOVING = about(TURN.T @ np.diag([1.4, 1.2, -2.0]))


def geometry(affine, size, valid=1):
    """Size, spacing, directions and the place of the voxel at half the size, as FreeSurfer's ``c_ras``."""
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    centre = affine @ [*(np.array(size) / 2), 1]
    return struct.pack(">4i15f512s", valid, *size, *edges, *(affine[:3, :3] / edges).T.ravel(), *centre[:3], b"a.mgz")


def places(affine, size, step=1):
    voxels = step * np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def morph(path, led, atlas, kind=2, spacing=1, invalid=None):
    """Write where nodes are led, RAS millimetres ``(*S, 3)``; returns the bytes before compression."""
    nodes = np.zeros(led.shape[:3], NODE)
    inverse = np.linalg.inv(MOVING)
    nodes["place"] = led if kind == 1 else led @ inverse[:3, :3].T + inverse[:3, 3]
    nodes["before"] = 1.0
    if invalid is not None:
        nodes["before"][invalid], nodes["place"][invalid] = 0, 0
    size = [spacing * s for s in led.shape[:3]]
    content = struct.pack(">f4if", 1.0, *led.shape[:3], spacing, 20.0) + nodes.tobytes()
    content += struct.pack(">i", 10) + geometry(MOVING, OTHER) + geometry(atlas, size)
    content += struct.pack(">ii", 11, kind) + struct.pack(">i", 12) + bytes(4 * nodes.size)
    content += struct.pack(">iiq", 31, 0, 1600) + b"Matrix 1 0 0 0".ljust(1600, b"\0")
    path.write_bytes(gzip.compress(content) if path.suffix == ".m3z" else content)
    return content


@pytest.mark.parametrize("atlas", ATLASES.values(), ids=ATLASES)
@pytest.mark.parametrize(
    ("kind", "spacing", "suffix"), [(2, 1, ".m3z"), (1, 1, ".m3d"), (2, 2, ".m3z"), (1, 3, ".m3d")]
)
def test_nodes_are_led_where_they_are_in_any_grids(tmp_path, atlas, kind, spacing, suffix):
    path = tmp_path / f"talairach{suffix}"
    led = places(atlas, NODES, spacing) + [1.25, -2.5, 0.75] + np.sin(places(np.eye(4), NODES) / 2) @ TURN
    morph(path, led, atlas, kind, spacing)
    assert guess_format(path) == "m3z"
    ddf, affine = read_ddf(path, moving_affine=MOVING)
    np.testing.assert_allclose(places(affine, NODES), places(atlas, NODES, spacing), atol=1e-4)
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in NODES], indexing="ij"))
    np.testing.assert_allclose(np.moveaxis(voxels + ddf, 0, -1) @ MOVING[:3, :3].T + MOVING[:3, 3], led, atol=1e-3)


def test_invalid_nodes_are_displaced_as_the_nearest_others(tmp_path):
    atlas, invalid = ATLASES["LIA"], np.zeros(NODES, bool)
    invalid[:2], invalid[:, 0, 0] = True, True
    led = places(atlas, NODES) + np.arange(NODES[0])[:, None, None, None]
    morph(tmp_path / "m.m3z", led, atlas, invalid=invalid)
    ddf, affine = read_m3z_ddf(tmp_path / "m.m3z")
    shift = np.einsum("ij,j...->i...", affine[:3, :3], ddf)
    np.testing.assert_allclose(shift[:, :2, 2], 2, atol=1e-3)
    np.testing.assert_allclose(shift[:, 4, 0, 0], 4, atol=1e-3)
    morph(tmp_path / "m.m3z", led, atlas, invalid=np.ones(NODES, bool))
    with pytest.raises(ValueError, match=r"m.m3z must have valid nodes, got none"):
        read_m3z_ddf(tmp_path / "m.m3z")


def test_what_is_no_morph_or_broken_is_named(tmp_path):
    path, atlas = tmp_path / "m.m3d", ATLASES["RAS"]
    whole = morph(path, places(atlas, NODES), atlas)
    assert describe_file(path)["format"] == "m3z"
    tags = 24 + 36 * int(np.prod(NODES))
    at = tags + 4 + 588
    broken = {
        r"must be a whole morph of FreeSurfer's, got .*an empty file": b"",
        r"must be a whole morph of FreeSurfer's, got .*the version 2, not 1": struct.pack(">f", 2.0) + whole[4:],
        r"must be a whole morph of FreeSurfer's, got .*nodes 1 voxels apart in": whole[:300],
        r"must be a whole morph of FreeSurfer's, got .*nodes 0 voxels": whole[:16] + bytes(4) + whole[20:],
        r"must be a whole morph of FreeSurfer's, got .*the tag 10 of 1176 bytes, 60 bytes before": whole[: tags + 64],
        r"must be a whole morph of FreeSurfer's, got .*7 as what its places are": whole[:tags]
        + struct.pack(">ii", 11, 7),
        r"must say where its atlas lies": whole[:tags],
        r"must say where its atlas lies, the grid": whole[:at] + bytes(4) + whole[at + 4 :],
        r"must say where its source lies": whole[: tags + 4] + bytes(4) + whole[tags + 8 :],
        r"must be finite, got 1 NaN": whole[:36] + struct.pack(">f", np.nan) + whole[40:],
    }
    for message, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"m.m3d {message}"):
            read_m3z_ddf(path)
    path.with_suffix(".m3z").write_bytes(gzip.compress(whole)[:200])
    with pytest.raises(ValueError, match=r"m.m3z must be a whole morph of FreeSurfer's, got"):
        read_m3z_ddf(path.with_suffix(".m3z"))
