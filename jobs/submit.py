"""glipv2 submit STAGE RECIPE --address URL: a stage as a job of a Ray cluster without our code.

The package (some 1.4 MB) and the recipe travel with the job; the nodes need what requirements.lock
lists, nothing else. Data, runs and models must be where every node reaches them.
"""

import argparse
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from glipv2.jobs.ray_jobs import STOPPED, connect, follow
from glipv2.pipeline import storage
from glipv2.pipeline.answers import read_answers
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import (
    as_tree,
    load_config,
    override_tree,
    read_recipe,
)
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.progress import say

STAGES = ("label", "pretrain", "evaluate", "schedule", "adapt", "run")
PACKAGES = ("model", "pipeline", "data_prep", "eval", "jobs")
SHIPPED = ("*.py", "*.yaml", "*.txt", "*.html", "*.css")
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL|WEBHOOK|SLACK", re.IGNORECASE)
PHASE = r"(phases\.[^.]+\.)?"
PLACES = re.compile(
    rf"{PHASE}(data\.(root|vocabulary)|eval\.suites\.[\w-]+\.annotations|schedule\.runs"
    r"|prepare\.[\w-]+\.(annotations|images|root|list))(\[\])?"
)
"""Settings of which a name without a folder is a place, too: that where a command is started."""
ANSWERS = re.compile(rf"{PHASE}model\.answers")
"""A list, or the file of it; the loaded configuration holds the list."""
NO_PLACES = re.compile(
    rf"{PHASE}(model\.answers|label\.phrases\.stop|eval\.suites\.[\w-]+\.prompts(\..*)?"
    r"|schedule\.(cron|webhook)|log\.wandb|data\.cache|prepare\.[\w-]+\.(split|caption_field))"
    r"(\[\])?"
)
"""Settings that may have a slash in them and name nothing that must be there: texts, times, and a
folder that each node makes for itself. Elsewhere a slash makes a place of a text."""
HUB = re.compile(r"hf:\w[\w.-]*(/[\w.-]+)?")
"""A teacher that is looked for in a folder of that name first."""
MODELS = re.compile(rf"{PHASE}(train\.init|label\.teacher)")
"""Of which a name without a folder is a phase of the run, and no folder where a command starts."""
WEBHOOK = re.compile(rf"{PHASE}schedule\.webhook")
OPTIONS = ("checkpoint", "out", "json")
"""Of stages, which name files or folders as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", help="YAML file, see infra/recipes/")
    passed_on = "overrides and options of the stage, such as --phase teacher"
    parser.add_argument("passed_on", nargs="*", metavar="ARGUMENT", help=passed_on)
    parser.add_argument("--address", help="the cluster's dashboard, such as http://head:8265")
    parser.add_argument("--name", default="", help="of the job; without it one is made up")
    parser.add_argument("--env", action="append", default=[], metavar="NAME",
                        help="pass on this environment variable; repeatable")  # fmt: skip
    parser.add_argument("--no-wait", action="store_true", help="submit, and don't show the log")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be submitted")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is sent to the cluster."""

    name: str
    command: str
    package: Path
    recipe: Path
    """Folder that the job starts in, with the recipe."""
    environment: dict[str, str]

    @property
    def bytes(self) -> int:
        files = (*self.package.rglob("*"), *self.recipe.rglob("*"))
        return sum(file.stat().st_size for file in files if file.is_file())


def run(arguments: argparse.Namespace) -> int:
    with prepared(arguments) as job:
        said = f"job {job.name}: {job.command}"
        if arguments.dry_run:
            print(f"{said}\nfiles: {job.bytes / 1e6:.1f} MB")  # noqa: T201 - the answer
            print((job.recipe / _file(arguments.recipe)).read_text())  # noqa: T201
            return 0
        client = connect(arguments.address)
        _submit(client, job, arguments.stage)
    say(f"submitted {said}")
    if arguments.no_wait:
        print(job.name)  # noqa: T201 - for scripts
        return 0
    try:
        code = follow(client, job.name)
    except KeyboardInterrupt:
        say(f"the job goes on: glipv2 jobs logs {job.name} --follow; glipv2 jobs stop {job.name}")
        return STOPPED
    say(f"job {job.name} ended with exit code {code}")
    return code


def _submit(client: Any, job: Job, stage: str) -> None:
    try:
        client.submit_job(
            entrypoint=job.command,
            submission_id=job.name,
            runtime_env={
                "working_dir": str(job.recipe),
                "py_modules": [str(job.package)],
                "env_vars": job.environment,
            },
            metadata={"glipv2": stage},
        )
    except RuntimeError as error:
        raise ConfigError(f"the cluster refused the job: {error}") from error


@contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Job]:
    """The job in a temporary folder; ConfigError for what could not work on another machine."""
    words = [arguments.stage, arguments.recipe, *arguments.passed_on]
    config = _checked(words)
    environment = _environment(arguments.env, config.schedule.webhook)
    with TemporaryDirectory(prefix="glipv2-job-") as folder:
        recipe, package = Path(folder, "recipe"), Path(folder, "glipv2")
        recipe.mkdir()
        name = _file(arguments.recipe)
        whole = _with_answers(read_recipe(arguments.recipe))
        (recipe / name).write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
        copy_package(package)
        command = [arguments.stage, name, *arguments.passed_on, "--address", "auto"]
        yield Job(
            name=arguments.name or made_up_name(arguments.stage, config.run_dir),
            command=shlex.join(["python", "-m", "glipv2.jobs.cli", *command]),
            package=package,
            recipe=recipe,
            environment=environment,
        )


def _checked(words: list[str]) -> RunConfig:
    """The configuration, after finding every mistake that can be found here."""
    from glipv2.jobs.cli import parse

    parsed = parse(words)
    if parsed.address:
        raise ConfigError("give --address once; the job runs on that cluster")
    config = load_config(parsed.recipe, parsed.overrides, getattr(parsed, "phase", None))
    if not is_shared(config.run_dir):
        raise ConfigError(
            f"run_dir {config.run_dir!r} would lie on one machine of the cluster and be lost: give "
            "a URL such as s3://bucket/run, or the absolute path of a folder that all nodes share"
        )
    whole = load_config(parsed.recipe, parsed.overrides)
    for suite in getattr(parsed, "suite", None) or ():
        whole.eval.suite(suite)  # of the whole run, whatever the phase
    given = [pair for override in parsed.overrides for pair in _texts(override_tree(override))]
    _refuse_webhooks([*_texts(read_recipe(parsed.recipe)), *given])
    local = _only_here(parsed, config, whole, given)
    if local:
        raise ConfigError(
            f"the job would name files of this machine: {', '.join(sorted(local))}; copy them to "
            "where the cluster's nodes reach them, and name them by URL or absolute path"
        )
    return config


def _only_here(
    parsed: argparse.Namespace, config: RunConfig, whole: RunConfig, given: list[tuple[str, str]]
) -> set[str]:
    """KEY=VALUE of files of this machine that the stage would read or write.

    `given` is what overrides say, `whole` the configuration without a phase.
    """
    tree = as_tree(config)
    if parsed.command != "run":  # which alone makes the sets
        del tree["prepare"]
    found = [own for own in _texts(tree) if _is_here_only(*own)]
    models = [own for own in _texts(as_tree(whole)) if MODELS.fullmatch(own[0])]
    names = {"", *whole.phases}
    found += [own for own in models if own[1] not in names and _is_name_of_folder(own[1])]
    options = [(f"--{name}", str(getattr(parsed, name, None) or "-")) for name in OPTIONS]
    files = [*options, *(own for own in given if ANSWERS.fullmatch(own[0]))]
    found += [own for own in files if own[1] != "-" and not is_shared(own[1])]
    return {f"{key}={text}" for key, text in found}


def is_shared(url: str) -> bool:
    """An object store, or an absolute path, which may be a shared file system."""
    if storage.is_local(url):
        return Path(url.removeprefix("file://")).is_absolute()
    return not url.startswith("memory:")


def _is_here_only(key: str, text: str) -> bool:
    """Whether a setting names a place by a path that other machines look for elsewhere."""
    if PLACES.fullmatch(key):
        return text != "" and not is_shared(text)
    path = text.removeprefix("hf:").removeprefix("spacy:")
    if HUB.fullmatch(text):
        return Path(path).is_dir()
    relative = "/" in path and "://" not in path and not Path(path).is_absolute()
    return relative and not NO_PLACES.fullmatch(key)


def _is_name_of_folder(text: str) -> bool:
    return "/" not in text and Path(text).is_dir()


def _with_answers(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its list of answers, instead of the name of a file of this machine."""
    for section in (tree, *(tree.get("phases") or {}).values()):
        model = (section or {}).get("model") or {}
        if isinstance(model.get("answers"), str) and not is_shared(model["answers"]):
            model["answers"] = list(read_answers(model["answers"]))
    return tree


def _refuse_webhooks(texts: Iterable[tuple[str, str]]) -> None:
    """ConfigError for one in the recipe or the command, which stand in the job's record."""
    for key, text in texts:
        if WEBHOOK.fullmatch(key) and text and not text.startswith("$"):
            raise ConfigError(
                f"{key}: a webhook's URL is a secret, and all who see a job see its recipe and "
                "command; put it into the environment of the nodes (a Secret of Kubernetes, or "
                f"what Ray is started in), and give its name here: {key}=$SLACK_URL"
            )


def _texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text of a tree, keys of mappings included."""
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield path, str(key)
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, f"{path}[]")


def _environment(names: list[str], webhook: str) -> dict[str, str]:
    """Values of the named variables; none that is secret, as all who see a job see them."""
    for name in names:
        if SECRET.search(name) or webhook == f"${name}":
            raise ConfigError(
                f"--env {name}: a job's variables stand in its record for all to read; give the "
                "nodes their credentials (a role, or the environment that Ray is started in)"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable")
    return {"PYTHONUNBUFFERED": "1", **{name: os.environ[name] for name in names}}


def copy_package(to: Path) -> None:
    """Our package as this process imports it, without tests and tools."""
    for name in PACKAGES:
        spec = find_spec(f"glipv2.{name}")
        assert spec is not None and spec.submodule_search_locations
        source = Path(spec.submodule_search_locations[0])
        for pattern in SHIPPED:
            for file in source.glob(pattern):
                (to / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to / name / file.name)


def made_up_name(stage: str, run_dir: str) -> str:
    run = re.sub(r"[^A-Za-z0-9-]+", "-", run_dir.rstrip("/").rpartition("/")[2])
    return f"{stage}-{run}-{secrets.token_hex(3)}"


def _file(recipe: str) -> str:
    return recipe.rpartition("/")[2]
