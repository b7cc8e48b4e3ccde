"""What deploy/check.py must find: manifests under which the README's calls would fail."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="`make deploy-check` installs what deploy/check.py uses")
pytest.importorskip("promql_parser", reason="`make deploy-check` installs what deploy/check.py uses")

CHECK = Path(__file__).parents[2] / "deploy" / "check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_check", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rendered(check: ModuleType) -> list[dict[str, Any]]:
    manifests: list[dict[str, Any]] = check.render("base")
    return manifests


@pytest.fixture
def base(rendered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The base, for a test to change."""
    return copy.deepcopy(rendered)


def part(manifests: list[dict[str, Any]], kind: str) -> Any:
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


def scaler(replicas: int) -> dict[str, Any]:
    spec = {"scaleTargetRef": {"kind": "Deployment", "name": "underpaint"}, "maxReplicas": replicas}
    return {"kind": "HorizontalPodAutoscaler", "metadata": {"name": "underpaint"}, "spec": spec}


def found(check: ModuleType, manifests: list[dict[str, Any]]) -> list[str]:
    return list(check.replica_problems(manifests))


def test_every_kustomization_is_checked(check: ModuleType) -> None:
    assert {"base", "overlays/cpu-dev", "overlays/shared-store"} <= set(check.KUSTOMIZATIONS)
    assert "replicas" in check.MANIFEST_CHECKS


def test_the_base_is_one_pod_whose_store_outlives_it(check: ModuleType, base: list[dict[str, Any]]) -> None:
    assert found(check, base) == []
    assert part(base, "Deployment")["spec"]["replicas"] == 1
    assert part(base, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_a_second_replica_needs_a_shared_store(check: ModuleType, base: list[dict[str, Any]]) -> None:
    part(base, "Deployment")["spec"]["replicas"] = 2
    (problem,) = found(check, base)
    assert "2 pods" in problem
    assert "file:///var/lib/underpaint/store" in problem


@pytest.mark.parametrize(("replicas", "problems"), [(1, 0), (4, 1)])
def test_an_autoscaler_counts(check: ModuleType, base: list[dict[str, Any]], replicas: int, problems: int) -> None:
    assert len(found(check, [*base, scaler(replicas)])) == problems


@pytest.mark.parametrize("strategy", [{"type": "RollingUpdate"}, {"rollingUpdate": {"maxSurge": 1}}, {}])
def test_a_second_pod_during_an_update_counts(check: ModuleType, base: list[dict[str, Any]], strategy: Any) -> None:
    part(base, "Deployment")["spec"]["strategy"] = strategy  # by default a quarter more, rounded up
    assert len(found(check, base)) == 1
    part(base, "Deployment")["spec"]["strategy"] = {"type": "Recreate"}
    assert found(check, base) == []


@pytest.mark.parametrize("url", ["memory:///", "file:///tmp/store", "file:///elsewhere"])
def test_a_store_of_the_pod_alone_is_not_shared(check: ModuleType, base: list[dict[str, Any]], url: str) -> None:
    part(base, "Deployment")["spec"]["replicas"] = 3
    part(base, "PersistentVolumeClaim")["spec"]["accessModes"] = ["ReadWriteMany"]
    assert found(check, base) == []
    part(base, "ConfigMap")["data"]["UNDERPAINT_STORE_URL"] = url
    assert len(found(check, base)) == 1


def test_no_store_at_all_is_one_in_memory(check: ModuleType, base: list[dict[str, Any]]) -> None:
    part(base, "Deployment")["spec"]["replicas"] = 2
    del part(base, "ConfigMap")["data"]["UNDERPAINT_STORE_URL"]
    assert "memory:///" in found(check, base)[0]


def test_a_claim_of_elsewhere_is_not_taken_for_shared(check: ModuleType, base: list[dict[str, Any]]) -> None:
    part(base, "Deployment")["spec"]["replicas"] = 2
    without = [manifest for manifest in base if manifest["kind"] != "PersistentVolumeClaim"]
    assert len(found(check, without)) == 1


def test_replicas_that_share_a_bucket_are_fine(check: ModuleType) -> None:
    manifests = check.render("overlays/shared-store")
    assert part(manifests, "Deployment")["spec"]["replicas"] == 2
    assert found(check, [*manifests, scaler(5)]) == []


@pytest.mark.parametrize("kustomization", ["base", "overlays/cpu-dev", "overlays/shared-store"])
def test_images_and_requests_fit_into_the_memory_of_the_pod(check: ModuleType, kustomization: str) -> None:
    manifests = check.render(kustomization)
    assert list(check.memory_problems(manifests)) == []
    part(manifests, "ConfigMap")["data"]["UNDERPAINT_DECODER_BYTES"] = str(4 << 30)
    (problem,) = check.memory_problems(manifests)
    assert "UNDERPAINT_DECODER_BYTES" in problem


def test_a_store_larger_than_its_volume_is_found(check: ModuleType, base: list[dict[str, Any]]) -> None:
    assert list(check.settings_problems(base)) == []
    part(base, "ConfigMap")["data"]["UNDERPAINT_STORE_BYTES"] = str(3 << 30)
    (problem,) = check.settings_problems(base)
    assert "UNDERPAINT_STORE_BYTES" in problem
