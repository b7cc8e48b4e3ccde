"""Check everything under deploy/, and the Dockerfile, without a network or a cluster.

Run by `make deploy-check`, with a Python that has the server and requirements/deploy.txt installed. One line a check;
exits 1 if one failed.
"""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
KUSTOMIZATIONS = ("base", "overlays/cpu-dev")
KUBERNETES = ("1.30", "1.37")
"""Oldest supported version (the first whose API has preStop sleep switched on), and the newest."""
PROBES = {"startupProbe": "startup", "readinessProbe": "readiness", "livenessProbe": "liveness"}
EXIT_S = 10
"""Seconds between the end of the drain and the end of the process."""
VARIABLES = {f"UNDERPAINT_{name.upper()}": name for name in Settings.model_fields}
YAMLLINT = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def render(kustomization: str) -> list[Manifest]:
    """The manifests as they would be applied."""
    folder = DEPLOY / "kubernetes" / kustomization
    done = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of that kind."""
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def pod_of(manifests: list[Manifest]) -> Manifest:
    """The template of the pods that the deployment starts."""
    pod: Manifest = one(manifests, "Deployment")["spec"]["template"]
    return pod


def schema_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Manifests that a supported version of Kubernetes would refuse."""
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
    """Probes that ask another port or health service than the one that answers them."""
    [container] = pod_of(manifests)["spec"]["containers"]
    port = next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc")
    for probe, service in PROBES.items():
        if container[probe].get("grpc") != {"port": port, "service": service}:
            yield f"{probe} does not ask port {port} for the health service '{service}'"


def stop_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A grace period that ends before the server has drained."""
    pod = pod_of(manifests)["spec"]
    sleep_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = settings_of(manifests).drain_s
    needed = sleep_s + drain_s + EXIT_S
    if not pod["terminationGracePeriodSeconds"] > needed:
        yield f"grace {pod['terminationGracePeriodSeconds']} s is not more than {sleep_s} + {drain_s:g} + {EXIT_S} s"


def selector_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Selectors that miss the pods."""
    labels = pod_of(manifests)["metadata"]["labels"].items()
    for kind, name, selector in selectors(manifests):
        if not selector.items() <= labels:
            yield f"{kind} {name} selects {selector}, which the pods are not labelled"


def selectors(manifests: list[Manifest]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Everything that is meant to select the server's pods."""
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
    """A network policy that cuts the pods off from the DNS servers."""
    # A label that Kustomize adds to this peer selects no DNS server any more, and every name lookup times out.
    peers = [peer for rule in one(manifests, "NetworkPolicy")["spec"]["egress"] for peer in rule["to"]]
    if {"k8s-app": "kube-dns"} not in [peer.get("podSelector", {}).get("matchLabels") for peer in peers]:
        yield "no egress rule selects exactly k8s-app=kube-dns"


def port_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Ports that the server, the pod, the service and the policy call differently."""
    [container] = pod_of(manifests)["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    settings = settings_of(manifests)
    for name, listen in (("grpc", settings.listen), ("metrics", settings.metrics_listen)):
        if listen != f"0.0.0.0:{ports[name]}":
            yield f"the server listens on {listen}, the pod's port {name} is {ports[name]}"
    named = [port["targetPort"] for m in manifests if m["kind"] == "Service" for port in m["spec"]["ports"]]
    named += [port["port"] for rule in one(manifests, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]]
    yield from (f"there is no port '{name}'" for name in named if name not in ports)
    annotated = pod_of(manifests)["metadata"]["annotations"]["prometheus.io/port"]
    if annotated != str(ports["metrics"]):
        yield f"the scrape annotation says {annotated}, the port is {ports['metrics']}"


def settings_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Variables that are no settings, and a store that may outgrow its volume."""
    data = one(manifests, "ConfigMap")["data"]
    yield from (f"{name} is no setting" for name in data if name not in VARIABLES)
    settings = settings_of(manifests)
    volumes = {volume["name"]: volume for volume in pod_of(manifests)["spec"]["volumes"]}
    limit = bytes_of(volumes["store"]["emptyDir"]["sizeLimit"])
    if settings.store_url.startswith("file:") and not settings.store_bytes < limit:
        yield f"the store may grow to {settings.store_bytes} bytes on a volume of {limit}"


def settings_of(manifests: list[Manifest]) -> Settings:
    """The settings that the server reads from the config map."""
    data = one(manifests, "ConfigMap")["data"]
    return Settings(**{VARIABLES[name]: value for name, value in data.items() if name in VARIABLES})


def bytes_of(quantity: str) -> int:
    """Bytes of a Kubernetes quantity in binary units."""
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    return int(quantity[:-2]) * units[quantity[-2:]]


def thread_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A number of threads that is not that of the cores asked for."""
    # By default the engine takes all cores of its node: pods on different nodes could not undo each other's inversions.
    [container] = pod_of(manifests)["spec"]["containers"]
    cores = math.ceil(cores_of(container["resources"]["requests"]["cpu"]))
    threads = settings_of(manifests).threads
    if threads != cores:
        yield f"UNDERPAINT_THREADS is {threads}, the CPU request is for {cores}"


def cores_of(quantity: str) -> float:
    """Cores of a Kubernetes quantity."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def security_problems(manifests: list[Manifest]) -> Iterator[str]:
    """What the pod may do and should not."""
    pod = pod_of(manifests)["spec"]
    [container] = pod["containers"]
    wanted = {
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
    yield from (f"not so: the pod {fact}" for fact, so in wanted.items() if not so)
    enforced = one(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    if enforced != "restricted":
        yield f"the namespace enforces '{enforced}'"


# --- metrics ---------------------------------------------------------------------------------------------------------


class IdleEngine:
    """Enough of an engine for its gauges to be exported."""

    num_running = 0
    queue_capacity = 0
    backlog_s = 0.0
    last_pass_at = 0.0

    def num_waiting(self, priority: Priority) -> int:
        """No job waits."""
        return 0 * priority


class EmptyStore:
    """The same of a store."""

    total_bytes = 0
    entries = 0


def exported() -> set[str]:
    """Every series name that the server can export."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch_engine(IdleEngine())
    metrics.watch_store(EmptyStore())
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
                yield f"{rule.get('record') or rule['alert']} reads {name}, which nobody exports"


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
    """Where a tool is: beside this Python first, then anywhere on the path."""
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
    """Each check by promtool, with its problems."""
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
    "threads": thread_problems,
    "security": security_problems,
}


def checks() -> Iterator[tuple[str, Iterator[str]]]:
    """Every check: its name, and the problems it finds when it is run."""
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
    """All problems; what is missing or unreadable is one too."""
    try:
        return list(problems)
    except (ValueError, LookupError, OSError) as error:
        return [repr(error)]


def main() -> int:
    """Run all checks; the exit status."""
    failed = 0
    for name, problems in checks():
        found = collected(problems)
        failed += bool(found)
        print(f"{'FAIL' if found else 'ok':5} {name}")
        for problem in found:
            print(f"      {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
