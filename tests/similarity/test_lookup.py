"""Looking measures up by name, module or class."""

import re

import pytest
from torch import nn

from monai_lm.similarity import LNCC, MI, MIND, MSE, NCC, Combined, MappedLNCC, ModuleSimilarity, get_similarity
from monai_lm.similarity.auto import Auto
from monai_lm.similarity.lookup import MEASURES, name_of
from monai_lm.similarity.weighted import Weighted

KINDS = {"auto": Auto, "lncc": LNCC, "mapped_lncc": MappedLNCC, "mi": MI, "mind": MIND, "mse": MSE, "ncc": NCC}


@pytest.mark.parametrize(("name", "kind"), KINDS.items(), ids=KINDS)
def test_a_name_gives_the_measure_with_its_defaults(name, kind):
    measure = get_similarity(name)
    assert type(measure) is kind
    assert vars(measure) == vars(kind())


def test_a_measure_is_returned_as_it_is():
    measure = LNCC(radius=2)
    assert get_similarity(measure) is measure


def test_a_module_is_wrapped():
    module = nn.L1Loss()
    measure = get_similarity(module)
    assert type(measure) is ModuleSimilarity
    assert measure.module is module


@pytest.mark.parametrize("name", ["ssim", "LNCC", ""])
def test_an_unknown_name_is_refused(name):
    message = f"similarity must be one of {sorted([*MEASURES, 'auto'])} or a loss module, got '{name}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_similarity(name)


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (None, "NoneType"), (nn.functional.mse_loss, "function")])
def test_anything_else_is_refused(value, kind):
    message = f"similarity must be a name, a Similarity or a torch.nn.Module, got {kind}"
    with pytest.raises(TypeError, match=message):
        get_similarity(value)


def test_a_measure_is_told_by_its_name():
    assert {name: name_of(make()) for name, make in MEASURES.items()} == {name: name for name in MEASURES}
    assert name_of(Weighted(MIND())) == "mind"
    assert name_of(ModuleSimilarity(nn.L1Loss())) == "L1Loss"
    assert name_of(Combined(["mse"], [1])) == "Combined"
