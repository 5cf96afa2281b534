"""Examples of docstrings as code: the parser knows the heading "Examples" alone, the docstrings say "Example"."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the heading before a docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it reads."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
