"""Every example runs as it stands, against a server with the embedded model."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from underpaint_server.local_server import LocalServer

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"
PICTURES = {
    "quickstart": ["quickstart.png"],
    "async_many": [
        f"async_many/{colour}.png"
        for colour in ("blue", "brown", "green", "orange", "pink", "purple", "teal", "yellow")
    ],
    "progress_and_preview": [
        "progress_and_preview/mask.png", "progress_and_preview/result.png",
        *(f"progress_and_preview/step-{step:03}.jpg" for step in (5, 10, 15)),
    ],
    "contact_sheet": ["contact_sheet/contact_sheet.png"],
    "stock_grpc": ["stock_grpc.png"],
    "content_injection": ["content_injection.png"],
    "learn_direction": ["learn_direction.png"],
}  # fmt: skip
SAID = {
    # Of progress no more than one line is certain: a slow reader gets the newest, and misses the rest.
    "quickstart": r"error of the reconstructed latents \d(\.\d)?e-1[3-9]\b.*written quickstart\.png",
    "async_many": r"8 edits written to async_many; each shared its steps with [1-9]",
    "progress_and_preview": r"\d+% \w+ \d+/\d+\b.*the repeated edit has the same bytes",
    "contact_sheet": r"reconstructed latents: EDICT \d\.\de-1\d, DDIM \d\.\de[-+]\d+\n.*wrote",
    "content_injection": r"32 evaluations each, 20 without content.*written content_injection\.png",
    "learn_direction": r"operations/\w+ runs on.*optimizing \d+%.*loss \d.*written learn_direction\.png",
    "stock_grpc": r"PHASE_\w+ \d+%.*written stock_grpc\.png.*reason FIELD_INVALID.*sdedit\.strength",
}


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with pytest.MonkeyPatch.context() as patch, LocalServer(backend="auto", dtype="auto") as server:
        patch.setenv("http_proxy", "http://127.0.0.1:1")  # a proxy that does not answer: none may be asked
        for name in ("no_proxy", "no_grpc_proxy"):
            patch.delenv(name)
        yield server


def test_there_is_an_expectation_for_each() -> None:
    shared = {"sample"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - shared == PICTURES.keys() == SAID.keys()


def run_example(name: str, server: LocalServer, folder: Path) -> list[str]:
    """The pictures that ``folder`` has after a run."""
    ended = subprocess.run(
        (sys.executable, EXAMPLES / f"{name}.py", "--target", server.target),
        cwd=folder, capture_output=True, text=True, check=False, env=server.environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert re.search(SAID[name], ended.stdout, re.DOTALL), ended.stdout
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix != ".json")


@pytest.mark.parametrize("name", PICTURES)
def test_an_example_does_what_it_says(server: LocalServer, name: str, tmp_path: Path) -> None:
    written = run_example(name, server, tmp_path)
    if name == "progress_and_preview":  # a slow reader may miss previews, as it may miss phases, but no result
        always = PICTURES[name][:2]
        for _ in range(20):
            assert set(always) <= set(written) <= set(PICTURES[name])
            if len(written) > len(always):
                break
            written = run_example(name, server, tmp_path)
        assert len(written) > len(always), "no run wrote a preview"
    else:
        assert written == PICTURES[name]
    for path in written:
        Image.open(tmp_path / path).load()
