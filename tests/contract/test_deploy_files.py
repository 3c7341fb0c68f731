"""What the Kubernetes files promise: they render, are valid, fit the settings, and nothing talks that need not.

The rules of isolation are evaluated here as a cluster would: a connection needs leave from both ends.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from jsonschema import Draft7Validator
from support.dashboards import rules, series_asked_for, series_that_exist

from feature_cache.worker.settings import WorkerSettings
from server.security.identity import Policy
from torchserve.config import TorchServeSettings, prepare, store_directory

ROOT: Final = Path(__file__).parents[2]
K8S: Final = ROOT / "k8s"
OVERLAYS: Final = ("dev", "prod", "two-region/a")
"""The other region differs by its label; `make check-deploy` renders and checks it, too."""
DOCKERFILES: Final = sorted((K8S / "docker").glob("*.Dockerfile"))

Object = dict[str, Any]

CLIENT: Final = {"pretrade/client": "true"}
SERVER: Final = {"app.kubernetes.io/part-of": "pretrade", "app.kubernetes.io/name": "server"}
WORKER: Final = {"app.kubernetes.io/part-of": "pretrade", "app.kubernetes.io/name": "worker"}
INGEST: Final = {"app.kubernetes.io/part-of": "pretrade", "app.kubernetes.io/name": "ingest"}
REPLICA: Final = {"app.kubernetes.io/part-of": "pretrade", "app.kubernetes.io/name": "torchserve"}
COLLECTOR: Final = {"app.kubernetes.io/name": "otel-collector"}
REDIS: Final = {"app.kubernetes.io/name": "redis"}
POSTGRESQL: Final = {"app.kubernetes.io/name": "postgresql"}
KAFKA: Final = {"app.kubernetes.io/name": "kafka"}
STRANGER: Final = {"app.kubernetes.io/name": "stranger"}
OWN: Final = "pretrade"
CLIENTS: Final = "execution"
NAMESPACES: Final = {
    "client": CLIENTS,
    "impostor": "elsewhere",
    "server": OWN,
    "worker": OWN,
    "ingest": OWN,
    "replica": OWN,
}
"""Of pods; others are in one that the policies do not name."""
TALKS: Final = {
    ("client", "server", 7001),
    ("server", "replica", 7070),
    ("server", "redis", 6379),
    ("server", "postgresql", 5432),
    ("server", "collector", 4317),
    ("worker", "kafka", 9092),
    ("worker", "kafka", 9094),
    ("ingest", "kafka", 9092),
    ("ingest", "kafka", 9094),
    ("worker", "redis", 6379),
}
PODS: Final[Mapping[str, Mapping[str, str]]] = {
    "client": CLIENT,
    "impostor": CLIENT,
    "server": SERVER,
    "worker": WORKER,
    "ingest": INGEST,
    "replica": REPLICA,
    "redis": REDIS,
    "collector": COLLECTOR,
    "postgresql": POSTGRESQL,
    "kafka": KAFKA,
    "stranger": STRANGER,
}


def tool(name: str) -> str:
    """A program that a development dependency brings into the environment."""
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def run(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program outside of the repository, as a container would, with nothing of ours in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    return subprocess.run(
        argv, capture_output=True, text=True, cwd="/", env=clean | environment, timeout=60, check=False
    )


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay, rendered."""
    done = run(tool("kubectl"), "kustomize", K8S / "overlays" / request.param)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("rendered") / f"{request.param.replace('/', '-')}.yaml"
    path.write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def objects(rendered: Path) -> list[Object]:
    return list(yaml.safe_load_all(rendered.read_text()))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def workloads(objects: list[Object]) -> dict[str, Object]:
    return of_kind(objects, "Deployment") | of_kind(objects, "StatefulSet")


def pod_of(workload: Object) -> Object:
    pod: Object = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: Object) -> Object:
    (container,) = pod_of(workload)["containers"]
    assert isinstance(container, dict)
    return container


def containers_of(workload: Object) -> list[Object]:
    """The container and its sidecars."""
    return [container_of(workload), *pod_of(workload).get("initContainers", ())]


def primary_of(objects: list[Object]) -> Object:
    """The sidecar of a server."""
    (sidecar,) = pod_of(workloads(objects)["server"])["initContainers"]
    assert isinstance(sidecar, dict)
    return sidecar


def labels_of(workload: Object) -> Mapping[str, str]:
    labels: Mapping[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def variables_of(objects: list[Object], workload: Object) -> dict[str, str]:
    """The environment that the ConfigMap gives to a workload's container."""
    (source,) = container_of(workload)["envFrom"]
    data: dict[str, str] = of_kind(objects, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    return data


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects these labels."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", ())
    )


def permits(policies: Collection[Object], direction: str, pod: str, peer: str, port: int) -> bool:
    """Whether the policies let a pod talk in one direction with a peer."""
    peers = {"ingress": "from", "egress": "to"}[direction]
    isolating = [
        policy["spec"]
        for policy in policies
        if NAMESPACES.get(pod) == OWN
        and selects(policy["spec"]["podSelector"], PODS[pod])
        and direction.capitalize() in policy["spec"]["policyTypes"]
    ]
    return not isolating or any(
        any(each["port"] == port for each in rule["ports"]) and any(admits(each, peer) for each in rule[peers])
        for spec in isolating
        for rule in spec.get(direction, ())
    )


def admits(rule: Object, peer: str) -> bool:
    """Whether one `from` or `to` of a policy means a pod."""
    if "podSelector" not in rule or not selects(rule["podSelector"], PODS[peer]):
        return False
    namespace = NAMESPACES.get(peer, "stores")
    if "namespaceSelector" not in rule:
        return namespace == OWN
    return selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})


def test_every_object_is_valid_for_kubernetes(rendered: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump_all(each for each in objects_in(rendered) if "." not in api_group(each)))
    done = run(tool("kubernetes-validate"), "--strict", "--quiet", own)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_object_of_an_operator_is_one_it_knows(rendered: Path) -> None:
    """By schemas made from the operators' own definitions, where a field that is not defined is an error."""
    foreign = [each for each in objects_in(rendered) if "." in api_group(each)]
    assert bool(foreign) == (rendered.stem != "dev")
    for each in foreign:
        schema = json.loads((K8S / "schemas" / f"{each['kind'].lower()}.json").read_text())
        problems = [f"{problem.json_path}: {problem.message}" for problem in Draft7Validator(schema).iter_errors(each)]
        assert not problems, (each["kind"], each["metadata"]["name"], problems)


def objects_in(rendered: Path) -> list[Object]:
    return list(yaml.safe_load_all(rendered.read_text()))


def api_group(each: Object) -> str:
    """What is not Kubernetes' own has a dot in it, and does not end in k8s.io."""
    group, _, _ = each["apiVersion"].rpartition("/")
    return "" if group.endswith(".k8s.io") else group


def test_there_is_all_that_the_product_consists_of(objects: list[Object]) -> None:
    assert set(workloads(objects)) == {
        "server",
        "worker",
        "ingest",
        "secondary-torchserve",
        "challenger-torchserve",
    }
    assert [
        container_of(each)["env"][0]["value"]
        for each in of_kind(objects, "Deployment").values()
        if "torchserve" in each["metadata"]["name"]
    ] == ["challenger", "champion"]


def test_the_primary_is_a_native_sidecar_that_keeps_no_server_from_starting_or_serving(objects: list[Object]) -> None:
    primary = primary_of(objects)
    assert primary["restartPolicy"] == "Always"
    assert not {"startupProbe", "readinessProbe"} & set(primary), "the secondary answers meanwhile"
    assert primary["image"].split("/")[-1].startswith("pretrade-torchserve:")
    assert primary["args"] == exec_form("torchserve", "CMD")
    (secondary,) = [each for name, each in workloads(objects).items() if name.startswith("secondary")]
    config = {volume["name"]: volume for volume in pod_of(secondary)["volumes"]}["config"]["configMap"]
    mounted = {volume["name"]: volume for volume in pod_of(workloads(objects)["server"])["volumes"]}
    assert mounted["torchserve"]["configMap"] == config, "both replicas are configured alike"
    assert config["name"] in of_kind(objects, "ConfigMap")


def test_what_runs_in_an_archive_shares_neither_user_nor_files_with_its_server(objects: list[Object]) -> None:
    """It shares the network of the pod, and with it the admin port: by the operator token alone that is steered."""
    server, primary = workloads(objects)["server"], primary_of(objects)
    user = pod_of(server)["securityContext"]["runAsUser"]
    assert container_of(server)["securityContext"].get("runAsUser", user) == user
    assert primary["securityContext"]["runAsUser"] != user
    assert not pod_of(server).get("shareProcessNamespace")
    shared = {mount["name"] for mount in primary["volumeMounts"]}
    shared &= {mount["name"] for mount in container_of(server)["volumeMounts"]}
    assert not shared
    variables = variables_of(objects, server)
    assert variables["PRETRADE_ADMIN__HOST"] == "127.0.0.1"
    assert "PRETRADE_ACCESS__ADMIN" not in variables, "the default: the operator token"


def test_production_asks_its_callers_who_they_are(objects: list[Object], rendered: Path, tmp_path: Path) -> None:
    server = workloads(objects)["server"]
    variables = variables_of(objects, server)
    if rendered.stem == "dev":
        assert variables["PRETRADE_ACCESS__DECISION_OPEN_TO_NETWORK"] == "true", "by name"
        return
    assert variables["PRETRADE_ACCESS__DECISION"] == "certificate"
    assert "PRETRADE_ACCESS__DECISION_OPEN_TO_NETWORK" not in variables
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container_of(server)["volumeMounts"]}
    assert Path(variables["PRETRADE_TLS__CLIENT_CA"]) == mounts["tls"] / "ca.crt"
    policy = Path(variables["PRETRADE_ACCESS__POLICY"])
    assert policy.parent == mounts["access"]
    (volume,) = (each for each in pod_of(server)["volumes"] if each["name"] == "access")
    content = of_kind(objects, "ConfigMap")[volume["configMap"]["name"]]["data"][policy.name]
    read = Policy().with_file(content.encode())
    assert read.strategies, "limits by strategy are no limits while callers may name any"
    assert set(read.strategies) == set(read.roles)
    (allowed,) = (
        peer
        for policy in of_kind(objects, "NetworkPolicy").values()
        if policy["metadata"]["name"] == "server"
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        if {"port": 7001} in rule["ports"]
    )
    assert allowed["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": CLIENTS}


def test_decisions_go_before_features_and_both_before_a_model_on_trial(objects: list[Object]) -> None:
    values = {name: each["value"] for name, each in of_kind(objects, "PriorityClass").items()}
    order = {name: values[pod_of(each)["priorityClassName"]] for name, each in workloads(objects).items()}
    assert order["server"] == order["secondary-torchserve"] > order["worker"] == order["ingest"]
    assert order["ingest"] > order["challenger-torchserve"] > 0


def test_a_node_whose_cores_are_all_in_use_gives_a_model_on_trial_less(objects: list[Object]) -> None:
    if not of_kind(objects, "HorizontalPodAutoscaler"):
        return  # the overlay for a laptop, where no pod reserves more than a tenth of a core
    cores = {
        name: container_of(workloads(objects)[name])["resources"]["requests"]["cpu"]
        for name in ("challenger-torchserve", "secondary-torchserve")
    }
    assert cores == {"challenger-torchserve": "500m", "secondary-torchserve": "2"}


def test_the_autoscalers_go_by_metrics_that_exist_and_nobody_contradicts_them(objects: list[Object]) -> None:
    scalers = of_kind(objects, "HorizontalPodAutoscaler")
    if not scalers:
        return  # the overlay for a laptop
    server, worker = workloads(objects)["server"], workloads(objects)["worker"]
    assert "replicas" not in server["spec"]
    assert "replicas" not in worker["spec"]
    rules = yaml.safe_load((K8S / "observability/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    served = {rule["name"]["as"] for rule in rules}
    assert {metric["pods"]["metric"]["name"] for metric in scalers["server"]["spec"]["metrics"]} == served
    for rule in rules:
        assert series_asked_for(rule["seriesQuery"]) <= series_that_exist()
    trigger = of_kind(objects, "ScaledObject")["worker"]["spec"]["triggers"][0]["metadata"]
    defaults = WorkerSettings()
    assert trigger["consumerGroup"] == defaults.kafka_group
    assert trigger["topic"] == defaults.kafka_topic
    assert trigger["bootstrapServers"] == variables_of(objects, worker)["PRETRADE_WORKER_KAFKA_BOOTSTRAP_SERVERS"]
    assert of_kind(objects, "ScaledObject")["worker"]["spec"]["maxReplicaCount"] == defaults.kafka_partitions


def test_the_operator_scrapes_what_the_rules_go_by(objects: list[Object]) -> None:
    monitors = of_kind(objects, "ServiceMonitor")
    for name, monitor in monitors.items():
        if name in ("pretrade-bars", "pretrade-collector"):  # elsewhere: test_bars_component.py, test_telemetry.py
            continue
        (service,) = [
            each
            for each in of_kind(objects, "Service").values()
            if selects(monitor["spec"]["selector"], each["metadata"]["labels"])
        ]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    jobs = {monitor["spec"]["endpoints"][0]["relabelings"][0]["replacement"] for monitor in monitors.values()}
    scraped = {f"pretrade-{name}" for name in ("server", "worker", "ingest", "bars", "collector")}
    assert jobs in (set(), scraped)
    asked = set(re.findall(r'job="([^"]+)"', " ".join(str(rule["expr"]) for rule in rules())))
    assert not monitors or asked <= jobs


def test_the_operators_rules_are_the_rules(objects: list[Object]) -> None:
    wrapped = [group for each in of_kind(objects, "PrometheusRule").values() for group in each["spec"]["groups"]]
    files = sorted((K8S / "observability/prometheus").glob("*.rules.yaml"))
    assert wrapped in ([], [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]), (
        "run .ci/prometheus-rules"
    )


def test_only_images_that_the_release_workflow_signed_may_run(objects: list[Object]) -> None:
    for policy in of_kind(objects, "Policy").values():
        (rule,) = policy["spec"]["rules"]
        (verified,) = rule["verifyImages"]
        keyless = verified["attestors"][0]["entries"][0]["keyless"]
        assert verified["required"] is True
        assert (verified["failureAction"], verified["mutateDigest"]) == ("Enforce", True)
        assert keyless["subject"].endswith("/.github/workflows/release.yml@refs/tags/v*")
        (pattern,) = verified["imageReferences"]
        for workload in workloads(objects).values():
            for container in containers_of(workload):
                assert fnmatch(container["image"], f"{pattern}:*"), "what is not matched is not verified"


def test_each_region_has_room_for_the_other_ones_orders(objects: list[Object], rendered: Path) -> None:
    if rendered.stem in {"dev", "prod"}:
        return
    (namespace,) = of_kind(objects, "Namespace").values()
    assert namespace["metadata"]["labels"]["pretrade/region"] == rendered.stem[-1]
    alone = yaml.safe_load((K8S / "components/autoscaling/server.yaml").read_text())["spec"]
    spec = of_kind(objects, "HorizontalPodAutoscaler")["server"]["spec"]
    assert spec["minReplicas"] == 2 * alone["minReplicas"]
    assert spec["maxReplicas"] == 2 * alone["maxReplicas"]


def test_no_secret_is_kept_in_the_files(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret")
    for config_map in of_kind(objects, "ConfigMap").values():
        assert not re.search(r"://[^/\s]*:[^/\s]*@|password", json.dumps(config_map["data"]), re.IGNORECASE)


def test_every_pod_is_confined_and_probed(objects: list[Object]) -> None:
    accounts = of_kind(objects, "ServiceAccount")
    for name, workload in workloads(objects).items():
        pod = pod_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert pod["automountServiceAccountToken"] is False, name
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False, name
        assert "readinessProbe" in container_of(workload), name
        assert ("topologySpreadConstraints" in pod) == (name != "ingest"), "of which there is one"
        for container in containers_of(workload):
            context = dict(container["securityContext"])
            assert context.pop("runAsUser", pod["securityContext"]["runAsUser"]) > 0, name
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name
            assert "livenessProbe" in container, name
            assert not container["image"].endswith(":latest"), name
            assert ":" in container["image"], name


def test_no_variable_of_a_service_can_be_taken_for_a_setting(objects: list[Object]) -> None:
    """A Service named `pretrade` would put PRETRADE_PORT into every pod, and the server refuses unknown settings."""
    for name, workload in workloads(objects).items():
        assert pod_of(workload)["enableServiceLinks"] is False, name


def test_every_probe_and_service_names_a_port_that_is_there(objects: list[Object]) -> None:
    for container in itertools.chain.from_iterable(map(containers_of, workloads(objects).values())):
        ports = {port.get("name"): port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for how, what in container.get(probe, {}).items():
                if how == "grpc":
                    assert what["port"] in ports.values()
                elif how in ("httpGet", "tcpSocket"):
                    assert what["port"] in ports
    for service in of_kind(objects, "Service").values():
        chosen = [
            each
            for each in workloads(objects).values()
            if selects({"matchLabels": service["spec"]["selector"]}, labels_of(each))
        ]
        assert len(chosen) == 1
        names = {port["name"] for port in container_of(chosen[0])["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_server_starts_with_the_settings_and_the_secret(objects: list[Object], tmp_path: Path) -> None:
    server = workloads(objects)["server"]
    variables = variables_of(objects, server)
    (mount,) = [each for each in container_of(server)["volumeMounts"] if each["name"] == "secrets"]
    assert variables.pop("PRETRADE_SECRETS_DIR") == mount["mountPath"]
    (volume,) = [each for each in pod_of(server)["volumes"] if each["name"] == "secrets"]
    secrets = {
        "redis-url": "redis://:word@redis:6379/0",
        "database-url": "postgresql+psycopg://u:word@postgresql/audit",
    }
    for item in volume["secret"]["items"]:
        (tmp_path / item["path"]).write_text(secrets.pop(item["key"]))
    assert not secrets
    code = """if True:
        from server.settings import load
        settings = load()
        print(settings.redis_url.get_secret_value())
        print(settings.database_url.get_secret_value())
        print(settings.model_dump_json())
    """
    done = run(sys.executable, "-c", code, PRETRADE_SECRETS_DIR=str(tmp_path), **variables)
    assert done.returncode == 0, done.stderr
    redis_url, database_url, dumped = done.stdout.splitlines()
    assert redis_url == "redis://:word@redis:6379/0"
    assert database_url == "postgresql+psycopg://u:word@postgresql/audit"
    settings = json.loads(dumped)

    ports = {port["name"]: port["containerPort"] for port in container_of(server)["ports"]}
    health_port = settings["grpc"]["health_port"]
    health = {} if health_port is None else {"health": health_port}
    assert ports == {"decision": settings["grpc"]["port"], "metrics": settings["metrics"]["port"]} | health
    assert settings["grpc"]["host"] == settings["metrics"]["host"] == "0.0.0.0"
    services = of_kind(objects, "Service")
    (inference,) = primary_of(objects)["ports"]
    assert settings["replicas"]["primary"] == f"127.0.0.1:{inference['containerPort']}"
    for replica in ("secondary", "challenger"):
        host, port = settings["replicas"][replica].split(":")
        assert [each["port"] for each in services[host]["spec"]["ports"]] == [int(port)]
        assert services[host]["spec"]["selector"]["app.kubernetes.io/instance"] == replica
    (journal,) = [each for each in container_of(server)["volumeMounts"] if each["name"] == "journal"]
    assert Path(settings["journal"]["path"]).parent == Path(journal["mountPath"])
    assert [each["metadata"]["name"] for each in server["spec"]["volumeClaimTemplates"]] == ["journal"]
    stopping = (
        settings["grpc"]["drain_seconds"] + settings["grpc"]["grace_seconds"] + settings["shipping"]["drain_seconds"]
    )
    stopping += container_of(server)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_of(server)["terminationGracePeriodSeconds"] > stopping


def test_the_worker_starts_with_its_settings(objects: list[Object]) -> None:
    worker = workloads(objects)["worker"]
    (secret,) = container_of(worker)["env"]
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "pretrade", "key": "redis-url"}
    variables = variables_of(objects, worker) | {secret["name"]: "redis://redis:6379/0"}
    code = """if True:
        from feature_cache.worker.settings import load
        settings = load()
        print(settings.redis_url.get_secret_value())
        print(settings.model_dump_json())
    """
    done = run(sys.executable, "-c", code, **variables)
    assert done.returncode == 0, done.stderr
    redis_url, dumped = done.stdout.splitlines()
    assert redis_url == "redis://redis:6379/0"
    settings = json.loads(dumped)
    assert [port["containerPort"] for port in container_of(worker)["ports"]] == [settings["metrics_port"]]
    assert settings["metrics_host"] == "0.0.0.0"


def test_the_live_feed_starts_with_its_arguments_and_feeds_what_the_servers_decide_on(objects: list[Object]) -> None:
    ingest, server = workloads(objects)["ingest"], workloads(objects)["server"]
    assert (ingest["spec"]["replicas"], ingest["spec"]["strategy"]) == (1, {"type": "Recreate"})
    container = container_of(ingest)
    python, *module = container["command"]
    assert python == "python"
    given = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    venue = given["exchange"].upper()
    fed = [f"{symbol}.{venue}" for symbol in given["instruments"].split(",")]
    assert fed == json.loads(variables_of(objects, server)["PRETRADE_INSTRUMENTS"])
    assert given["metrics-host"] == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [int(given["metrics-port"])]
    # Everything is understood; only the brokers are missing.
    arguments = [argument.replace("=kafka:9092", "=127.0.0.1:1") for argument in container["args"]]
    done = run(sys.executable, *module, *arguments)
    assert (done.returncode, done.stderr.splitlines()[-1].partition(": ")[0]) == (1, "127.0.0.1:1"), done.stderr


def test_the_live_feed_reaches_the_public_network_and_nobody_else_does(objects: list[Object]) -> None:
    reaching = {
        (policy["metadata"]["name"], port["port"])
        for policy in of_kind(objects, "NetworkPolicy").values()
        for rule in policy["spec"].get("egress", ())
        for peer in rule["to"]
        if "ipBlock" in peer
        for port in rule["ports"]
    }
    assert reaching == {("ingest", 443), ("ingest", 9443)}


def test_only_what_must_talk_may_talk(objects: list[Object]) -> None:
    policies = of_kind(objects, "NetworkPolicy").values()
    talks = {
        (source, target, port)
        for source, target in itertools.permutations(PODS, 2)
        for port in (7001, 7002, 7003, 7004, 7005, 7070, 6379, 5432, 9092, 9094, 4317, 443, 9443)
        if {source, target} & {"server", "worker", "ingest", "replica"}
        and permits(policies, "egress", source, target, port)
        and permits(policies, "ingress", target, source, port)
    }
    assert talks == TALKS


def test_the_pods_carry_the_labels_that_the_policies_go_by(objects: list[Object]) -> None:
    for name, workload in workloads(objects).items():
        expected = {"server": SERVER, "worker": WORKER, "ingest": INGEST}.get(name, REPLICA)
        assert expected.items() <= labels_of(workload).items()


def test_monitoring_reaches_the_metrics_and_nothing_else(objects: list[Object]) -> None:
    reached = {
        (policy["metadata"]["name"], port["port"])
        for policy in of_kind(objects, "NetworkPolicy").values()
        for rule in policy["spec"].get("ingress", ())
        for peer in rule["from"]
        for port in rule["ports"]
        if "podSelector" not in peer
    }
    assert reached == {("server", 7003), ("worker", 7004), ("ingest", 7005)}


def test_every_disruption_budget_guards_running_pods(objects: list[Object]) -> None:
    guarded = {
        name: [
            workload
            for workload, each in workloads(objects).items()
            if selects(budget["spec"]["selector"], labels_of(each))
        ]
        for name, budget in of_kind(objects, "PodDisruptionBudget").items()
    }
    assert guarded == {"server": ["server"], "worker": ["worker"], "secondary": ["secondary-torchserve"]}


def test_production_runs_the_version_of_this_repository(objects: list[Object], rendered: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = "dev" if rendered.stem == "dev" else project["version"]
    images = [each["image"] for workload in workloads(objects).values() for each in containers_of(workload)]
    assert {image.split(":")[1] for image in images} == {expected}


# --- TorchServe: the same configuration as the embedded stack's


def properties(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_torchserve_is_configured_as_in_the_embedded_stack(tmp_path: Path) -> None:
    archive = tmp_path / "champion.mar"
    archive.touch()
    directory = tmp_path / "embedded"
    launch = prepare(TorchServeSettings(archive=archive, directory=directory, grpc_port=7070))
    embedded = properties((directory / "config.properties").read_text())
    deployed = properties((K8S / "torchserve" / "config.properties").read_text())
    assert embedded.pop("load_models") == "champion=champion.mar"  # the container is told by `--models`
    for address in ("grpc_inference_address", "inference_address", "management_address", "allowed_urls"):
        assert embedded.pop(address)
        assert deployed.pop(address)
    assert deployed == embedded
    assert (K8S / "torchserve" / "log4j2.xml").read_text() == (directory / "log4j2.xml").read_text()

    entrypoint, command = exec_form("torchserve", "ENTRYPOINT"), exec_form("torchserve", "CMD")
    switches = [
        argument for argument in launch.argv if argument.startswith(("-XX", "-Xm", "--enable", "--sun", "--disable"))
    ]
    assert [argument for argument in entrypoint if argument in switches] == switches
    assert "-ncs" in entrypoint
    assert command == ["--models", "champion=champion.mar"]


# --- Dockerfiles


def exec_form(image: str, instruction: str) -> list[str]:
    """The arguments of an instruction's exec form."""
    text = (K8S / "docker" / f"{image}.Dockerfile").read_text()
    logical = re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n", "", text))
    (arguments,) = re.findall(rf"(?m)^{instruction} [^\[\n]*(\[.*\])$", logical)
    parsed: list[str] = json.loads(arguments)
    return parsed


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = run(tool("hadolint"), path)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_image_runs_as_nobody_special_and_takes_only_what_was_built(path: Path) -> None:
    _, final = path.read_text().rsplit("\nFROM ", 1)
    assert "USER 10001:10001" in final
    assert not re.search(r"(?m)^COPY \. ", final)
    allowed = (path.parent / f"{path.name}.dockerignore").read_text().splitlines()
    assert "*" in allowed
    for line in allowed:
        if line.startswith("!") and not line.startswith("!.pretrade/"):
            assert (ROOT / line[1:]).exists(), line


@pytest.mark.parametrize("image", ["server", "worker", "torchserve"])
def test_a_health_check_fails_where_nothing_serves(image: str) -> None:
    """It must end with an error because of the missing server, and not because the check itself is wrong."""
    python, *arguments = exec_form(image, "HEALTHCHECK")
    assert python == "python"
    done = run(sys.executable, *(each.replace("70", "1") for each in arguments), MODEL="champion")
    assert done.returncode == 1
    assert re.search(r"Connection refused|UNAVAILABLE", done.stderr), done.stderr


def test_the_readiness_check_of_a_replica_takes_only_what_its_image_holds() -> None:
    ready = "from local.stack.parts.torchserve import ready"
    code = f"import sys; {ready}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = set(run(sys.executable, "-c", code).stdout.split()) - sys.stdlib_module_names
    named = {name for name in loaded if not name.startswith("_")}
    named -= {"grpc_health", "grpc_reflection", "grpc_tools"}  # which grpc takes along where they are installed
    assert {"grpc", "numpy", "pretrade"} <= named
    assert named <= {
        "grpc",
        "google",
        "numpy",
        "cython_runtime",
        "pretrade",
        "local",
        "feature_cache",
        "fallback",
        "server",  # of which, as of the one above, the image has the code, and not what it requires
        "typing_extensions",
    }


def test_the_model_servers_image_holds_what_make_models_made() -> None:
    made = store_directory(Path(".pretrade"), None).as_posix()
    dockerfile = (K8S / "docker" / "torchserve.Dockerfile").read_text()
    assert f"ARG MODELS={made}\nCOPY ${{MODELS}}/*.mar /models/\n" in dockerfile
    let_through = (K8S / "docker" / "torchserve.Dockerfile.dockerignore").read_text().splitlines()
    (pattern,) = (line.removeprefix("!") for line in let_through if line.endswith(".mar"))
    assert Path(f"{made}/champion.mar").match(pattern)
