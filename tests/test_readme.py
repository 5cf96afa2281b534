"""The README's two commands, the script that runs the second, and what README and documentation name."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fenced_blocks() -> list[str]:
    return [body.strip() for body in re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]


def test_the_readme_opens_with_title_sentence_and_the_two_commands() -> None:
    assert re.match(r"# .+\n\n[^\n]+\.\n\n!\[[^\n]+\n\n```", README)
    assert fenced_blocks()[:2] == ["pip install . && lightning-quant demo", 'pip install ".[test]" && pytest']


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_ci_runs_the_second_command_as_the_readme_has_it() -> None:
    shown = subprocess.run([ROOT / ".ci" / "run", "--print-command"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == fenced_blocks()[1]


def test_ci_follows_the_readme(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "README.md").write_text("# x\n```\none\n```\n\n```bash\ntwo && three\n```\n", encoding="utf-8")
    shown = subprocess.run(["bash", script, "--print-command"], capture_output=True, text=True, check=True)
    assert shown.stdout == "two && three\n"


@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "mypy"])
def test_ci_runs_the_tools(tool: str) -> None:
    assert tool in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_ci_tests_the_releases_of_pytorch_that_the_readme_names_from_the_lowest_on() -> None:
    matrix = (ROOT / ".ci" / "matrix").read_text(encoding="utf-8")
    named = re.search(r"Tested with PyTorch ([\d.]+), ([\d.]+) and ([\d.]+):", README)
    releases = re.findall(r"([\d.]+)/[\d.]+", matrix[matrix.index("releases=") :].splitlines()[0])
    assert named is not None
    assert releases == list(named.groups())
    lowest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert lowest is not None
    assert releases[0] == f"{lowest[1]}.0"
    assert ".ci/matrix" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    """Configs, files that it links to, and what its code imports."""
    from lightning_quant.cli.packaged import names

    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"--config (\S+\.yaml)", text)) <= set(names())
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        # The site makes a page of each notebook.
        notebook = ROOT / "notebooks" / f"{Path(link).stem}.ipynb"
        assert (page.parent / link).exists() or (page.parent.name == "notebooks" and notebook.exists()), link
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)
