"""Pages of the site made of the notebooks, with the outputs that these were committed with."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = "notebooks"


def on_files(files: Files, config: MkDocsConfig, **kwargs: Any) -> Files:
    """Add a page for each notebook, and its pictures beside it; called by mkdocs."""
    for path in sorted((Path(config.config_file_path).parent / FOLDER).glob("*.ipynb")):
        pictures: dict[str, bytes] = {}
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(_cell(cell, f"{path.stem}_{number}", pictures) for number, cell in enumerate(cells))
        files.append(File.generated(config, f"{FOLDER}/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{FOLDER}/{name}", content=content))
    return files


def _cell(cell: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """One cell as Markdown; its pictures are added to those of the page."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for number, output in enumerate(cell["outputs"]):
        data = output.get("data", {})
        if "image/png" in data:
            picture = f"{name}_{number}.png"
            pictures[picture] = base64.b64decode("".join(data["image/png"]))
            parts.append(f"![]({picture})")
        elif text := "".join(output.get("text") or data.get("text/plain", "")).rstrip():
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)
