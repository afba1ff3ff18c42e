"""Two files of one scene."""

import numpy as np
import pytest

from tests.apps.scenes import FIXED, MOVING, save, scene, world_of


@pytest.fixture
def pair(tmp_path):
    """A fixed and a moving file of one scene, the moving one shifted by (1.2, -0.9, 0.6) mm, on other grids."""
    shift = np.array([1.2, -0.9, 0.6])
    fixed = scene(world_of((18, 17, 14), FIXED))
    moving = scene(world_of((26, 27, 20), MOVING) - shift)
    paths = {
        "fixed": save(tmp_path / "fixed.nii.gz", fixed.astype(np.float32), FIXED),
        "moving": save(tmp_path / "moving.nii.gz", moving.astype(np.float32), MOVING),
        "labels": (
            save(tmp_path / "fl.nii.gz", (fixed > 0.3).astype(np.uint8), FIXED),
            save(tmp_path / "ml.nii.gz", (moving > 0.3).astype(np.uint8), MOVING),
        ),
    }
    points = np.array([[9.0, 10.0, 12.0], [12.5, 8.0, 10.0], [15.0, 14.0, 16.0]])
    np.savetxt(tmp_path / "fp.csv", points, delimiter=",", header="x,y,z", comments="")
    np.savetxt(tmp_path / "mp.csv", points + shift, delimiter=",")
    return paths | {"points": (tmp_path / "fp.csv", tmp_path / "mp.csv"), "shift": shift}
