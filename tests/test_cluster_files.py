"""What infra/ has for clusters: manifests as schemas say, and commands that are understood."""

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

from glipv2.jobs.cli import parse
from glipv2.jobs.pretrain import check_ranks
from glipv2.jobs.ray_jobs import TOKEN_FILE
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.engine import check_engine
from glipv2.pipeline.loader import lane_count
from glipv2.pipeline.ray_cluster import room_on
from glipv2.pipeline.ray_trainer import world_sizes

CLUSTER = Path(__file__).parent.parent / "infra" / "cluster"
MANIFESTS = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
PAGES = sorted((CLUSTER.parent / "docs").glob("*.md"))
KUBERAY = yaml.safe_load((CLUSTER.parent.parent / "tests/data/kuberay.yaml").read_text())
KUBERNETES = kubernetes_validate.latest_version()


def documents() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in MANIFESTS]


def ray_cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec", spec)


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every pod that a manifest makes."""
    if document["kind"] == "CronJob":
        return [document["spec"]["jobTemplate"]["spec"]["template"]]
    cluster = ray_cluster(document)
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def ray_clusters() -> list[dict[str, Any]]:
    return [ray_cluster(document) for document in documents() if document["kind"] != "CronJob"]


def pods() -> list[dict[str, Any]]:
    return [template["spec"] for document in documents() for template in templates(document)]


def validate(document: dict[str, Any]) -> None:
    """Against the schemas of its kind; unknown fields are refused, as a cluster drops them."""
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, KUBERAY)
    for template in templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def commands() -> list[str]:
    """Every glipv2 command of manifests, scripts and pages."""
    found = [d["spec"]["entrypoint"] for d in documents() if d["kind"] == "RayJob"]
    found += [shlex.join(c["command"]) for pod in pods() for c in pod["containers"]
              if "command" in c]  # fmt: skip
    comments = [re.findall(r"^#   .*?(glipv2 [a-z]+ .+)$", path.read_text(), re.MULTILINE)
                for path in (*MANIFESTS, CLUSTER / "ray_up.yaml")]  # fmt: skip
    pages = [re.findall(r"`(glipv2 [a-z]+ [^`]+)`", page.read_text()) for page in PAGES]
    return [*found, *(command for own in (*comments, *pages) for command in own)]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command: str) -> None:
    words = shlex.split(command)[1:]
    parsed = parse(words)
    assert parsed.command == words[0]
    if parsed.command == "submit":
        parse([parsed.stage, parsed.recipe, *parsed.passed_on])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_what_their_schemas_allow(path: Path) -> None:
    validate(yaml.safe_load(path.read_text()))


def test_there_is_a_manifest_of_each_kind_and_a_page_for_each_scenario() -> None:
    kinds = {(document["apiVersion"], document["kind"]) for document in documents()}
    assert kinds >= {("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob")}
    scenarios = {"label_on_spot_nodes", "pretrain_on_several_nodes", "evaluate_every_night"}
    assert scenarios <= {page.stem for page in PAGES}


def container(document: dict[str, Any]) -> dict[str, Any]:
    return templates(document)[-1]["spec"]["containers"][0]


def worker(document: dict[str, Any]) -> dict[str, Any]:
    return ray_cluster(document)["workerGroupSpecs"][0]


def renamed(tree: dict[str, Any], name: str, other: str) -> None:
    tree[other] = tree.pop(name)


SLIPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "resource": lambda d: renamed(container(d), "resources", "resource"),
    "quantity": lambda d: container(d)["resources"]["requests"].update(cpu=["8"]),
    "secret": lambda d: container(d).update(envFrom=[{"secretRef": "store"}]),
    "no container": lambda d: templates(d)[-1]["spec"].pop("containers"),
    "spec": lambda d: d["spec"].update(backofLimit=3),
}
RAY_SLIPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "group": lambda d: renamed(worker(d), "maxReplicas", "maxReplica"),
    "count": lambda d: worker(d).update(replicas="4"),
    "start": lambda d: worker(d).update(rayStartParams={"num-cpus": 0}),
    "auth": lambda d: ray_cluster(d).update(authOptions={"mode": "tokens"}),
    "head": lambda d: renamed(ray_cluster(d), "headGroupSpec", "headGroup"),
}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_slip_of_the_pen_is_noticed(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    for slip in (SLIPS | (RAY_SLIPS if document["kind"] != "CronJob" else {})).values():
        wrong = copy.deepcopy(document)
        slip(wrong)
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


def test_rays_launcher_takes_our_file() -> None:
    launcher = yaml.safe_load((CLUSTER / "ray_up.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(launcher)))
    wrong = launcher | {"start_commands": ["ray stop"]}
    with pytest.raises(jsonschema.ValidationError, match="start_commands"):
        validate_config(prepare_config(wrong))


def test_rays_launcher_brings_the_token_to_every_node() -> None:
    launcher = prepare_config(yaml.safe_load((CLUSTER / "ray_up.yaml").read_text()))
    docker = launcher["docker"]
    started = docker_start_cmds(
        "me", docker["image"], launcher["file_mounts"], docker["container_name"],
        docker["run_options"], launcher["cluster_name"], "/root", "docker",
    )  # fmt: skip
    there = str(TOKEN_FILE.parent).replace("~", "/home/ray")
    assert launcher["file_mounts"] == {there: str(TOKEN_FILE.parent)} and f":{there} " in started
    assert "useradd --create-home --uid 1000 ray" in (CLUSTER / "Dockerfile").read_text()
    # a variable without a value is that of the ssh session on the node, where nobody has set it
    assert not re.search(r"(-e|--env) \w+( |$)", started)


RECIPES = CLUSTER.parent / "recipes"


@pytest.mark.parametrize("command", [c for c in commands() if "pretrain s3:" in c])
def test_what_a_manifest_pretrains_is_not_refused(command: str) -> None:
    parsed = parse(shlex.split(command)[1:])
    recipe = RECIPES / Path(parsed.recipe).name
    config = load_config(str(recipe), parsed.overrides, parsed.phase)
    check_ranks(config)
    sizes = world_sizes(config)
    assert sizes[0] == config.train.processes and sizes[-1] == config.supervise.min_processes
    for size in sizes:
        check_engine(config.train, size, cuda=True)
        lane_count(config.data, config.train.global_batch, size)


def test_clusters_run_our_ray_and_want_a_token() -> None:
    assert len(ray_clusters()) == 3
    for cluster in ray_clusters():
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == ray.__version__
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    launcher = yaml.safe_load((CLUSTER / "ray_up.yaml").read_text())
    for start in (*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]):
        assert start == "ray stop" or start.startswith("RAY_AUTH_MODE=token ray start")
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][1]


def test_pods_say_what_they_need() -> None:
    built = set(re.findall(r"-t (\S+)", (CLUSTER / "Dockerfile").read_text()))
    for pod in pods():
        for container in pod["containers"]:
            assert container["image"] in built
            needs, most = container["resources"]["requests"], container["resources"]["limits"]
            assert needs["memory"] == most["memory"] and int(needs["cpu"]) > 0
            assert needs.get("nvidia.com/gpu") == most.get("nvidia.com/gpu")
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounted == {volume["name"] for volume in pod.get("volumes", ())}


def test_a_pod_for_labelling_holds_an_actor_of_every_labelling_recipe() -> None:
    job = yaml.safe_load((CLUSTER / "kubernetes" / "label_on_spot.yaml").read_text())
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    has = container["resources"]["requests"]
    node = (float(has["cpu"]), float(has["nvidia.com/gpu"]))
    recipes = sorted((CLUSTER.parent / "recipes").glob("label_*.yaml"))
    assert len(recipes) > 2
    for recipe in recipes:
        label = load_config(str(recipe), []).label
        assert room_on([node], label.gpus_per_actor, label.cpus_per_actor) == 1, recipe


@pytest.mark.parametrize("path", [*MANIFESTS, *PAGES], ids=lambda path: path.stem)
def test_every_secret_that_pods_read_is_made_where_they_are_shown(path: Path) -> None:
    named = {source["secretRef"]["name"] for pod in pods() for container in pod["containers"]
             for source in container["envFrom"]}  # fmt: skip
    text = path.read_text()
    made = set(re.findall(r"kubectl create secret generic (\S+) --from-env-file=store.env", text))
    assert made == (named if "kubectl apply" in text else set())


def test_the_image_is_built_from_what_is_there() -> None:
    root = CLUSTER.parent.parent
    copied = re.findall(r"^COPY (\S+) ", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert all((root / path).exists() for path in copied)
    kept = [line[1:] for line in (root / ".dockerignore").read_text().splitlines()
            if line.startswith("!")]  # fmt: skip
    assert all((root / path).exists() for path in kept) and "requirements.lock" in kept


def test_the_hostfile_is_one_that_deepspeed_reads() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(CLUSTER / "hostfile")) == {"node-1": 8, "node-2": 8}
