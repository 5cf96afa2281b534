"""The README's two commands, and the script that runs the second."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced_blocks() -> list[str]:
    return [body.strip() for body in re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]


def test_the_readme_opens_with_title_sentence_and_the_two_commands() -> None:
    assert re.match(r"# .+\n\n[^\n]+\.\n\n```", README)
    assert fenced_blocks()[:2] == ["pip install . && lightning-quant demo", 'pip install ".[test]" && pytest']


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


def test_the_configs_that_the_readme_names_exist() -> None:
    from lightning_quant.cli.packaged import names

    assert set(re.findall(r"--config (\S+\.yaml)", README)) <= set(names())
