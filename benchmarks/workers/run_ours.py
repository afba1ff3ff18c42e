"""monai_lm, and Adam in the same engine, from the identity or from a predicted field."""

import sys
import warnings
from pathlib import Path

from common import say, task

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))
import nibabel as nib  # noqa: E402
import torch  # noqa: E402

import monai_lm  # noqa: E402
from benchmarks.data import read_image  # noqa: E402
from benchmarks.descents import keywords  # noqa: E402
from benchmarks.gpu.measure import timed  # noqa: E402
from benchmarks.metrics import similarity_of  # noqa: E402
from monai_lm.fields import warp  # noqa: E402

job = task()
torch.set_num_threads(job["threads"])
options = job.get("options", {})
options["similarity"] = similarity_of(told := options.get("similarity", "lncc"))
say("imported")
device = torch.device(job.get("device", "cpu"))
images = [torch.from_numpy(read_image(Path(job[key]))[0])[None, None].to(device) for key in ("fixed", "moving")]
if (channels := job.get("channels", 1)) > 1:  # the image as it is, and moved
    images = [torch.cat([image.roll(k, -1) for k in range(channels)], 1) for image in images]
if options.get("memory") == "half":
    images = [(image / image.max()).half() for image in images]
shape = (1, 3, *images[0].shape[2:])  # a field so small that it is not worse than none
prediction = torch.full(shape, 1e-3, device=device) if job.get("prediction") else None
say("loaded")


def run(iterations: list[int]) -> tuple[torch.Tensor, float]:
    """The field, and the seconds it took."""
    schedule = {"scales": job["scales"], "iterations": iterations, "tolerance": 0}
    if "optimizer" in job:
        schedule |= keywords(job["optimizer"])
    result, seconds = timed(device, monai_lm.refine, *images, prediction, **(schedule | options))
    return result.ddf, seconds


first = run([1] * len(job["scales"]))[1] if job.get("warm") else None
if device.type == "cuda":
    torch.cuda.reset_peak_memory_stats(device)
ddf, seconds = run(job["iterations"])
peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
say(
    "done",
    seconds=seconds,
    first=first,
    peak=peak,
    settings={"optimizer": job.get("optimizer", "lm"), **options, "similarity": told},
)
if "label" in job:
    label, affine = read_image(Path(job["label"]))
    warped = warp(torch.from_numpy(label).float()[None, None], ddf.cpu(), mode="nearest")
    nib.save(nib.Nifti1Image(warped[0, 0].numpy().astype("uint8"), affine), job["output"])
