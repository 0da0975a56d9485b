"""glipv2 schedule RECIPE: watch runs, and score each checkpoint once per suite, the newest first.

Nothing but files says what is done: results, attempts (`schedule_attempts`) and reports
(`schedule_alerts`) under RUN/eval. So the command may be killed and started again at any time, and
any number of schedulers may watch one run.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple, NoReturn

from glipv2.jobs.evaluate_suites import (
    Job,
    Suite,
    check_head,
    evaluate_suite,
    kept,
    open_suite,
    read_result,
)
from glipv2.jobs.schedule_alerts import falls, keep_best, report, settle, webhook_url
from glipv2.jobs.schedule_attempts import Attempts, Standing
from glipv2.jobs.stages import add_recipe_arguments, recipe_config, use_cluster
from glipv2.model.folders import COMMIT, STEP_NAME, step_name, step_url
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import committed_steps, model_digest
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.cron import Cron
from glipv2.pipeline.errors import ConfigError, DataError, PreemptedError, StoreError
from glipv2.pipeline.progress import say
from glipv2.pipeline.ray_cluster import is_private, start_ray

log = logging.getLogger(__name__)
SLOT = "%Y-%m-%dT%H%M"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, cluster=True)
    parser.add_argument(
        "--once", action="store_true", help="score what waits now, whatever schedule.cron says"
    )
    parser.add_argument("--status", action="store_true", help="only say what stands where")


def run(arguments: argparse.Namespace) -> int:
    use_cluster(arguments.address)
    scheduler = Scheduler(recipe_config(arguments), once=arguments.once or arguments.status)
    if arguments.status:
        from glipv2.jobs.schedule_status import status_table

        print(status_table(scheduler))  # noqa: T201 - the answer of the command
        return 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        return scheduler.serve()
    except SystemExit as error:  # Ray's own way of being told to stop, and ours
        raise PreemptedError("told to stop; run again, it goes on") from error


def _stop(number: int, _frame: Any) -> NoReturn:
    sys.exit(number)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A step of a run that a suite is due on."""

    run: str
    step: int
    suite: Suite
    job: Job
    problem: str
    """What is wrong with the step's commit record, or with the model for the suite, if anything."""
    lasting: bool = False
    """The problem is one of all steps, and told once."""

    @property
    def name(self) -> str:
        return f"{self.suite.name}.{step_name(self.step)}"

    @property
    def folder(self) -> str:
        """Of the attempts."""
        own = f"{self.suite.name}-{self.job.key}"
        return storage.join(self.run, "eval", "schedule", step_name(self.step), own)


class Figure(NamedTuple):
    """What is remembered of a result."""

    key: str
    protocol: str
    metrics: dict[str, float]


class Scheduler:
    """What one process knows; all of it is read from files, and nothing is lost with it."""

    def __init__(self, config: RunConfig, once: bool = False) -> None:
        """ConfigError or DataError if suites, sets or metrics are not there."""
        self.config, self.settings, self.once = config, config.schedule, once
        names = self.settings.suites or tuple(config.eval.suites)
        if not names:
            raise ConfigError("nothing to score: set eval.suites")
        self.suites = [open_suite(config, name) for name in names]
        phases = tuple(config.run_url(phase) for phase in config.phases)
        given = tuple(url.rstrip("/") for url in self.settings.runs)
        self.runs = given or phases or (config.run_dir,)
        self.cron = None if once or not self.settings.cron else Cron(self.settings.cron)
        self.since = datetime.now(timezone.utc)
        self.attempts = Attempts(self.settings)
        self.metrics = self.settings.best or tuple(f"{s.name}.{s.first}" for s in self.suites)
        for metric in self.metrics:
            if metric.partition(".")[0] not in names or not metric.partition(".")[2]:
                raise ConfigError(
                    f"schedule.best: {metric!r} is no SUITE.METRIC of {', '.join(names)}"
                )
        self.figures: dict[str, Figure] = {}
        """Of every result file."""
        self.unsettled = set(self.runs)
        """Runs with results, perhaps others', whose best steps and reports may lag behind."""
        self.headless: dict[str, str] = {}
        """Of what was looked at, what the model lacks, or nothing."""
        self.failures: set[tuple[str, str]] = set()
        self.joined = False
        """A cluster that was not started by this process."""

    def serve(self) -> int:
        """Score what is due until told to stop, or until there is nothing left with `once`.

        Exit code: 1 if anything was given up, 3 if something failed and will be tried again.
        ConfigError if the webhook is none.
        """
        webhook_url(self.settings.webhook)
        for url in self.runs if self.once else ():
            if not committed_steps(url):
                log.warning("%s has no checkpoint: nothing to score there", url)
        if not self.once:
            say(f"watching {', '.join(self.runs)} for {', '.join(s.name for s in self.suites)}")
        while True:
            try:
                worked, standings = self._round()
            except (StoreError, ConfigError) as error:  # the latter of a cluster that is away
                if self.once or (isinstance(error, ConfigError) and not self.joined):
                    raise
                log.warning("%s; trying again in %g s", error, self.settings.poll_seconds)
                worked, standings = False, ["waiting"]
            if worked:
                continue
            if self.once or self._finished(standings):
                if self.failures:
                    return 1
                return 3 if "waiting" in standings else 0
            _leave_ray()
            time.sleep(self.settings.poll_seconds)

    def _round(self) -> tuple[bool, list[str]]:
        """Deal with the first item that is ready; whether there was one, and where all stand."""
        standings: list[str] = []
        for item in self.due():
            stands = self.standing(item)
            standings.append(stands.state)
            if stands.state == "ready" and self._deal_with(item, stands):
                return True, standings
            if stands.state == "failed":
                self._given_up(item, stands.told)
        for url in list(self.unsettled):
            self._settle(url)
        return False, standings

    def due(self) -> Iterator[Item]:
        """What has no result yet: the newest step of every run, then the ones before."""
        steps = {url: self._due_steps(url) for url in self.runs}
        for rank in range(max(map(len, steps.values()), default=0)):
            for url, own in steps.items():
                if rank < len(own):
                    yield from self._items(url, own[rank])

    def _items(self, url: str, step: int) -> Iterator[Item]:
        checkpoint, folder = step_url(url, step), storage.join(url, "eval")
        model, problem = "", ""
        try:
            model = model_digest(checkpoint)
        except DataError as error:
            if not storage.exists(storage.join(checkpoint, COMMIT)):
                return  # pruned since it was listed
            problem = str(error)
        for suite in self.suites:
            job = Job(
                config=self.config, suite=suite, checkpoint=checkpoint, model=model, folder=folder
            )
            if problem:
                yield Item(run=url, step=step, suite=suite, job=job, problem=problem)
            elif not self._done(job):
                own = self._no_head(job)
                yield Item(run=url, step=step, suite=suite, job=job, problem=own, lasting=bool(own))

    def _no_head(self, job: Job) -> str:
        """Why the model can't be asked what the suite asks; looked up once."""
        if job.key not in self.headless:
            try:
                check_head(job)
            except ConfigError as error:
                self.headless[job.key] = str(error)
            except (DataError, ValueError):
                return ""  # pruned or damaged, as the attempt will find
            else:
                self.headless[job.key] = ""
        return self.headless[job.key]

    def _due_steps(self, url: str) -> list[int]:
        """Newest first."""
        wanted = self.settings.every_steps or 1
        steps = [step for step in reversed(committed_steps(url)) if step % wanted == 0]
        return steps if self.cron is None else self._of_slots(url, steps)

    def _of_slots(self, url: str, steps: list[int]) -> list[int]:
        """The steps that were newest when a time of the cron line came.

        The last time that has come takes what is newest now, so that times that nobody was there
        for are made up for once.
        """
        assert self.cron is not None
        folder = storage.join(url, "eval", "schedule", "cron")
        known = [name for name in storage.list_names(folder) if name.endswith(".json")]
        slot = self.cron.before(datetime.now(timezone.utc))
        if steps and slot is not None and (known or slot >= self.since):
            name = f"{slot.strftime(SLOT)}.json"
            if name not in known:
                text = storage.canonical_json({"step": steps[0]})
                storage.create_once(storage.join(folder, name), text)
                known = [*known, name]
        taken = {storage.read_json(storage.join(folder, name))["step"] for name in known}
        return [step for step in steps if step in taken]

    def standing(self, item: Item) -> Standing:
        if item.problem:
            return Standing(state="failed", told=item.problem)
        return self.attempts.standing(item.folder)

    def _deal_with(self, item: Item, stands: Standing) -> bool:
        """Attempt to score; False if somebody else was faster."""
        if not is_private():
            start_ray(self.config.eval.num_actors)  # a cluster that is away is not the job's fault
            self.joined = True
        try:
            with self.attempts.attempt(item.folder, stands.last) as mine:
                if mine and item.job.result() is None:
                    with kept(item.job.checkpoint):
                        result = evaluate_suite(item.job)
                        self._tell(item, result)
                        self._settle(item.run)
                return mine
        except StoreError:
            raise
        except Exception as error:
            gone = item.step not in committed_steps(item.run)
            why = "the checkpoint was removed" if gone else str(error)
            log.warning("%s: %s came to nothing: %s", item.run, item.name, why)
            _leave_ray(broken=True)
            return True

    def _tell(self, item: Item, result: dict[str, Any]) -> None:
        first, seconds = result["first"], result["seconds"]
        value = result["metrics"].get(first)
        shown = "undefined" if value is None else f"{value:.4f}"
        spent = f"{seconds['predict'] + seconds['score']:.0f} s"
        say(f"{item.run}: step {item.step}, {item.suite.name}: {first} {shown} ({spent} of work)")
        for metric in self.metrics:
            name, _, key = metric.partition(".")
            if name == item.suite.name and key not in result["metrics"]:
                known = ", ".join(result["metrics"])
                log.warning("%s is undefined here; %s has: %s", metric, name, known)

    def _given_up(self, item: Item, why: str) -> None:
        which = "steps" if item.lasting else f"step {item.step}"
        text = f"{which} could not be scored on {item.suite.name}: {why}"
        content = {"event": "failed", "suite": item.suite.name, "step": item.step, "text": text}
        self.failures.add((item.run, item.name))
        about = item.suite.name if item.lasting else f"{item.name}.{item.job.key}"
        if report(item.run, f"failed.{about}", content, self.settings.webhook):
            self.unsettled.add(item.run)

    def values(self, url: str, metric: str) -> dict[int, float]:
        """Step -> value of every result that is comparable, also of steps that are pruned."""
        name, _, key = metric.partition(".")
        protocol = next(suite.digest for suite in self.suites if suite.name == name)
        folder, found = storage.join(url, "eval"), {}
        for step in storage.list_names(folder):
            if match := STEP_NAME.fullmatch(step):
                own = self._figure(storage.join(folder, step, f"{name}.json"))
                if own and own.protocol == protocol and key in own.metrics:
                    found[int(match[1])] = own.metrics[key]
        return found

    def _done(self, job: Job) -> bool:
        found = self._figure(job.url)
        if found and found.key != job.key:  # of another model, or other settings: perhaps no longer
            del self.figures[job.url]
            found = self._figure(job.url)
        return found is not None and found.key == job.key

    def _figure(self, url: str) -> Figure | None:
        """A result that was read once is not read again."""
        if url not in self.figures:
            result = read_result(url)
            if result is None:
                return None
            self.figures[url] = Figure(result["key"], result["protocol"], result["metrics"])
            self.unsettled.add(url.rsplit("/", 3)[0])
        return self.figures[url]

    def _settle(self, url: str) -> None:
        """Bring best steps and reports up to the results."""
        there = set(committed_steps(url))
        for metric in self.metrics:
            values = self.values(url, metric)
            if (best := keep_best(url, metric, values, there)) is not None:
                say(f"{url}: {metric} is best at step {best}: {values[best]:.4f}")
            for content in falls(metric, values, self.settings.alert_drop):
                name = f"fall.{metric}.{step_name(content['step'])}"
                report(url, name, content, self.settings.webhook)
        if settle(url, self.settings.webhook):
            self.unsettled.discard(url)

    def _finished(self, standings: list[str]) -> bool:
        until = self.settings.until_step
        newest = (max(committed_steps(url), default=0) for url in self.runs)
        return bool(until) and set(standings) <= {"failed"} and min(newest) >= until


def _leave_ray(broken: bool = False) -> None:
    """Give back what a cluster of our own holds while nothing is to be done; or one that is
    perhaps broken."""
    if "ray" not in sys.modules:
        return
    import ray

    if ray.is_initialized() and (broken or is_private()):
        ray.shutdown()
