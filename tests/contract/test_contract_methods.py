"""A method is one folder, and one line: the promise of ``methods`` and of CONTRIBUTING, counted."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import underpaint
from underpaint.v1 import edit_service_pb2, inversion_service_pb2
from underpaint_server import methods
from underpaint_server.jobs import EditOptions, InversionMethod
from underpaint_server.methods import INVERSIONS, METHODS, base, methods_for
from underpaint_server.methods.message import InversionMessage, Message
from underpaint_server.methods.task import Preparation

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "service" / "src" / "underpaint_server"
CLIENT = ROOT / "client" / "src" / "underpaint"
FOLDERS = sorted(path.parent.name for path in (SERVER / "methods").glob("*/options.py"))
MOST_FILES = 8

EXCEPTIONS = {
    "check_model.py": {"EdictInversion", "DdimInversion"},  # it proves EDICT's round trip, and times passes with DDIM
    "self_test.py": {"EdictInversion", "DdimInversion"},  # EDICT's round trip, alone and beside DDIM
    "jobs.py": {"ddim"},  # the sampler of that name
    "plans.py": {"disentangled"},  # learning is that method's, and a job of its own
    "programs/learn.py": {"disentangled"},
}
"""File of the server -> names of methods or of their options that it may use, and why."""


METHODS_PREFIX = "underpaint_server.methods."


def source_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*.py") if "v1" not in path.relative_to(root).parts]


def names_in(path: Path) -> Iterator[str]:
    """Identifiers, parts of imports, and strings that are no docstrings."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.ImportFrom(module=module, names=aliases):
                folder = f"{module}."
                yield from folder.removeprefix(METHODS_PREFIX).split(".") if folder.startswith(METHODS_PREFIX) else ()
                yield from (alias.name for alias in aliases)
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield from alias.name.split(".")
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield text


def words_of(name: str) -> set[str]:
    """What a file has to say to know a method: its name, or its options."""
    inversion = INVERSIONS.get(name)
    return {name, METHODS[name].options.__name__} | ({inversion.__name__} if inversion else set())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_holds_all_that_is_a_methods_own(name: str) -> None:
    options, steps, wire = (import_module(f"{methods.__name__}.{name}.{part}") for part in ("options", "steps", "wire"))
    assert METHODS[name] is options.METHOD
    assert options.METHOD.name == name
    assert issubclass(options.METHOD.options, EditOptions)
    cls = options.METHOD.options
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "a dataclass without a docstring gets its signature as one"
    assert callable(steps.edit)
    assert isinstance(wire.MESSAGE, Message)
    prepare = base.part(name, "prepare")
    assert prepare is None or isinstance(prepare.PREPARATION, Preparation)
    if name in INVERSIONS:
        assert issubclass(INVERSIONS[name], InversionMethod)
        assert callable(steps.invert)
        assert callable(steps.from_noise)
        assert isinstance(wire.INVERSION, InversionMessage)


def test_tables_folders_contract_and_client_have_the_same_methods() -> None:
    edits = edit_service_pb2.EditRequest.DESCRIPTOR.oneofs_by_name["method"]
    inversions = inversion_service_pb2.InversionParameters.DESCRIPTOR.oneofs_by_name["method"]
    assert sorted(METHODS) == FOLDERS == sorted(field.name for field in edits.fields)
    assert sorted(INVERSIONS) == sorted(field.name for field in inversions.fields)
    assert sorted(METHODS) == sorted(underpaint.methods.EDIT_METHODS)
    assert sorted(INVERSIONS) == sorted(underpaint.methods.INVERSION_METHODS)


def test_a_model_without_text_has_the_methods_that_need_none() -> None:
    assert methods_for(reads_text=True) == tuple(METHODS)
    assert set(METHODS) - set(methods_for(reads_text=False)) == {"diffedit", "disentangled"}


@pytest.mark.parametrize("path", source_files(SERVER), ids=lambda path: str(path.relative_to(SERVER)))
def test_general_code_knows_no_method_and_methods_know_no_other(path: Path) -> None:
    relative = path.relative_to(SERVER)
    own = relative.parts[1] if relative.parts[0] == "methods" and len(relative.parts) == 3 else ""
    if str(relative) == "methods/__init__.py":
        return  # the table
    foreign = {word for name in FOLDERS if name != own for word in words_of(name)}
    used = foreign & set(names_in(path))
    # A method may start from another's inversion.
    allowed = {cls.__name__ for cls in INVERSIONS.values()} if own else EXCEPTIONS.get(str(relative), set())
    # An import of one of these names has the folder in its path.
    folders = {name for name in FOLDERS if words_of(name) & allowed}
    assert used - folders <= allowed, "use a hook of Method, Preparation or Message, and fill it in the method's folder"


@pytest.mark.parametrize(
    "path", sorted((SERVER / "methods").glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_of_another_method_only_the_options_are_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(METHODS_PREFIX):
            folder, _, part = (node.module or "").removeprefix(METHODS_PREFIX).partition(".")
            assert folder in (path.parent.name, *("base", "cost", "message", "task")) or part == "options"


def contributing_row(thing: str) -> list[str]:
    """The files that CONTRIBUTING says to touch for one more of a thing."""
    table = (ROOT / "CONTRIBUTING.md").read_text()
    (cell,) = re.findall(rf"^\| {thing} \| (.*) \|$", table, re.MULTILINE)
    return re.findall(r"`([^`]+)`", cell)


def test_contributing_names_few_files_for_a_method_and_they_exist() -> None:
    files = contributing_row("a method")
    assert len(files) == len(set(files)) <= MOST_FILES
    assert [file for file in files if not (ROOT / file.replace("NAME", "sdedit")).is_file()] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_method_is_known_in_no_more_files_than_contributing_names(name: str) -> None:
    """Counted in what stands here: every file that uses the method's name, or its options' name, server and client."""
    client = underpaint.methods.EDIT_METHODS[name].__name__
    rows = {file.replace("NAME", name) for file in contributing_row("a method")}
    using = {
        str(path.relative_to(ROOT))
        for root, words in ((SERVER, {name, METHODS[name].options.__name__}), (CLIENT, {name, client}))
        for path in source_files(root)
        if words & set(names_in(path))
    }
    own = {str(path.relative_to(ROOT)) for path in (SERVER / "methods").glob("*/*.py")}
    known = {str((SERVER / file).relative_to(ROOT)) for file, words in EXCEPTIONS.items() if words_of(name) & words}
    # The client's defaults are methods, and it has a sampler that is named like one.
    known |= {str((CLIENT / file).relative_to(ROOT)) for file in ("aio.py", "client.py", "__main__.py", "choices.py")}
    assert using - own - known <= rows
