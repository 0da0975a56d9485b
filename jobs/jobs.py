"""glipv2 jobs list|logs|stop --address URL: what was submitted to a cluster."""

import argparse
from datetime import datetime, timezone
from typing import Any

from glipv2.jobs.ray_jobs import connect, details, exit_code, follow
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "logs", "stop"))
    parser.add_argument("job", nargs="?", help="its name, for logs and stop")
    parser.add_argument("--address", help="the cluster's dashboard, such as http://head:8265")
    parser.add_argument("--follow", action="store_true", help="logs: until the job has ended")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.action == "list") == bool(arguments.job):
        raise ConfigError("give the name of a job to logs and stop, and none to list")
    client = connect(arguments.address)
    if arguments.action == "list":
        print(table(client.list_jobs()))  # noqa: T201 - the answer of the command
        return 0
    found = details(client, arguments.job)
    if arguments.action == "stop":
        client.stop_job(arguments.job)
        say(f"{arguments.job} is told to stop: it saves what its stage saves")
        return 0
    if arguments.follow:
        return follow(client, arguments.job)
    print(client.get_job_logs(arguments.job), end="")  # noqa: T201 - the answer of the command
    return exit_code(found) if found.status.is_terminal() else 0


def table(found: list[Any]) -> str:
    """The newest first."""
    rows = [f"{'job':40s} {'status':10s} {'began (UTC)':17s} command"]
    for job in sorted(found, key=lambda job: job.start_time or 0, reverse=True):
        began = (job.start_time or 0) / 1000
        at = f"{datetime.fromtimestamp(began, timezone.utc):%Y-%m-%d %H:%M}" if began else "-"
        name = job.submission_id or job.job_id
        command = (job.entrypoint or "").removeprefix("python -m glipv2.jobs.cli ")
        rows.append(f"{name:40s} {job.status.value:10s} {at:17s} {command}")
    return "\n".join(rows)
