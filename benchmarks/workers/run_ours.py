"""monai_lm, and Adam in the same engine, from the identity or from a predicted field."""

import sys
import time
import warnings
from pathlib import Path

from common import say, task

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))
import nibabel as nib  # noqa: E402
import torch  # noqa: E402

import monai_lm  # noqa: E402
from benchmarks.adam import refine_with_adam  # noqa: E402
from benchmarks.data import read_image  # noqa: E402
from monai_lm.compilation import compiled  # noqa: E402
from monai_lm.fields import warp  # noqa: E402

job = task()
torch.set_num_threads(job["threads"])
options = job.get("options", {})
with torch.no_grad():
    compiled(warp)(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4))  # import the compiler, as other imports
say("imported")
images = [torch.from_numpy(read_image(Path(job[key]))[0]).float()[None, None] for key in ("fixed", "moving")]
if options.get("memory") == "half":
    images = [(image / image.max()).half() for image in images]
prediction = torch.zeros(1, 3, *images[0].shape[2:]).add_(1.0) if job.get("prediction") else None
say("loaded")


def run(iterations: list[int]) -> tuple[torch.Tensor, float]:
    """The field, and the seconds it took."""
    started = time.perf_counter()
    if job.get("optimizer") == "adam":
        sigmas = (2.0, 2.0, 2.0, 1.0)
        ddf = refine_with_adam(
            images[0], images[1], prediction, job["scales"], iterations, sigmas, 0.25, True, 0, "lncc"
        )
    else:
        settings = {"tolerance": 0, "compile": True, **options}
        ddf = monai_lm.refine(
            images[0], images[1], prediction, scales=job["scales"], iterations=iterations, **settings
        ).ddf
    return ddf, time.perf_counter() - started


first = run([1] * len(job["scales"]))[1] if job.get("warm") else None
ddf, seconds = run(job["iterations"])
say("done", seconds=seconds, first=first, settings={"optimizer": job.get("optimizer", "lm"), **options})
if "label" in job:
    label, affine = read_image(Path(job["label"]))
    warped = warp(torch.from_numpy(label).float()[None, None], ddf, mode="nearest")
    nib.save(nib.Nifti1Image(warped[0, 0].numpy().astype("uint8"), affine), job["output"])
