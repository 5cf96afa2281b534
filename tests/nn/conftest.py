from collections.abc import Iterator

import pytest

from lightning_quant.nn import ATTENTIONS


@pytest.fixture(autouse=True)
def _keep_the_registry() -> Iterator[None]:
    known = dict(ATTENTIONS)
    yield
    ATTENTIONS.clear()
    ATTENTIONS.update(known)
