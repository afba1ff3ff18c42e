"""greedy (picsl-greedy, PyPI), NCC 2x2x2, its own smoothing, from the identity; reading and writing files included."""

import time
from pathlib import Path

from common import say, task
from picsl_greedy import Greedy3D

job = task()
say("imported")
counts = dict(zip(job["scales"], job["iterations"], strict=True))
levels = [2**k for k in reversed(range(round(job["scales"][0]).bit_length()))]
iterations = "x".join(str(counts.get(level, 0)) for level in levels)
field = job.get("field") or Path(job["output"]).with_suffix(".warp.nii.gz")
say("loaded")
started = time.perf_counter()
pair = f"{job['fixed']} {job['moving']}"
Greedy3D().execute(f"-d 3 -i {pair} -m NCC 2x2x2 -n {iterations} -o {field} -threads {job['threads']}")
say("done", seconds=time.perf_counter() - started, settings={"-m": "NCC 2x2x2", "-n": iterations})
if "label" in job:
    Greedy3D().execute(f"-d 3 -rf {job['fixed']} -ri NN -rm {job['label']} {job['output']} -r {field}")
