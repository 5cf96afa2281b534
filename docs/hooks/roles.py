"""What docstrings point to, shown as code: mkdocs knows no roles."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>~?([^<]+)</code>")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called by mkdocs for each page."""
    return _ROLE.sub(r"<code>\1</code>", html)
