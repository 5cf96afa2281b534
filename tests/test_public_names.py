"""`lightning_quant` exports what it says, and nothing is imported before it is used."""

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import lightning_quant

if TYPE_CHECKING:
    from types import ModuleType


@pytest.mark.parametrize("name", lightning_quant.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lightning_quant, name) is not None
    assert name in dir(lightning_quant)


def test_all_and_the_lazy_names_agree() -> None:
    module: ModuleType = lightning_quant
    assert sorted(module.__all__) == sorted(["__version__", *module._HOME])
    assert list(module._HOME) == sorted(module._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lightning_quant' has no attribute 'Nothing'"):
        lightning_quant.Nothing  # noqa: B018


def test_the_package_is_imported_without_torch() -> None:
    code = "import lightning_quant, sys; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
