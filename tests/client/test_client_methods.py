"""A method is one dataclass: tables, messages, command line and error texts are derived from it."""

import ast
import dataclasses
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import underpaint
from underpaint import ContentInjection, Ddim, DdimInversion, EdictInversion, EditMethod, Resolved, _flags, _responses
from underpaint.__main__ import main
from underpaint.images import ImageLike
from underpaint.methods import EDIT_METHODS, INVERSION_METHODS, LEARN_METHODS
from underpaint.v1 import direction_service_pb2, edit_service_pb2, inversion_service_pb2

SOURCE = Path(underpaint.__file__).parent
MODULES = {path.name: ast.parse(path.read_text()) for path in SOURCE.glob("*.py")}
TABLES = (EDIT_METHODS, INVERSION_METHODS, LEARN_METHODS)
METHODS = [pytest.param(method, id=method.__name__) for table in TABLES for method in table.values()]


# --- a method that exists only here -------------------------------------------------------------------------------


@pytest.fixture
def tint():
    """It writes SDEdit's message, because the contract has no other that is free."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Tint(EditMethod):
        """Tint the image (nobody, 1900). Not a real method."""

        name = "tint"
        amount: float | None = None
        """Amount of the tint, (0, 1]. Default: 0.25."""
        palette: ImageLike = dataclasses.field(repr=False)
        """Image with the colours; 50% grey is neutral. The first sentence is the help."""
        shades: Sequence[int] = ()
        """Shades."""
        invert: bool = False
        """Whether the tint is inverted."""

        def _write(self, request, source_prompt):
            request.sdedit.CopyFrom(edit_service_pb2.SdEdit(strength=self.amount, steps=sum(self.shades) + self.invert))

    yield Tint
    del EDIT_METHODS["tint"]


@pytest.fixture
def command(server, tmp_path, photo, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "photo.png").write_bytes(photo)

    def run(*arguments):
        try:
            status = main([*arguments])
        except SystemExit as end:
            status = end.code  # type: ignore[assignment]  # argparse gives numbers
        return status, capsys.readouterr()

    return run


def test_a_new_method_is_on_the_command_line(tint, command, server):
    status, printed = command("edit", "--help")
    assert status == 0
    assert "disentangled,content_injection,tint}" in printed.out
    text = " ".join(printed.out.split())
    assert "settings of tint: Tint the image (nobody, 1900)" in text
    assert "--amount X amount of the tint, (0, 1] (default: 0.25)" in text
    assert "--palette FILE image with the colours; 50% grey is neutral --shades N,N,... shades" in text
    assert "--invert, --no-invert whether the tint is inverted" in text
    flags = ("--amount", "0.5", "--palette", "photo.png", "--shades", "2,3", "--invert", "--target", server.target)
    status, printed = command("edit", "photo.png", "t", "--method", "tint", *flags)
    assert (status, printed.err) == (0, "")
    (request,) = server.named("Edit")
    assert request.sdedit == edit_service_pb2.SdEdit(strength=0.5, steps=6)


def test_flags_of_a_new_method_are_refused_for_others_and_demanded_for_it(tint, command, server):
    status, printed = command("edit", "photo.png", "t", "--amount", "0.5", "--target", server.target)
    assert (status, printed.err) == (2, "underpaint: --amount: not a setting of --method edict\n")
    status, printed = command("edit", "photo.png", "t", "--method", "tint", "--target", server.target)
    assert status == 2
    assert "--palette: needed by --method tint: image with the colours" in printed.err
    status, printed = command("edit", "photo.png", "t", "--shades", "2,x")
    assert (status, "invalid list of int value: '2,x'" in printed.err) == (2, True)


def test_a_new_method_reaches_the_server(tint, client, server, photo):
    client.edit(photo, "t", tint(amount=0.75, palette=photo))
    (request,) = server.named("Edit")
    assert (request.WhichOneof("method"), request.sdedit.strength) == ("sdedit", 0.75)
    with pytest.raises(TypeError, match=r"method is 3: pass one of Edict\(\.\.\.\), .*Tint\(\.\.\.\)$"):
        client.edit(photo, "t", 3)


# --- what the tables promise --------------------------------------------------------------------------------------


def test_names_are_those_of_the_contract():
    oneofs = edit_service_pb2.EditRequest.DESCRIPTOR.oneofs_by_name
    assert set(EDIT_METHODS) == {field.name for field in oneofs["method"].fields}
    oneofs = inversion_service_pb2.InversionParameters.DESCRIPTOR.oneofs_by_name
    assert set(INVERSION_METHODS) == {field.name for field in oneofs["method"].fields}
    names = {
        name.removeprefix("LEARN_METHOD_").lower()
        for name in direction_service_pb2.LearnMethod.DESCRIPTOR.values_by_name
    }
    assert set(LEARN_METHODS) == names - {"unspecified"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exported_and_explains_itself_and_its_settings(method):
    assert getattr(underpaint, method.__name__) is method
    assert method.__name__ in underpaint.__all__
    assert not method.__doc__.startswith(f"{method.__name__}("), "a dataclass without a docstring gets its signature"
    for field in dataclasses.fields(method):
        assert _flags._documentation(method, field.name), field.name
    assert not hasattr(method(content=b"") if method is ContentInjection else method(), "__dict__")


WRITTEN = {
    "edict": EdictInversion(mixing_coefficient=0.5),
    "ddim": DdimInversion(convention="current", features=("mid",)),
}


@pytest.mark.parametrize("name", INVERSION_METHODS)
def test_an_inversion_method_reads_what_it_has_written(name):
    parameters = inversion_service_pb2.InversionParameters()
    WRITTEN[name]._write(parameters)
    assert parameters.WhichOneof("method") == name
    assert INVERSION_METHODS[name]._read(parameters) == WRITTEN[name]


def test_an_inversion_by_a_method_of_a_newer_server_has_no_method():
    stored = inversion_service_pb2.Inversion(
        name="inversions/00", parameters=inversion_service_pb2.InversionParameters(steps=3)
    )
    read = _responses.inversion(stored).parameters
    assert (read.method, read.steps) == (None, 3)


@pytest.mark.parametrize("wrong", [{"convention": "past"}, {"convention": 1}])
def test_a_wrong_choice_is_refused_with_the_choices(wrong, client, server, photo):
    for call in (
        lambda: client.edit(photo, "t", Ddim(**wrong)),
        lambda: client.invert(photo, method=DdimInversion(**wrong)),
    ):
        with pytest.raises(ValueError, match=r"convention is .*: choose one of target, current"):
            call()
    assert server.requests == []


OF_THE_SOURCE, OF_THE_EDIT = 1, 2


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"edict": {}}, OF_THE_SOURCE),
        ({"ddim": {}}, OF_THE_SOURCE),
        ({"disentangled": {}}, OF_THE_SOURCE),
        ({"content_injection": {}}, OF_THE_SOURCE),
        ({"content_injection": {"boosting_start": 0.5}}, OF_THE_EDIT),
        ({"sdedit": {}}, OF_THE_EDIT),
        ({"diffedit": {}}, OF_THE_EDIT),
        ({}, OF_THE_EDIT),
    ],
)
def test_the_seed_is_that_of_the_noise_that_was_used(method, expected):
    message = edit_service_pb2.EditRequest(
        generated=edit_service_pb2.GeneratedSource(seed=OF_THE_SOURCE), seed=OF_THE_EDIT, **method
    )
    assert Resolved(message).seed == expected
    message.inversion = "inversions/00"
    assert Resolved(message).seed == OF_THE_EDIT


# --- nothing else knows a method ----------------------------------------------------------------------------------

# The clients' signatures and ``generate`` need a class: ComputeMask is DiffEdit's own RPC, and generating an image is a
# DDIM edit of the image itself. The other two are no methods: a sampler, and ``search`` of regular expressions.
ALLOWED = {
    ("__main__.py", "DiffEdit"), ("aio.py", "DiffEdit"), ("client.py", "DiffEdit"),
    ("aio.py", "Ddim"), ("client.py", "Ddim"), ("choices.py", "ddim"), ("_flags.py", "search"),
}  # fmt: skip


def _mentions(tree):
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"methods.py", "__init__.py"}))
def test_no_other_module_names_a_method(name):
    words = {word for table in TABLES for key, method in table.items() for word in (key, method.__name__)}
    assert {(name, word) for word in words & set(_mentions(MODULES[name]))} <= ALLOWED


def test_the_modules_import_each_other_in_one_direction():
    modules = {name.removesuffix(".py") for name in MODULES}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):  # imports for types and inside functions too
            if isinstance(node, ast.ImportFrom) and node.module == "underpaint":
                graph[name.removesuffix(".py")] |= modules & {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("underpaint."):
                graph[name.removesuffix(".py")] |= modules & {node.module.split(".")[1]}
    assert "methods" in graph["results"]
    assert tuple(TopologicalSorter(graph).static_order())
