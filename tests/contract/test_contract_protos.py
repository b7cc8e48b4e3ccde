"""The protos as another language's tools get them: the folder alone, beside the types that every compiler has."""

import re
import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

PROTOS = Path(__file__).parents[2] / "protos"
FILES = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
OWN = [name for name in FILES if name.startswith("underpaint/")]
GOOGLE = [name for name in FILES if name.startswith("google/")]


def buf(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """The compiler of the test's environment, run in the folder."""
    command = (str(Path(sys.executable).with_name("buf")), *arguments)
    return subprocess.run(command, cwd=PROTOS, capture_output=True, check=False)


def compiled(tmp_path: Path) -> FileDescriptorSet:
    """Everything under protos/, and what it imports."""
    done = buf("build", "-o", str(tmp_path / "all.binpb"))
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return FileDescriptorSet.FromString((tmp_path / "all.binpb").read_bytes())


def test_the_folder_compiles_by_itself(tmp_path: Path) -> None:
    compiled_names = {file.name for file in compiled(tmp_path).file}
    assert set(FILES) <= compiled_names
    assert all(name.startswith("google/protobuf/") for name in compiled_names - set(FILES))


def test_what_a_caller_needs_besides_the_services_is_there() -> None:
    assert "google/longrunning/operations.proto" in GOOGLE
    assert "google/rpc/error_details.proto" in GOOGLE  # the details of every error


def test_every_file_says_its_go_package(tmp_path: Path) -> None:
    packages = {file.name: file.options.go_package for file in compiled(tmp_path).file}
    assert {packages[name] for name in OWN} == {"underpaint/v1;underpaintv1"}
    assert all(packages.values())
    # Only the files of one package import each other, so the Go code compiles below any module's path.
    assert not [name for name in GOOGLE if "underpaint" in packages[name]]


def test_the_lint_holds_for_the_contract_and_leaves_google_s_files_alone() -> None:
    done = buf("lint")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_google_s_files_keep_their_licence() -> None:
    assert "Apache License" in (PROTOS / "google" / "LICENSE").read_text()
    for name in GOOGLE:
        head = (PROTOS / name).read_text()[:700]
        assert re.search(r"Copyright \d{4} Google LLC", head), name
        assert "Licensed under the Apache License, Version 2.0" in head, name
