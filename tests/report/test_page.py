"""The HTML page: its numbers, its warnings, what it contains and refuses."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from monai_lm.fields import fold_count
from monai_lm.report import figures, write_report

pytestmark = pytest.mark.usefixtures("without_rivals")


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """Pictures cost nearly all the time of a report: only tests marked by ``drawing`` make them."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr(figures, "pictures_of", lambda _c, _v, views, kinds: {k: [b""] * len(views) for k in kinds})
        monkeypatch.setattr(figures, "curves", lambda _: b"")


@pytest.fixture
def drawing():
    """Make the pictures."""


@pytest.fixture(scope="module")
def drawn_pages():
    """Pages with their pictures, by the number of axes."""
    return {}


@pytest.fixture
def page(tmp_path, case, drawing, drawn_pages):  # noqa: ARG001
    """A page with everything on it, drawn once."""
    axes = case["fixed"].dim() - 2
    if axes not in drawn_pages:
        drawn_pages[axes] = written(tmp_path, case, prediction=case["result"].ddf)
    return drawn_pages[axes]


def written(tmp_path, case, **changes):
    return write_report(tmp_path / "report.html", **{**case, **changes}).read_text(encoding="utf-8")


def rows_of(html):
    """The table of metrics: per row its name and its values."""
    table = re.search(r'<table class="metrics">(.*?)</table>', html, re.S).group(1)
    return {
        name: re.findall(r"<td>(.*?)</td>", cells)
        for name, cells in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table, re.S)
    }


def warned(html):
    return set(re.findall(r'data-warning="(\w+)"', html))


def pictures(html):
    found = re.findall(r'<img class="\w*" src="data:image/png;base64,([^"]+)" alt="([^"]+)">', html)
    return {alt: Image.open(io.BytesIO(base64.b64decode(data))) for data, alt in found}


def folded(case):
    ddf = torch.zeros_like(case["result"].ddf)
    ddf[(0, 0, *[s // 2 for s in ddf.shape[2:]])] = 3.0
    return ddf


def dice(first, second):
    return 2 * np.logical_and(first, second).sum() / (first.sum() + second.sum())


def test_numbers_are_those_computed_independently(tmp_path, case):
    rows = rows_of(written(tmp_path, case))
    fixed, moving = (m[0, 0].numpy() for m in case["labels"])
    scores = [dice(moving == k, fixed == k) for k in (1, 2)]
    assert rows["mean Dice"] == [f"{np.mean(scores):.3f}", "1.000"]
    assert rows["Dice of label 1"] == [f"{scores[0]:.3f}", "1.000"]
    assert rows["mean HD95, mm"][1] == "0.00"
    assert float(rows["mean HD95, mm"][0]) > 0
    assert rows["TRE, mm"] == ["4.00", "0.00"]  # 2 voxels of 2 mm; the landmark with NaN does not count
    assert rows["mean |u|, mm"] == ["0.00", "4.00"]
    assert rows["folded cells"] == ["0", "0"]
    assert rows["SD of log Jacobian"] == ["0.000", "0.000"]
    assert rows["dissimilarity per voxel"] == ["0.5", "0.3"]


def test_prediction_has_a_column(tmp_path, case, make_result):
    prediction = folded(case)
    html = written(tmp_path, case, prediction=prediction, result=make_result(case["result"].ddf, folds=9, shift=0.25))
    rows = rows_of(html)
    assert rows["folded cells"] == ["0", str(int(fold_count(prediction))), "0"]
    assert rows["dissimilarity per voxel"] == ["–", "0.5", "0.3"]
    length = 6 / prediction[0, 0].numel()
    assert rows["mean |u|, mm"] == ["0.00", f"{length:.2f}", "4.00"]
    assert "moved it by 0.25 voxels" in html
    assert "Jacobian, prediction" in html


def test_the_ten_worst_labels_are_listed(tmp_path, case):
    fixed = torch.zeros_like(case["labels"][0])
    fixed.view(-1)[: 14 * 5] = torch.arange(14).repeat_interleave(5).float() + 1
    moving = fixed.clone()
    for label in range(1, 15):
        moving.view(-1)[(label - 1) * 5 : (label - 1) * 5 + label % 5] = 0
    result = case["result"]
    html = written(
        tmp_path, case, labels=(fixed, moving), result=type(result)(**{**vars(result), "ddf": 0 * result.ddf})
    )
    listed = [int(name.split()[-1]) for name in rows_of(html) if name.startswith("Dice of label")]
    assert listed == [4, 9, 14, 3, 8, 13, 2, 7, 12, 1]
    assert "the 10 with the lowest Dice" in html


def test_no_warning_without_a_reason(tmp_path, case):
    html = written(tmp_path, case, settings={"seconds": 5})
    assert warned(html) == set()
    assert 'class="verdict good"' in html
    assert "No remarks." in html


@pytest.mark.parametrize(("final", "expected"), [(0.5, {"similarity"}), (0.499, set()), (float("nan"), {"similarity"})])
def test_similarity_warning(tmp_path, case, make_result, final, expected):
    assert warned(written(tmp_path, case, result=make_result(case["result"].ddf, final=final))) == expected


def test_repair_warning_only_for_a_folded_prediction(tmp_path, case):
    smooth = case["result"].ddf * 0.5
    assert warned(written(tmp_path, case, prediction=smooth)) == set()
    assert warned(written(tmp_path, case, prediction=folded(case))) == {"repaired"}


@pytest.mark.parametrize(
    ("seconds", "settings", "expected"),
    [(5.0, {"seconds": 5}, True), (4.9, {"seconds": 5}, False), (9.0, {"seconds": None}, False), (9.0, None, False)],
)
def test_budget_warning(tmp_path, case, make_result, seconds, settings, expected):
    html = written(tmp_path, case, result=make_result(case["result"].ddf, seconds=seconds), settings=settings)
    assert ("budget" in warned(html)) is expected


@pytest.mark.parametrize(("voxels", "expected"), [(1, False), (7, True)])
def test_misalignment_warning(tmp_path, case, voxels, expected):
    fixed = torch.zeros_like(case["fixed"])
    fixed[:, :, 2:5, 2:8] = 1
    moving = fixed.roll(voxels, 2)
    html = written(tmp_path, case, fixed=fixed, moving=moving, labels=None, landmarks=None)
    assert ("misaligned" in warned(html)) is expected
    if expected:  # a prediction that brings them together is a good start
        prediction = torch.zeros_like(case["result"].ddf)
        prediction[:, 0] = voxels
        html = written(tmp_path, case, fixed=fixed, moving=moving, prediction=prediction, labels=None, landmarks=None)
        assert "misaligned" not in warned(html)


def test_worse_labels_and_landmarks_warn(tmp_path, case, make_result):
    html = written(tmp_path, case, result=make_result(-case["result"].ddf))
    assert warned(html) - {"contrast"} == {"dice", "tre", "agreement", "noise"}
    assert "the labels and the landmarks fit worse than before" in html
    assert "rose from 4.00 to 8.00 mm" in html
    assert 'class="verdict check"' in html


def test_a_field_that_folds_is_condemned(tmp_path, case, make_result):
    html = written(tmp_path, case, result=make_result(folded(case)), labels=None, landmarks=None)
    assert warned(html) - {"agreement", "extreme", "noise"} == {"folds"}  # one voxel of a small plane is a large share
    assert 'class="verdict bad"' in html
    assert "Do not use this field" in html


def test_nothing_is_loaded_from_elsewhere(page):
    assert not re.findall(r"https?:|<link|@import|<iframe", page)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.count("<img ") == page.count(' alt="')


def test_strings_from_outside_are_escaped(tmp_path, case):
    evil = "</style><script>alert('x')</script>\"&"
    html = written(tmp_path, case, title=evil, settings={evil: evil, "similarity": "lncc"})
    assert html.count("<script>") == 1
    assert "alert('x')" not in html
    assert html.count("&lt;/style&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;") == 4
    assert '<th scope="row">similarity</th><td>lncc</td>' in html


def test_pictures_have_the_proportions_of_the_patient(page, case):
    shown = {alt: image for alt, image in pictures(page).items() if alt.startswith("fixed,")}
    size = [s * e for s, e in zip(case["fixed"].shape[2:], (2, 1, 3), strict=False)]
    planes = {"axial": (0, 1)} if len(size) == 2 else {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
    for plane, (a, b) in planes.items():
        ratios = [image.size[0] / image.size[1] for alt, image in shown.items() if plane in alt]
        assert ratios == pytest.approx([size[a] / size[b]] * len(ratios), rel=0.02)
        assert len(ratios) == (1 if len(size) == 2 else 5)  # several slices per axis


@pytest.mark.usefixtures("drawing")
def test_summary_picture(tmp_path, case):
    write_report(tmp_path / "a" / "report.html", **case, png=tmp_path / "b" / "report.png")
    image = Image.open(tmp_path / "b" / "report.png")
    assert image.format == "PNG"
    assert 600 < image.size[0] < 1600
    assert 150 < image.size[1] < 1600
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["report.html", "report.png"]  # nothing half-written


def test_affine_of_a_metatensor_is_used_unless_it_is_the_identity(tmp_path, case):
    case = {**case, "affine": None}
    html = written(tmp_path, case)
    assert rows_of(html)["TRE, mm"] == ["2.00", "0.00"]
    assert "The voxel size is not known" in html
    identity = MetaTensor(case["fixed"], affine=torch.eye(4))
    assert "The voxel size is not known" in written(tmp_path, case, fixed=identity)
    if case["fixed"].dim() == 5:
        known = MetaTensor(case["fixed"], affine=torch.diag(torch.tensor([2.0, 1, 3, 1])))
        assert rows_of(written(tmp_path, case, fixed=known))["TRE, mm"] == ["4.00", "0.00"]


def test_accepted_steps_are_counted_per_level(tmp_path, case):
    html = written(tmp_path, case)
    assert "Level 1/2: 1 of 1 accepted; level 1/1: 1 of 2 accepted." in html  # a level's first entry is no step


def test_without_a_history(tmp_path, case):
    result = type(case["result"])(**{**vars(case["result"]), "history": [[]]})
    assert "No iterations were made." in written(tmp_path, case, result=result)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "report.txt"}, ValueError, r"path must end in \.html or \.htm, got 'report.txt'"),
        ({"path": 3}, TypeError, "path must be a path, got int"),
        ({"png": "x.jpg"}, ValueError, r"png must end in \.png, got 'x.jpg'"),
        ({"title": None}, TypeError, "title must be a string, got NoneType"),
        ({"fixed": [1]}, TypeError, "fixed must be a torch.Tensor, got list"),
        ({"moving": torch.zeros(1, 1, 3, 3)}, ValueError, "fixed and moving must have the same batch size and grid"),
        ({"result": None}, TypeError, "result must be a RefinementResult, got NoneType"),
        ({"prediction": torch.zeros(1, 2, 3, 3)}, ValueError, r"prediction must be \(B, n, \*S\)"),
        ({"affine": torch.zeros(4, 4)}, ValueError, r"affine must be an invertible \(4, 4\) matrix"),
        ({"labels": torch.zeros(2)}, TypeError, r"labels must be two tensors, \(fixed, moving\), got Tensor"),
        ({"labels": (torch.zeros(2), torch.zeros(2))}, ValueError, r"labels\[0\] must be \(1, 1, "),
        ({"landmarks": (torch.zeros(2, 5),) * 2}, ValueError, r"landmarks\[0\] must be \(N, "),
        ({"settings": 3}, TypeError, "settings must be a mapping, got int"),
        ({"settings": {"seconds": "long"}}, TypeError, r"settings\['seconds'\] must be a number, got str"),
    ],
)
def test_errors_name_the_argument(tmp_path, case, changes, error, message):
    with pytest.raises(error, match=message):
        write_report(**{"path": tmp_path / "report.html", **case, **changes})
    assert list(tmp_path.iterdir()) == []


def test_a_batch_and_broken_labels_are_refused(tmp_path, case):
    two = {name: torch.cat([case[name]] * 2) for name in ("fixed", "moving")}
    with pytest.raises(ValueError, match="fixed must be one pair"):
        write_report(tmp_path / "r.html", **{**case, **two})
    with pytest.raises(ValueError, match=r"labels\[1\] must hold whole numbers"):
        write_report(tmp_path / "r.html", **{**case, "labels": (case["labels"][0], case["labels"][1] * 0.5)})


def test_missing_matplotlib_names_the_extra(tmp_path, case, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"monai_lm\[report\]"):
        write_report(tmp_path / "r.html", **case)


def test_similarity_is_said_not_to_show_correctness(tmp_path, case):
    assert "Similarity alone does not show correctness: the labels and the landmarks below say more" in written(
        tmp_path, case
    )
    html = written(tmp_path, case, labels=None, landmarks=None)
    assert "Similarity alone does not show correctness: look at structures you know" in html


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_in_place_of_an_image_is_not_good(tmp_path, case, make_result, random_tensor, seed):
    noise = random_tensor(case["fixed"].shape, seed).float()
    still = make_result(torch.zeros_like(case["result"].ddf))
    html = written(tmp_path, case, moving=noise, result=still, labels=None, landmarks=None)
    assert "agreement" in warned(html)
    assert 'class="verdict check"' in html
    assert "but suspiciously: the images agree little" in html


def test_labels_and_landmarks_may_be_measured_by_functions(tmp_path, case):
    """As the command line does, whose labels lie on another grid and whose field goes on in an affine."""
    fixed = case["labels"][0]
    seen = []

    def moved(ddf):
        seen.append(ddf)
        return torch.zeros_like(fixed) if float(ddf.abs().max()) == 0 else fixed

    rows = rows_of(written(tmp_path, case, labels=(fixed, moved), landmarks=lambda ddf: 7 - float(ddf.abs().max())))
    assert rows["mean Dice"] == ["0.000", "1.000"]
    assert rows["TRE, mm"] == ["7.00", "5.00"]
    assert all(ddf.shape == case["result"].ddf.shape for ddf in seen)


def test_what_the_moving_image_has_been_through_heads_its_column(tmp_path, case):
    html = written(tmp_path, case, initial="affine only")
    assert re.findall(r'<th scope="col">(.*?)</th>', html) == ["affine only", "refined"]
    assert "<figcaption>moving, affine only</figcaption>" in html
    assert "not registered" not in html


def test_provenance_is_shown(tmp_path, case):
    made_of = {"command": "monai-lm refine --fixed <a>", "inputs": {"fixed": {"path": "/x/a.nii.gz", "sha256": "12"}}}
    html = written(tmp_path, case, provenance=made_of)
    assert "<h2>Provenance</h2>" in html
    assert '<th scope="row">command</th><td>monai-lm refine --fixed &lt;a&gt;</td>' in html
    assert '<th scope="row">path</th><td>/x/a.nii.gz</td>' in html


def test_a_mask_says_where_agreement_counts(tmp_path, case, random_tensor):
    half = case["fixed"].shape[2] // 2
    moving, mask = case["moving"].clone(), torch.zeros_like(case["fixed"])
    moving[:, :, half + 3 :] = random_tensor(moving[:, :, half + 3 :].shape).float()
    mask[:, :, : half - 1] = 1
    changes = {"moving": moving, "labels": None, "landmarks": None}
    assert "agreement" in warned(written(tmp_path, case, **changes))
    assert "agreement" not in warned(written(tmp_path, case, **changes, mask=mask))


def test_outlines_are_drawn_finely_to_be_enlarged(page):
    shown = pictures(page)
    labels, plain = (max(i.size[0] for alt, i in shown.items() if alt.startswith(n)) for n in ("labels", "fixed,"))
    assert labels == pytest.approx(2.5 * plain, abs=2)


def test_three_images_share_a_row_of_a_small_screen(tmp_path, case):
    html = written(tmp_path, case, prediction=case["result"].ddf * 0.5)
    first = re.search(r'<div class="row" style="--n:4;--m:3">(.*?)</div>', html).group(1)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", first) == [
        "fixed", "moving, as predicted", "moving, refined", "moving",
    ]  # fmt: skip
