"""Without the packages that they are for."""

import sys
from importlib import import_module

import pytest


@pytest.mark.parametrize("missing", ["itk", "monai_physio"])
def test_the_extra_is_named_where_monai_physio_is_missing(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "monai_lm.integrations.physio", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"physio needs monai-physio, .* pip install 'monai_lm\[physio\]'"):
        import_module("monai_lm.integrations.physio")
