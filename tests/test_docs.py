"""The documentation: its snippets run as printed, its names can be imported, its links lead somewhere."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from monai_lm import transforms
from monai_lm.apps import cli
from monai_lm.apps.demo import endpoint_error
from monai_lm.fields import fold_count
from monai_lm.io import FORMATS, READABLE
from monai_lm.similarity.lookup import MEASURES

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bundles").glob("*/docs/README.md")),
]
PAGE_IDS = [str(path.relative_to(ROOT)) for path in PAGES]


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """``run_page(name)``: the names that the Python blocks of a page leave, run one after the other."""
    pytest.importorskip("nilearn", reason="the snippets start with the demo's brain, which needs nilearn")
    monkeypatch.chdir(tmp_path)

    def run(name):
        names = {}
        for block in python_blocks(ROOT / name):
            exec(compile(block, name, "exec"), names)
        return names

    return run


def test_the_readmes_snippets_refine_the_same_field_from_tensors_and_from_files(run_page, tmp_path):
    names = run_page("README.md")
    example, result = names["example"], names["result"]
    assert endpoint_error(example, result.ddf)[0] < 0.9 * endpoint_error(example, example.prediction)[0]
    assert int(fold_count(result.ddf)) == 0
    torch.testing.assert_close(torch.as_tensor(names["data"]["ddf"])[None], result.ddf, rtol=0, atol=0.05)
    assert [path.name for path in (tmp_path / "fields").iterdir()] == ["fixed_ddf.nii.gz"]


def test_the_snippets_on_usage_refine(run_page):
    names = run_page("docs/usage.md")
    example = names["example"]
    start = endpoint_error(example, example.prediction)[0]
    for ddf in (names["result"].ddf, names["masked"].ddf, names["ddf"], names["matched"], names["refined"]):
        assert endpoint_error(example, ddf)[0] < 0.97 * start
    assert endpoint_error(example, names["across"].ddf)[0] < 0.65 * start
    assert endpoint_error(example, names["chosen"].ddf)[0] < 0.35 * start
    assert names["chosen"].similarity == "mapped_lncc"


def test_the_commands_on_usage_follow_one_another():
    """What a command reads, an earlier block has made; images of the Decathlon aside."""
    text = (ROOT / "docs/usage.md").read_text()
    made = {f"{name}.nii.gz" for name in ("fixed", "moving", "mask", "predicted")}
    folders, commands = set(), 0
    first = text.index("write_ddf(")
    for block in re.finditer(r"```bash\n(.*?)```", text, re.DOTALL):
        assert block.start() > first
        for line in block[1].splitlines():
            made |= set(re.findall(r"> (\S+)$", line))
            options = dict(re.findall(r"--(\w+) (\S+)", line))
            commands += line.startswith("monai-lm")
            for name in ("fixed", "moving", "ddf", "fixed_mask", "pairs"):
                path = options.get(name, "imagesTr/")
                assert path in made or path.startswith("imagesTr/") or Path(path).parent.name in folders, line
            made.add(options.get("output"))
            if folder := options.get("output_dir"):
                assert folder not in folders, line
                folders.add(folder)
    assert commands >= 7


def exists(dotted):
    """Whether there is an object of this dotted name, as far as one can tell without the packages that it needs."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if str(error.name).split(".")[0] != parts[0]:
                return True
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_names_of_the_package_can_be_imported(page):
    wanted = set(re.findall(r"\bmonai_lm(?:\.[A-Za-z_]\w*)+", page.read_text()))
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "monai_lm":
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert [name for name in sorted(wanted) if not exists(name)] == []


def of_argument(documented, name):
    """What a docstring says of an argument."""
    return re.search(rf"^ +{name}: (.+?)(?=^ +\w+: |^$|\Z)", inspect.getdoc(documented), re.MULTILINE | re.DOTALL)[1]


USAGE, FORMAT_PAGE = ((ROOT / "docs" / name).read_text() for name in ("usage.md", "file_formats.md"))
ROWS = re.findall(r"^\| (`.+?) \|", FORMAT_PAGE, re.MULTILINE)


LISTS = {
    "SaveDDF": (of_argument(transforms.SaveDDF, "file_format"), FORMATS),
    "SaveDDFd": (of_argument(transforms.SaveDDFd, "file_format"), FORMATS),
    "LoadDDF": (of_argument(transforms.LoadDDF, "file_format"), READABLE),
    "monai-lm refine": (of_argument(cli._options, "file_format"), FORMATS),
    "monai-lm apply": (of_argument(cli.apply, "file_format"), READABLE),
    "monai-lm convert": (of_argument(cli.convert, "file_format"), READABLE),
    "monai-lm convert --to": (of_argument(cli.convert, "to"), FORMATS),
    "usage.md": (re.search(r"`--file_format` (.+?)\)", USAGE, re.DOTALL)[1], FORMATS),
    "file_formats.md": (" ".join(ROWS), READABLE),
    "file_formats.md, written": (" ".join(row for row in ROWS if "read only" not in row), FORMATS),
    "monai-lm refine --similarity": (of_argument(cli._options, "similarity"), MEASURES),
    "usage.md, similarity": (re.search(r"`similarity` is (.+?)module", USAGE, re.DOTALL)[1], MEASURES),
}


@pytest.mark.parametrize(("told", "names"), LISTS.values(), ids=LISTS)
def test_lists_of_names_are_those_of_the_tables(told, names):
    assert set(re.findall(r"\w+", told)) & {*READABLE, *MEASURES} == set(names)


def anchors(path):
    """What a heading is called in a link."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        headed = target.suffix == ".md" and target.name != "api.md"  # the API's headings come from docstrings
        if not target.exists() or (anchor and headed and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
