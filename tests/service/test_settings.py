"""Settings: what flags and variables accept and refuse, and how many cores a process may use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from underpaint_server import cache
from underpaint_server.cores import usable_cores
from underpaint_server.settings import CheckSettings, Settings, unknown_variables

ROOT = Path(__file__).parents[2]


def server(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command; the metrics address is one that nobody knows, so that good settings end it too, with status 1."""
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith("UNDERPAINT_")}
    nowhere = ("--metrics-listen", "no-such-host.invalid:1", "--listen", "127.0.0.1:0")
    command = (sys.executable, "-m", "underpaint_server")
    words = words if words[:1] in (("check-model",), ("self-test",)) else (*nowhere, *words)
    return subprocess.run((*command, *words), capture_output=True, text=True, check=False, env={**env, **variables})


# --- models and clips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("models", "a=/x,b=/y,a=/z", "the id 'a' is given twice"),
        ("models", "a=,a=", "the id 'a' is given twice"),
        ("models", "my model=/x", "'my model' is no id"),
        ("models", "me/mine=/x", "'me/mine' is no id"),
        ("models", "..=/x", "'..' is no id"),
        ("models", "ä=/x", "'ä' is no id"),
        ("models", "a\n=/x", "is no id"),
        ("models", "m" * 64 + "=/x", "is no id"),
        ("models", "/only/a/path", "is not ID=DIRECTORY"),
        ("clips", "underpaint-mini=", "is not ID=DIRECTORY"),
        ("clips", "underpaint-mini=/x,underpaint-mini=/y", "given twice"),
        ("clips", "other=/x", "no model has the id 'other'; the models are underpaint-mini"),
    ],
)
def test_a_wrong_id_or_one_given_twice_is_refused(name: str, value: str, told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        Settings.model_validate({name: value})


def test_ids_as_people_write_them_are_accepted() -> None:
    ids = ["sd15", "SD-1.5", "photo_2", "0", "m" * 63]
    settings = Settings.model_validate({"models": ",".join(f"{name}=/x" for name in ids), "clips": "SD-1.5=/c"})
    assert [name for name, _ in settings.model_locations] == ids


@pytest.mark.parametrize(
    ("directory", "name"),
    [("/x/my model", "my-model"), ("/x/..", "underpaint-mini"), ("", "underpaint-mini"), ("org/sd-1.5", "sd-1.5"),
     ("/x/_ä", "underpaint-mini"), (f"/x/{'m' * 100}", "m" * 63)],
)  # fmt: skip
def test_a_checked_directory_gets_an_id_that_the_server_accepts(directory: str, name: str) -> None:
    settings = CheckSettings.model_validate({"directory": directory, "clips": f"{name}=/c"})
    assert settings.model_id == name
    Settings.model_validate({"models": f"{name}=/x"})


# --- environment ------------------------------------------------------------------------------------------------------


def test_a_misspelt_variable_names_the_nearest_setting() -> None:
    ended = server(UNDERPAINT_MAX_STEP="10", underpaint_devise="cpu")
    assert ended.returncode == 2
    assert (
        "UNDERPAINT_MAX_STEP is not a setting; unset it, or correct its name: did you mean UNDERPAINT_MAX_STEPS?"
        in (ended.stderr)
    )
    assert "underpaint_devise is not a setting; unset it, or correct its name: did you mean UNDERPAINT_DEVICE?" in (
        ended.stderr
    )


def test_a_variable_like_no_setting_is_refused_too() -> None:
    assert [line.split(": ")[-1] for line in unknown_variables(["UNDERPAINT_XYZZY"])] == [
        "underpaint-server --help lists the settings"
    ]


def test_variables_of_kubernetes_and_of_the_client_are_no_mistakes() -> None:
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_PROTO",
             "PORT_50051_TCP_PORT", "PORT_50051_TCP_ADDR"]  # fmt: skip
    names = [f"UNDERPAINT_{name}" for name in links] + [f"UNDERPAINT_HEADLESS_{name}" for name in links]
    assert not list(unknown_variables([*names, "UNDERPAINT_TARGET", "underpaint_max_steps", "PATH", "UNDERPAINTED"]))


def test_no_setting_reads_like_what_kubernetes_adds() -> None:
    for field in Settings.model_fields:
        misspelt = f"UNDERPAINT_{field.upper()}X"
        assert list(unknown_variables([misspelt])), misspelt


def test_every_variable_that_the_client_reads_is_known() -> None:
    sources = [file.read_text() for file in (ROOT / "client" / "src").rglob("*.py")]
    names = {name for source in sources for name in re.findall(r"\bUNDERPAINT_[A-Z_]+", source)}
    assert "UNDERPAINT_TARGET" in names
    assert not list(unknown_variables(names))


@pytest.mark.parametrize("folder", ["there", "missing"])
def test_the_metrics_files_of_another_program_are_left_alone(tmp_path: Path, folder: str) -> None:
    (tmp_path / "there").mkdir()
    ended = server(PROMETHEUS_MULTIPROC_DIR=str(tmp_path / folder))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "no-such-host.invalid:1" in ended.stderr, "it came as far as its ports"
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    assert not list((tmp_path / "there").iterdir())


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_shows_values_as_flags_and_variables_take_them() -> None:
    text = server("--help").stdout
    for shown in (
        "{auto,cpu,cuda}",
        "{auto,float32,bfloat16,float16}",
        "{debug,info,warning,error}",
        "ID=DIRECTORY,...",
    ):
        assert shown in text
    assert "tuple" not in text
    assert "(default: auto)" in text
    assert "device: Input should be 'auto', 'cpu' or 'cuda'" in server(UNDERPAINT_DEVICE="CPU").stderr
    assert "device: Input should be 'auto', 'cpu' or 'cuda'" in server("--device", "CPU").stderr


def test_help_of_self_test_lists_what_has_an_effect_there() -> None:
    text = server("self-test", "--help").stdout
    flags = set(re.findall(r"--[a-z-]+[a-z]", text))
    assert {"--device", "--dtype", "--threads", "--max-batch-size", "--cache-dir"} <= flags
    assert not {"--listen", "--vgg", "--exact-batching-s", "--models"} & flags


def test_help_of_check_model_lists_what_has_an_effect_there() -> None:
    text = server("check-model", "--help").stdout
    flags = set(re.findall(r"--[a-z-]+[a-z]", text))
    assert {"--device", "--dtype", "--threads", "--clips", "--vgg", "--max-batch-size"} <= flags
    assert not {"--listen", "--store-url", "--max-steps", "--drain-s", "--models"} & flags


# --- cores ------------------------------------------------------------------------------------------------------------

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(folder: Path, cgroup: str, **files: str) -> Path:
    """A ``proc`` and a ``sys`` with these control groups; the files by path below ``sys/fs/cgroup``."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(cgroup)
    for path, text in files.items():
        file = folder / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


V1_PATH = "cpu,cpuacct/pod/one/"
V1 = "4:memory:/pod\n3:cpu,cpuacct:/pod/one\n0::/pod\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
        ("0::/\n", {"cpu.max": "100000000 100000\n"}, AFFINITY),
        ("0::/pod/one\n", {"pod/one/cpu.max": "max 100000\n", "pod/cpu.max": "100000 100000\n"}, 1),
        ("0::/outside/the/container\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {}, AFFINITY),
        ("0::/\n", {"cpu.max": "nonsense"}, AFFINITY),
        (V1, {f"{V1_PATH}cpu.cfs_quota_us": "50000\n", f"{V1_PATH}cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, AFFINITY),
    ],
)
def test_a_cpu_quota_limits_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(machine(tmp_path, cgroup, **files)) == cores


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == AFFINITY


@pytest.mark.skipif(AFFINITY < 2, reason="needs two cores")
def test_a_part_of_a_core_is_rounded_up(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, "0::/\n", **{"cpu.max": "110000 100000\n"})) == 2


# --- cache directory --------------------------------------------------------------------------------------------------


def test_the_cache_is_in_the_user_s_cache_directory_or_where_the_setting_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory(Settings(cache_dir="")) == tmp_path / "xdg" / "underpaint"
    for other in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache.directory(Settings(cache_dir="")) == home / ".cache" / "underpaint"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory(Settings(cache_dir="")) == home / ".cache" / "underpaint"
    chosen = tmp_path / "a" / "b"
    assert cache.directory(Settings(cache_dir=str(chosen))) == chosen
    assert chosen.is_dir()


@pytest.mark.parametrize("name", ["a file", "a file/below", "/proc/none", "a\0b"])
def test_a_cache_directory_that_cannot_be_used_is_a_warning(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").write_text("")
    assert cache.directory(Settings(cache_dir=str(tmp_path / name))) is None
    assert "the cache directory cannot be used" in capsys.readouterr().out


def test_a_small_file_is_written_whole_and_read_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(cache_dir=str(tmp_path / "cache"))
    assert cache.read(settings, "folder/name") is None
    for text in ("one", "another"):
        cache.write(settings, "folder/name", text)
        assert cache.read(settings, "folder/name") == text.encode()
    assert [path.name for path in (tmp_path / "cache/folder").iterdir()] == ["name"]
    cache.write(settings, "folder/name/below", "one")
    assert "cannot be written" in capsys.readouterr().out
    assert cache.read(settings, "folder/name/below") is None
    assert cache.read(Settings(cache_dir="a\0b"), "name") is None
