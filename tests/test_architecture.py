"""Imports go downwards only: a room knows the rooms below it, and no files import each other in a circle.

What these tests cannot see: names in strings, such as the public names of ``lightning_quant.__getattr__``, class paths
of configs, kinds of quantizers (``KINDS``) and modules that ``import_module`` loads.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import lightning_quant

PACKAGE = Path(lightning_quant.__file__).parent

# What each room may import besides itself. Rooms side by side do not know each other.
_TENSORS = {"errors", "utilities", "functional"}
_LAYERS = _TENSORS | {"quantizers"}
_NETWORKS = _LAYERS | {"nn"}
_TASKS = _NETWORKS | {"models", "data", "metrics", "calibration", "tasks"}
_METHODS = {"gradient", "accuquant", "igq_vit"}
_EVERYTHING = _TASKS | _METHODS | {"analysis", "export", "report"}
MAY_IMPORT = {
    "errors": set[str](),
    "utilities": {"errors"},
    "functional": {"errors"},
    "quantizers": _TENSORS,
    "nn": _LAYERS,
    "metrics": _NETWORKS,
    "models": {"errors"},
    "data": {"errors", "utilities"},
    "calibration": _NETWORKS,
    "tasks": _NETWORKS | {"models", "data", "metrics"},
    **dict.fromkeys(_METHODS, _TASKS),
    "export": _NETWORKS | _METHODS,
    "analysis": _NETWORKS | {"metrics"},
    "report": _NETWORKS | _METHODS | {"metrics", "analysis", "calibration", "tasks"},
    # On top: they put the rooms together, and the lazy public names may be used there.
    "demo": _EVERYTHING | {""},
    "cli": _EVERYTHING | {"", "demo"},
    "__main__": {"cli"},
    # The package itself: names are imported when they are used.
    "": _EVERYTHING,
}


def room(path: Path, package: Path = PACKAGE) -> str:
    """The first folder or module below the package; empty for the package's own `__init__`."""
    first = path.relative_to(package).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_rooms(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package in a file, those inside functions included."""
    parents = ["lightning_quant", *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0, module=str(module)):
                names = [f"{module}.{alias.name}" for alias in node.names]
            case ast.ImportFrom(level=level, module=module):
                base = ".".join([*parents[: len(parents) - level + 1], *([module] if module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
            case _:
                continue
        for name in names:
            top, *below = name.split(".")
            if top == "lightning_quant":
                first = package / (below[0] if below else "__init__")
                is_room = first.is_dir() or first.with_suffix(".py").is_file()
                yield node.lineno, room(first, package) if is_room else ""


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(PACKAGE).as_posix() for path in FILES])
def test_imports_go_downwards(path: Path) -> None:
    here = room(path)
    assert here in MAY_IMPORT, f"a new room: say in MAY_IMPORT what {here!r} may import"
    upwards = [
        f"{path.relative_to(PACKAGE)}:{line} imports {there or 'lightning_quant itself'}"
        for line, there in imported_rooms(path)
        if there != here and there not in MAY_IMPORT[here]
    ]
    assert not upwards


def test_the_rule_itself_has_no_circle() -> None:
    rooms = {name: below - {""} for name, below in MAY_IMPORT.items() if name}
    while rooms:
        bottom = {name for name, below in rooms.items() if not below & rooms.keys()}
        assert bottom, f"circle among {sorted(rooms)}"
        rooms = {name: below for name, below in rooms.items() if name not in bottom}


def test_the_check_sees_an_upward_import_in_a_function(tmp_path: Path) -> None:
    (tmp_path / "functional").mkdir()
    (tmp_path / "gradient").mkdir()
    source = tmp_path / "functional" / "grid.py"
    source.write_text("def f():\n    from ..gradient import callback\n", encoding="utf-8")
    assert list(imported_rooms(source, tmp_path)) == [(2, "gradient")]


def imported_files(path: Path, package: Path = PACKAGE) -> set[Path]:
    """Files of the package that a file imports when it is imported itself, not within a function or for types only."""
    found = set()
    statements = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while statements:
        match statements.pop():
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(level=0, module=str(module), names=names):
                modules = [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.If(test=ast.Name("TYPE_CHECKING"), orelse=body):
                statements += body
                continue
            case ast.If(body=body, orelse=orelse) | ast.Try(body=body, orelse=orelse):
                statements += [*body, *orelse]
                continue
            case _:
                continue
        for module in modules:
            file = package.parent.joinpath(*module.split(".")).with_suffix(".py")
            found |= {file} if file.is_file() and package in file.parents else set()
    return found


def circle(files: Iterable[Path], package: Path = PACKAGE) -> set[Path]:
    """Files that import each other in a circle, and those between circles."""
    graph = {file: imported_files(file, package) for file in files if file.name != "__init__.py"}
    while graph:
        bottom = {file for file, below in graph.items() if not below & graph.keys()}
        if not bottom:
            return set(graph)
        graph = {file: below for file, below in graph.items() if file not in bottom}
    return set()


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle(FILES)


def test_the_check_sees_a_circle(tmp_path: Path) -> None:
    package = tmp_path / "lightning_quant"
    package.mkdir()
    texts = {
        "a": "from lightning_quant.b import f",
        "b": "from lightning_quant import c",
        "c": "import lightning_quant.a",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    assert {file.stem for file in circle(package.glob("*.py"), package)} == {"a", "b", "c"}
