"""FireANTs (PyPI) in its own environment: greedy registration from the identity, LNCC."""

import time

import SimpleITK as sitk  # noqa: N813 (as everyone does)
import torch
import torch.nn.functional as F
from common import say, task
from fireants.io import BatchedImages, Image
from fireants.registration.greedy import GreedyRegistration

job = task()
torch.set_num_threads(job["threads"])
say("imported")
device = job.get("device", "cpu")
fixed, moving = (BatchedImages([Image.load_file(job[key], device=device)]) for key in ("fixed", "moving"))
say("loaded")
started = time.perf_counter()
settings = {"optimizer": "Adam", "optimizer_lr": 0.5}  # its recommended ones
if job.get("optimizer") == "levenberg":
    # initial damping chosen on a validation pair at 4 and 2 mm, see docs/results.md
    damping = {"lambda_init": 30.0}
    settings = {"optimizer": "levenberg", "optimizer_lr": 0.75, "reduction": "sum", "optimizer_params": damping}
settings |= {"cc_kernel_size": 7, "smooth_warp_sigma": 0.5, "smooth_grad_sigma": 1.0, "tolerance": 0}
settings |= job.get("settings", {})
registration = GreedyRegistration(
    scales=job["scales"],
    iterations=job["iterations"],
    fixed_images=fixed,
    moving_images=moving,
    max_tolerance_iters=10**6,
    **settings,
)
registration.optimize()
peak = None
if device != "cpu":
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
seconds = time.perf_counter() - started
say("done", seconds=seconds, peak=peak, settings=settings)
if "label" in job:
    coordinates = registration.get_warped_coordinates(fixed, moving).cpu()
    label = sitk.GetArrayFromImage(sitk.ReadImage(job["label"])).astype("float32")
    warped = F.grid_sample(torch.from_numpy(label)[None, None], coordinates, mode="nearest", align_corners=True)
    out = sitk.GetImageFromArray(warped[0, 0].detach().numpy().astype("uint8"))
    out.CopyInformation(sitk.ReadImage(job["fixed"]))
    sitk.WriteImage(out, job["output"])
