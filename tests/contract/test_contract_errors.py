"""One tree of errors on each side of the wire, one table on each side, and the same words in all four."""

import pickle
import re
from types import ModuleType
from typing import Any

import grpc
import pytest
from underpaint import _status as client_status
from underpaint import errors as client_errors
from underpaint_server import errors as server_errors
from underpaint_server.errors import FieldInvalid, FieldViolation, UnderpaintError
from underpaint_server.rpc.responses import status as server_status


def tree(module: ModuleType) -> dict[str, Any]:
    """All classes of a tree by name, the root included."""
    root = module.UnderpaintError
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, root)]
    return {kind.__name__: kind for kind in kinds}


SERVER, CLIENT = tree(server_errors), tree(client_errors)
RAISED = {name: kind for name, kind in SERVER.items() if "reason" in vars(kind) and kind is not UnderpaintError}
"""Those with a reason of their own; the others only group them."""


def drawn(module: ModuleType) -> dict[str, tuple[int, str]]:
    """Name -> (depth, reason) of the tree in a module's docstring."""
    lines = re.findall(r"^    ([│ ]*)[├└]── (\w+)(?: +([A-Z_]{3,}))?", module.__doc__ or "", re.MULTILINE)
    return {name: (len(indent) // 4 + 1, reason) for indent, name, reason in lines}


@pytest.mark.parametrize("module", [server_errors, client_errors], ids=["server", "client"])
def test_the_drawn_tree_is_the_tree(module: ModuleType) -> None:
    kinds = tree(module)
    picture = drawn(module)
    assert picture.keys() == kinds.keys() - {"UnderpaintError"}
    for name, (depth, _) in picture.items():
        assert len(kinds[name].__mro__) - len(module.UnderpaintError.__mro__) == depth, name
        assert kinds[name].__doc__


def test_every_reason_is_one_class_s_and_in_the_drawn_tree() -> None:
    reasons = {name: kind.reason for name, kind in RAISED.items()}
    assert len(set(reasons.values())) == len(reasons) > 15
    assert {name: reason for name, (_, reason) in drawn(server_errors).items() if reason} == reasons


@pytest.mark.parametrize("name", RAISED)
def test_the_client_raises_the_class_of_the_same_name(name: str) -> None:
    kind = RAISED[name]
    error = kind(FieldViolation("a.b", "no")) if kind is FieldInvalid else kind("no")
    code = server_status.code_of(error)
    assert code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    assert client_status._kind(code, error.reason).__name__ == name
    known = [(c, reason) for (c, reason), k in client_status.TABLE.items() if k.__name__ == name and c is code]
    assert known, "not by chance, through a fallback"


@pytest.mark.parametrize("name", RAISED)
def test_an_error_survives_the_way_from_the_engine(name: str) -> None:
    kind = RAISED[name]
    plain = kind is not FieldInvalid
    error = kind("no", metadata={"a": "b"}, retry_after_s=2) if plain else kind(FieldViolation("a.b", "no"))
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert vars(back) == vars(error)
    assert str(back) == str(error)


def test_both_tables_name_each_other_s_codes_only() -> None:
    assert set(server_status.CODES.values()) <= {code for code, _ in client_status.TABLE}
    there = {kind.__name__: kind for kind in server_status.CODES}
    assert there.keys() <= SERVER.keys()
