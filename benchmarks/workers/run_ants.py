"""ANTs (antspyx, PyPI): SyN with CC of radius 4 from the identity."""

import os
import time

from common import say, task

job = task()
os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(job["threads"])
import ants  # noqa: E402 (it reads the environment)

say("imported")
fixed, moving = (ants.image_read(job[key]) for key in ("fixed", "moving"))
say("loaded")
started = time.perf_counter()
settings = {"syn_metric": "CC", "syn_sampling": 4, "reg_iterations": tuple(job["iterations"])}
out = ants.registration(fixed, moving, type_of_transform="SyNOnly", initial_transform="Identity", **settings)
say("done", seconds=time.perf_counter() - started, settings=settings)
if "label" in job:
    label = ants.image_read(job["label"])
    warped = ants.apply_transforms(fixed, label, out["fwdtransforms"], interpolator="nearestNeighbor")
    ants.image_write(warped.astype("uint8"), job["output"])
