"""What infra/ has for clusters: well-formed manifests, and commands that are understood."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from glipv2.jobs.cli import parse
from glipv2.jobs.pretrain import check_ranks
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.engine import check_engine
from glipv2.pipeline.loader import lane_count
from glipv2.pipeline.ray_trainer import world_sizes

CLUSTER = Path(__file__).parent.parent / "infra" / "cluster"
MANIFESTS = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
PAGES = sorted((CLUSTER.parent / "docs").glob("*.md"))
RAY_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec",
               "workerGroupSpecs"}  # fmt: skip
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
RAY_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
           "rayClusterSpec"}  # fmt: skip
"""Fields of KubeRay's ray.io/v1 (its API reference) that ours use; a slip of the pen is not one."""


def documents() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in MANIFESTS]


def ray_clusters() -> list[dict[str, Any]]:
    specs = [document["spec"] for document in documents() if document["apiVersion"] == "ray.io/v1"]
    return [spec.get("rayClusterSpec", spec) for spec in specs]


def pods() -> list[dict[str, Any]]:
    groups = [g for c in ray_clusters() for g in (c["headGroupSpec"], *c["workerGroupSpecs"])]
    crons = [d["spec"]["jobTemplate"]["spec"] for d in documents() if d["kind"] == "CronJob"]
    return [owner["template"]["spec"] for owner in (*groups, *crons)]


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
        assert set(cluster) <= RAY_CLUSTER and cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == ray.__version__
        for group in cluster["workerGroupSpecs"]:
            assert set(group) == WORKERS
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for document in documents():
        if document["kind"] == "RayJob":
            assert set(document["spec"]) == RAY_JOB
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


def test_the_image_is_built_from_what_is_there() -> None:
    root = CLUSTER.parent.parent
    copied = re.findall(r"^COPY (\S+) ", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert all((root / path).exists() for path in copied)
    kept = [line[1:] for line in (root / ".dockerignore").read_text().splitlines()
            if line.startswith("!")]  # fmt: skip
    assert all((root / path).exists() for path in kept) and "requirements.lock" in kept
