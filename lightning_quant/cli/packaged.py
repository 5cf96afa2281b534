"""The configs that ship with the package, found by name from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from lightning_quant.cli.advice import UsageError, did_you_mean
from lightning_quant.utilities.paths import user_path

_PACKAGE = Path(__file__).resolve().parent.parent
# A wheel holds the configs within the package; in a checkout they lie beside it.
FOLDER = next(filter(Path.is_dir, (_PACKAGE / "configs", _PACKAGE.parent / "configs")), _PACKAGE / "configs")


def names() -> list[str]:
    """Return the names of all packaged configs, as `--config` takes them.

    Example:
        >>> "quickstart.yaml" in names()
        True
    """
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))


def describe(name: str) -> str:
    """Return the first comment line of a packaged config.

    Example:
        >>> describe("quickstart.yaml").startswith("Digits")
        True
    """
    first = (FOLDER / name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def find(given: str) -> Path:
    """Find the file that `--config given` refers to: a local file if it exists, else the packaged one.

    The suffix `.yaml` and a leading `configs/` are optional.

    Raises:
        UsageError: No local and no packaged file of that name.
    """
    if (local := user_path(given)).is_file():
        return local
    inside = given.removeprefix("./").removeprefix("configs/")
    for name in (inside, f"{inside}.yaml"):
        if name in names():
            return FOLDER / name
    if local.is_dir():
        raise UsageError(f"--config {given} is a folder; write the path of a YAML file in it.")
    near = did_you_mean(
        inside, [*names(), *(str(PurePath(given).with_name(path.name)) for path in local.parent.glob("*.y*ml"))]
    )
    raise UsageError(
        f"There is no config file {given!r}, neither here nor among the packaged configs{near}; "
        "`lightning-quant configs` lists the packaged ones."
    )


def resolve(argv: Sequence[str]) -> list[str]:
    """Replace every `--config NAME` of a command line by the path of its file.

    Inline YAML, `-` and addresses such as `s3://...` are left unchanged.

    Example:
        >>> resolve(["fit", "--trainer.max_epochs", "1"])
        ['fit', '--trainer.max_epochs', '1']
    """
    resolved: list[str] = []
    expects_path = False
    for arg in argv:
        option, equals, value = arg.partition("=")
        if expects_path:
            arg = _path(arg)
        elif equals and option in ("--config", "-c"):
            arg = f"{option}={_path(value)}"
        expects_path = not expects_path and arg in ("--config", "-c")
        resolved.append(arg)
    return resolved


def _path(value: str) -> str:
    in_place = value == "-" or value.startswith("-") or "://" in value or any(c in value for c in "\n{:")
    windows_drive = len(value) > 2 and value[1:3] in (":\\", ":/")
    return value if in_place and not windows_drive else str(find(value))
