"""Check the files under deploy/ and the Dockerfile, without a network or a cluster.

Run by `make deploy-check`, with a Python that has the server and requirements/deploy.txt installed. One line a check;
exits 1 if one failed.
"""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import urlsplit

import kubernetes_validate
import promql_parser
import yaml
from prometheus_client import CollectorRegistry
from underpaint_server.jobs import Priority
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES_FILES = DEPLOY / "kubernetes"
KUSTOMIZATIONS = sorted(
    path.parent.relative_to(KUBERNETES_FILES).as_posix() for path in KUBERNETES_FILES.rglob("kustomization.yaml")
)
KUBERNETES = ("1.30", "1.37")
"""Oldest supported version (the first that enables preStop sleep by default), and the newest."""
PROBES = {"startupProbe": "startup", "readinessProbe": "readiness", "livenessProbe": "liveness"}
"""Probe -> the health service that it must ask for."""
EXIT_S = 10
"""Seconds from the end of the drain to the exit of the process, at most."""
PROCESSES_BYTES = 1 << 30
"""What the front process, an engine process with the embedded model and a spare one take, with some room."""
VARIABLES = {f"UNDERPAINT_{name.upper()}": name for name in Settings.model_fields}
YAMLLINT = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def render(kustomization: str) -> list[Manifest]:
    """The manifests of a kustomization as they would be applied; raises ValueError if kubectl cannot render them."""
    folder = KUBERNETES_FILES / kustomization
    done = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of that kind; raises ValueError if there is none or more than one."""
    [manifest] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return manifest


def pod_of(manifests: list[Manifest]) -> Manifest:
    """The pod template of the deployment."""
    pod: Manifest = one(manifests, "Deployment")["spec"]["template"]
    return pod


def schema_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Manifests that violate the Kubernetes API schemas, in the oldest or the newest version."""
    for version in KUBERNETES:
        for manifest in manifests:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except (
                kubernetes_validate.ValidationError,
                kubernetes_validate.SchemaNotFoundError,
                kubernetes_validate.InvalidSchemaError,
            ) as error:
                yield f"{manifest['kind']} {manifest['metadata']['name']} for {version}: {error}"


def probe_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Probes that do not ask the gRPC port for their health service."""
    [container] = pod_of(manifests)["spec"]["containers"]
    port = next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc")
    for probe, service in PROBES.items():
        if container[probe].get("grpc") != {"port": port, "service": service}:
            yield f"{probe} must be a gRPC probe of port {port} and health service '{service}'"


def stop_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A grace period too short for the preStop sleep, the drain and the exit."""
    pod = pod_of(manifests)["spec"]
    sleep_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = settings_of(manifests).drain_s
    needed = sleep_s + drain_s + EXIT_S
    if not pod["terminationGracePeriodSeconds"] > needed:
        yield (
            f"terminationGracePeriodSeconds is {pod['terminationGracePeriodSeconds']}; it must be more than "
            f"{needed:g}: preStop sleep {sleep_s} + UNDERPAINT_DRAIN_S {drain_s:g} + exit {EXIT_S}"
        )


def selector_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Selectors that do not match the pods' labels."""
    labels = pod_of(manifests)["metadata"]["labels"].items()
    for kind, name, selector in selectors(manifests):
        if not selector.items() <= labels:
            yield f"{kind} {name} selects {selector}; the pods lack such labels"


def selectors(manifests: list[Manifest]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Kind, name and labels of every selector that must select the server's pods."""
    for manifest in manifests:
        kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest.get("spec", {})
        match kind:
            case "Service":
                yield kind, name, spec["selector"]
            case "Deployment":
                yield kind, name, spec["selector"]["matchLabels"]
                for spread in spec["template"]["spec"]["topologySpreadConstraints"]:
                    yield "spread constraint", name, spread["labelSelector"]["matchLabels"]
            case "PodDisruptionBudget":
                yield kind, name, spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                yield kind, name, spec["podSelector"]["matchLabels"]


def dns_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A network policy that blocks DNS."""
    # With a label that Kustomize adds to it, this peer matches no DNS server, and every name lookup times out.
    peers = [peer for rule in one(manifests, "NetworkPolicy")["spec"]["egress"] for peer in rule.get("to", ())]
    if {"k8s-app": "kube-dns"} not in [peer.get("podSelector", {}).get("matchLabels") for peer in peers]:
        yield "NetworkPolicy: no egress rule selects exactly k8s-app=kube-dns"


def port_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Ports of settings, pods, services, network policy and annotations that do not agree."""
    [container] = pod_of(manifests)["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    settings = settings_of(manifests)
    for name, listen in (("grpc", settings.listen), ("metrics", settings.metrics_listen)):
        if listen != f"0.0.0.0:{ports[name]}":
            yield f"the server must listen on 0.0.0.0:{ports[name]}, the pod's port {name}, not on {listen}"
    named = [port["targetPort"] for m in manifests if m["kind"] == "Service" for port in m["spec"]["ports"]]
    named += [port["port"] for rule in one(manifests, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]]
    yield from (f"the pod has no port '{name}'" for name in named if name not in ports)
    annotated = pod_of(manifests)["metadata"]["annotations"]["prometheus.io/port"]
    if annotated != str(ports["metrics"]):
        yield f"the annotation prometheus.io/port is {annotated}; the pod's port metrics is {ports['metrics']}"


def settings_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Variables that are not settings, and a store that may outgrow its volume."""
    data = one(manifests, "ConfigMap")["data"]
    yield from (f"{name} is not a setting of the server" for name in data if name not in VARIABLES)
    settings = settings_of(manifests)
    volume = store_volume(manifests)
    if volume is None:
        return
    claim = claim_of(volume, manifests)
    size = claim["spec"]["resources"]["requests"]["storage"] if claim else volume.get("emptyDir", {}).get("sizeLimit")
    needed = settings.store_bytes + settings.replay_bytes
    if size is not None and not needed < bytes_of(size):
        yield (
            f"UNDERPAINT_STORE_BYTES and UNDERPAINT_REPLAY_BYTES are {needed} together; "
            f"they must be less than the volume's {size}"
        )


def replica_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Several pods, each with a store that the others do not see."""
    # A client's calls go to all pods. One that did not make an inversion, a direction or an operation would answer that
    # there is none.
    pods = most_pods(manifests)
    if pods > 1 and not is_shared_store(manifests):
        yield (
            f"up to {pods} pods run at once (replicas, autoscaler, maxSurge), and each has a store of its own at "
            f"{settings_of(manifests).store_url}: use s3://bucket/prefix, or a claim with the access mode "
            "ReadWriteMany that is part of these manifests, or run one pod with maxSurge 0"
        )


def most_pods(manifests: list[Manifest]) -> int:
    """The largest number of pods that may run at once, those of an update included."""
    spec = one(manifests, "Deployment")["spec"]
    scalers = [
        manifest["spec"]["maxReplicas"] for manifest in manifests if manifest["kind"] == "HorizontalPodAutoscaler"
    ]
    replicas: int = max(spec.get("replicas", 1), *scalers, 0)
    strategy = spec.get("strategy", {})
    surge: int | str = (
        0 if strategy.get("type") == "Recreate" else strategy.get("rollingUpdate", {}).get("maxSurge", "25%")
    )
    return replicas + (math.ceil(replicas * int(surge[:-1]) / 100) if isinstance(surge, str) else surge)


def is_shared_store(manifests: list[Manifest]) -> bool:
    """Whether all pods see the same store: a bucket, or a volume that all of them can write."""
    volume = store_volume(manifests)
    claim = claim_of(volume, manifests) if volume is not None else None
    return settings_of(manifests).store_url.startswith("s3:") or (
        claim is not None and "ReadWriteMany" in claim["spec"]["accessModes"]
    )


def store_volume(manifests: list[Manifest]) -> Manifest | None:
    """The pod's volume that a store of files lies on; None for another store, and for one outside all volumes."""
    url = urlsplit(settings_of(manifests).store_url)
    pod = pod_of(manifests)["spec"]
    [container] = pod["containers"]
    mounts = [
        mount for mount in container["volumeMounts"] if PurePosixPath(url.path).is_relative_to(mount["mountPath"])
    ]
    if url.scheme != "file" or not mounts:
        return None
    deepest = max(mounts, key=lambda mount: len(mount["mountPath"]))
    volume: Manifest = next(volume for volume in pod["volumes"] if volume["name"] == deepest["name"])
    return volume


def claim_of(volume: Manifest, manifests: list[Manifest]) -> Manifest | None:
    """The claim of a volume; None where it has none or where these manifests do not contain it."""
    name = volume.get("persistentVolumeClaim", {}).get("claimName")
    claims = [manifest for manifest in manifests if manifest["kind"] == "PersistentVolumeClaim"]
    return next((claim for claim in claims if claim["metadata"]["name"] == name), None)


def settings_of(manifests: list[Manifest]) -> Settings:
    """The server's settings from the config map; variables that are not settings are skipped."""
    data = one(manifests, "ConfigMap")["data"]
    return Settings(**{VARIABLES[name]: value for name, value in data.items() if name in VARIABLES})


def bytes_of(quantity: str) -> int:
    """Bytes of a Kubernetes quantity in Ki, Mi or Gi."""
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    return int(quantity[:-2]) * units[quantity[-2:]]


def memory_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A memory limit below what images, requests and kept answers may take besides the processes themselves."""
    [container] = pod_of(manifests)["spec"]["containers"]
    limit = bytes_of(container["resources"]["limits"]["memory"])
    settings = settings_of(manifests)
    kept = settings.replay_bytes + settings.reuse_bytes
    needed = PROCESSES_BYTES + settings.decoder_bytes + 2 * settings.request_bytes + kept
    if limit < needed:
        yield (
            f"the memory limit is {limit >> 20} MiB; up to {needed >> 20} MiB may be needed: "
            "set UNDERPAINT_DECODER_BYTES and UNDERPAINT_REQUEST_BYTES lower"
        )


def thread_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A number of engine threads other than the requested cores."""
    # By default the engine uses all cores of its node. The number of threads decides the bits, so pods on unequal nodes
    # could not use each other's exact inversions.
    [container] = pod_of(manifests)["spec"]["containers"]
    cores = math.ceil(cores_of(container["resources"]["requests"]["cpu"]))
    threads = settings_of(manifests).threads
    if threads != cores:
        yield f"UNDERPAINT_THREADS is {threads}; it must be {cores}, the CPU request"


def cores_of(quantity: str) -> float:
    """Cores of a Kubernetes CPU quantity such as 2 or 500m."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def security_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Security settings of pod and namespace that are missing."""
    pod = pod_of(manifests)["spec"]
    [container] = pod["containers"]
    required = {
        "runs as 10001": pod["securityContext"]["runAsUser"] == 10001 and pod["securityContext"]["runAsNonRoot"],
        "has the default seccomp profile": pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault",
        "mounts no service account token": pod["automountServiceAccountToken"] is False,
        "gets no service links": pod["enableServiceLinks"] is False,
        "drops all capabilities": container["securityContext"]["capabilities"] == {"drop": ["ALL"]},
        "cannot gain privileges": container["securityContext"]["allowPrivilegeEscalation"] is False,
        "has a read-only root": container["securityContext"]["readOnlyRootFilesystem"] is True,
        "has a memory limit": "memory" in container["resources"]["limits"],
        "has no CPU limit": "cpu" not in container["resources"]["limits"],
    }
    yield from (f"not true: the pod {fact}" for fact, is_true in required.items() if not is_true)
    enforced = one(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    if enforced != "restricted":
        yield f"the namespace enforces the pod security standard '{enforced}'; it must be 'restricted'"


# --- metrics ---------------------------------------------------------------------------------------------------------


class IdleEngine:
    """The values of an idle dispatcher, so that the engine's gauges are exported."""

    num_running = 0
    queue_capacity = 0
    backlog_s = 0.0
    last_pass_at = 0.0
    models_ready: ClassVar[dict[str, bool]] = {}
    max_batch_sizes: ClassVar[dict[tuple[str, str, str], int]] = {}

    def num_waiting(self, priority: Priority) -> int:
        """No job waits."""
        return 0 * priority


class EmptyStore:
    """The values of an empty inversion store, so that its gauges are exported."""

    total_bytes = 0
    entries = 0


class SilentLog:
    """A log that has dropped no lines."""

    dropped = 0


def exported() -> set[str]:
    """The names of all series that the server can export."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch_engine(IdleEngine())
    metrics.watch_store(EmptyStore())
    metrics.watch_log(SilentLog())
    names = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def rules() -> list[Manifest]:
    """Every recording and alerting rule."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expression_problems() -> Iterator[str]:
    """Expressions that PromQL's grammar does not accept."""
    for rule in rules():
        try:
            promql_parser.parse(rule["expr"])
        except ValueError as error:
            yield f"{rule.get('record') or rule['alert']}: {error}"


def metric_problems() -> Iterator[str]:
    """Series that a rule reads and the server does not export."""
    known = exported() | {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        for name in sorted(selected(rule["expr"])):
            if ("underpaint_" in name or name.startswith("grpc_")) and name not in known:
                yield f"{rule.get('record') or rule['alert']} reads {name}, which the server does not export"


def selected(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    names: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names


# --- tools -----------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Path of a tool: the one beside this Python, else on PATH; raises FileNotFoundError if there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: make deploy-check installs it")
    return found


def tool_problems(*command: str | Path) -> Iterator[str]:
    """The output of a tool that failed."""
    done = subprocess.run([tool(str(command[0])), *command[1:]], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        yield (done.stdout + done.stderr).strip() or f"exit {done.returncode}"


def promtool_checks() -> Iterator[tuple[str, Iterator[str]]]:
    """The checks that need promtool, as in :func:`checks`."""
    folder = DEPLOY / "prometheus"
    yield "promtool check rules", tool_problems("promtool", "check", "rules", folder / "rules.yml")
    yield "promtool test rules", tool_problems("promtool", "test", "rules", folder / "rules_test.yml")
    yield "promtool check config", tool_problems("promtool", "check", "config", folder / "prometheus.yml")


# --- all -------------------------------------------------------------------------------------------------------------

MANIFEST_CHECKS: dict[str, Callable[[list[Manifest]], Iterator[str]]] = {
    "schemas": schema_problems,
    "probes": probe_problems,
    "stopping": stop_problems,
    "selectors": selector_problems,
    "DNS": dns_problems,
    "ports": port_problems,
    "settings": settings_problems,
    "replicas": replica_problems,
    "memory": memory_problems,
    "threads": thread_problems,
    "security": security_problems,
}


def checks() -> Iterator[tuple[str, Iterator[str]]]:
    """Every check: its name, and an iterator that runs it and yields the problems found."""
    yield "yamllint", tool_problems("yamllint", "-s", "-d", YAMLLINT, DEPLOY)
    yield "hadolint", tool_problems("hadolint", ROOT / "Dockerfile")
    for kustomization in KUSTOMIZATIONS:
        try:
            manifests = render(kustomization)
        except ValueError as error:
            yield f"kubernetes/{kustomization}: renders", iter([str(error)])
            continue
        for name, problems in MANIFEST_CHECKS.items():
            yield f"kubernetes/{kustomization}: {name}", problems(manifests)
    yield "prometheus/rules.yml: expressions", expression_problems()
    yield "prometheus/rules.yml: metrics are exported", metric_problems()
    if shutil.which("promtool"):
        yield from promtool_checks()
    else:
        print("skip  promtool is not installed: rules_test.yml was not run, prometheus.yml was not checked")


def collected(problems: Iterator[str]) -> list[str]:
    """All problems of one check; an entry or a tool that is missing counts as one."""
    try:
        return list(problems)
    except (ValueError, LookupError, OSError) as error:
        return [repr(error)]


def main() -> int:
    """Run all checks; returns the exit status."""
    failed = 0
    for name, iterator in checks():
        problems = collected(iterator)
        failed += bool(problems)
        print(f"{'FAIL' if problems else 'ok':5} {name}")
        for problem in problems:
            print(f"      {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
