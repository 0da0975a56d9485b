"""glipv2 COMMAND ...: one subcommand per file of this folder.

Exit codes: 0 done; 1 a check failed; 2 a mistake in input or configuration, explained; 3 stopped
but can be run again with the same command; 74 the same, once there is room on the disk; 75 the
same, told to stop and all steps saved; 130 interrupted; 143 told to stop (SIGTERM); 141 nobody
reads what it prints any more.
"""

import argparse
import difflib
import importlib
import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

COMMANDS = {
    "prepare": "turn a source (COCO, YOLO, VQAv2, web pairs, ...) into grounded shards",
    "view": "a page that shows samples of a shard set: boxes, masks, coloured phrases, figures",
    "stats": "what a whole shard set holds: boxes, phrases, names, sizes, scores",
    "check": "verify a whole shard set: files, checksums, records, spans, boxes, masks, keys",
    "pretrain": "shards -> checkpoints (DeepSpeed); the same command resumes",
    "label": "let a teacher ground the phrases of image-text pairs (Ray)",
    "evaluate": "score a checkpoint on suites: COCO, LVIS, ODinW, Flickr30k, VQA, ... (Ray)",
    "schedule": "watch runs and score each new checkpoint once, the newest first (Ray)",
    "adapt": "tune a model to detection sets with few examples or all, and compare (Ray)",
    "submit": "a stage as a job of a Ray cluster that has none of our code",
    "jobs": "list, show and stop what was submitted",
    "run": "the main job: prepare, teacher, label, student and control, evaluate, report",
    "report": "one static page of a run, or of several side by side",
    "ground": "boxes for one image and a text",
    "demo": "a page in the browser: a picture and a text -> boxes, masks, coloured phrases",
    "export": "the model of a run's step as a folder of its own",
    "convert": "weights of GLIP, timm and transformers -> a model folder, and back to GLIP",
    "doctor": "versions, devices, what is missing and how to mend it",
}
EXAMPLES = {
    "prepare": """
  glipv2 prepare coco --annotations instances.json --images images/ --out data/mine
  glipv2 prepare voc --annotations Annotations/ --images JPEGImages/ --out data/mine
  glipv2 prepare pairs --root scraped/ --out s3://bucket/pairs
  glipv2 prepare answers data/vqa_train data/vqa_val --out data/answers.txt
  glipv2 prepare recipe infra/recipes/quickstart.yaml
Cut off, the same command goes on; what was dropped and why ends up in OUT/dataset.json.""",
    "view": """
  glipv2 view data/mine --out mine.html --count 24
  glipv2 view s3://bucket/labelled --out page.html --keys cat-000017 dog-000003
  glipv2 view s3://bucket/labelled --out doubtful.html --source web --max-score 0.6
  glipv2 view data/web_2 --out rounds.html --compare data/web
  glipv2 view data/web --out check.html --csv check.csv --count 200
With --csv the page shows boxes by lot, numbered; fill in the file's last column, and
`glipv2 label audit check.csv` tells how many are right.
A large set is read in part, drawn by the seed; `glipv2 stats` reads all of it.""",
    "stats": """
  glipv2 stats data/mine
  glipv2 stats s3://bucket/labelled --workers 16 --json labelled.json""",
    "check": """
  glipv2 check data/mine
  glipv2 check s3://bucket/labelled --decode --workers 16 --json problems.json
Each problem is a line: file, sample, byte, reason -> what to do. Exit code 1 if there is any.""",
    "pretrain": """
  glipv2 pretrain infra/recipes/quickstart.yaml --phase teacher
  glipv2 pretrain my.yaml train.steps=5000 data.mixture.mine=1
  glipv2 pretrain my.yaml train.processes=32 supervise.gpus_per_process=1 --address auto
  torchrun --nproc-per-node 8 -m glipv2.jobs.cli pretrain my.yaml train.precision=bf16
A run goes on from its newest committed checkpoint, on any number of ranks.""",
    "label": """
  glipv2 label infra/recipes/quickstart.yaml
  glipv2 label my.yaml label.teacher=runs/mine 'label.num_actors=[4,16]' --address auto
  glipv2 label audit check.csv
Shards that are committed are never redone; other settings need another output set, or --force.
`audit FILE` gives the precision of the labels from a file of `glipv2 view --csv` whose last column
somebody filled in: 1, yes or y for right, 0, no or n for wrong, nothing for not checked.""",
    "export": """
  glipv2 export runs/mine --step 50000 --out models/mine
  glipv2 export s3://bucket/run --raw --out models/mine-raw
Every step's folder is a model already; this copies it out, or takes the raw weights of a run that
averages them.""",
    "evaluate": """
  glipv2 evaluate infra/recipes/quickstart.yaml
  glipv2 evaluate infra/recipes/quickstart.yaml --phase student
  glipv2 evaluate my.yaml --checkpoint runs/mine/checkpoints/step-001000
  glipv2 evaluate infra/recipes/evaluate.yaml --checkpoint models/glip-t --suite coco --json -
  glipv2 evaluate my.yaml --checkpoint runs/mine/checkpoints/step-001000 --score-only
Cut off, the same command goes on; what was scored is not scored again. Results of eval.suites are
in RUN/eval/step-001000/SUITE.json; those of a recipe with phases in RUN/summary.json, too.""",
    "schedule": """
  glipv2 schedule my.yaml
  glipv2 schedule my.yaml 'schedule.runs=[s3://bucket/run-1,s3://bucket/run-2]' --address auto
  glipv2 schedule my.yaml --once
  glipv2 schedule my.yaml --status
It may be killed and started again at any time, and several may watch one run. Exit code of --once:
1 if a checkpoint was given up, 3 if one failed and will be tried again.""",
    "adapt": """
  glipv2 adapt infra/recipes/adapt.yaml train.init=models/glip-t model.glip_compatible=true
  glipv2 adapt my.yaml 'adapt.shots=[1,10]' 'adapt.seeds=[3]' --set dice
  glipv2 adapt my.yaml adapt.num_tasks=8 adapt.gpus_per_task=1 --address auto
Cut off, the same command goes on. RUN/adapt.json has the table, a run folder each cell's model.
Exit code 1 if a cell failed; the others are done then.""",
    "submit": """
  glipv2 submit label web.yaml --address http://head:8265
  glipv2 submit pretrain my.yaml --phase teacher train.steps=5000 --address http://head:8265
  glipv2 submit schedule my.yaml --address http://head:8265 --no-wait
  glipv2 submit evaluate my.yaml --dry-run
The package and the recipe travel with the job. run_dir and all that the recipe names must be URLs,
or absolute paths of a file system that all nodes share. The log is shown until the job has ended,
and its exit code is the command's own; ctrl-C leaves the job running.""",
    "jobs": """
  glipv2 jobs list --address http://head:8265
  glipv2 jobs logs label-web-1f2e3d --address http://head:8265 --follow
  glipv2 jobs stop label-web-1f2e3d --address http://head:8265
RAY_API_SERVER_ADDRESS stands for --address, RAY_AUTH_TOKEN is the cluster's token.""",
    "run": """
  glipv2 run infra/recipes/quickstart.yaml
  glipv2 run infra/recipes/quickstart.yaml run_dir=runs/seed-2 seed=2""",
    "report": """
  glipv2 report runs/quickstart
  glipv2 report runs/tuned s3://bucket/run-2 --out compared.html""",
    "ground": """
  glipv2 ground --checkpoint runs/quickstart/student --image photo.jpg \\
      --text "a red square. a blue circle."
  glipv2 ground --checkpoint runs/quickstart/student --image cells.jpg --categories RBC,WBC""",
    "demo": """
  glipv2 demo --checkpoint runs/quickstart/student
  glipv2 demo --checkpoint models/glip-t --port 8000
Needs gradio: pip install 'glipv2[demo]'. Others reach the page only where --host lets them.""",
    "convert": """
  glipv2 convert --from glip glip_tiny_model_o365_goldg.pth --vocab vocab.txt --out models/glip-t
  glipv2 convert --from timm-swin swin_tiny.safetensors --from bert bert-base-uncased/ \\
      --preset T --out models/start
  glipv2 convert --to glip models/glip-t --out glip.pth
The folder can be a teacher, be evaluated, or start a training (train.init). A tensor that is
missing, unexpected or of another shape is an error that lists it.""",
    "doctor": """
  glipv2 doctor""",
}
CAN_BE_RUN_AGAIN = 3
PREEMPTED = 75
INTERRUPTED, TOLD_TO_STOP = 130, 143
"""What a shell makes of SIGINT and SIGTERM."""
READER_GONE = 141
"""What a shell makes of SIGPIPE."""
STDOUT = 1
_told_to_stop = threading.Event()


def main(arguments: Sequence[str] | None = None) -> int:
    _quiet_environment()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _stoppable():
            code = _guarded(parse(words))
        _flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what is still to be written
        return READER_GONE
    return code


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a command like ctrl-C, unless the command has a better idea (training has)."""

    _told_to_stop.clear()

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second one does not wait
        _told_to_stop.set()  # Ray makes another of what is raised
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)


def _flush() -> None:
    """Here, as nobody can catch what the interpreter's own flush raises when it ends."""
    print(end="", flush=True)  # noqa: T201 - there may be no sys.stdout


def _reader_is_gone() -> bool:
    """Whether stdout is what broke, as in `glipv2 ... | head`; connections break as well."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # which asks for nothing but errors
    return bool(poll.poll(0))


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command; overrides may stand before and after options."""
    parser = _parser(words)
    parsed, rest = parser.parse_known_args(words)
    if hasattr(parsed, "passed_on"):  # for another command, which will look at them
        parsed.passed_on = [*parsed.passed_on, *rest]
        return parsed
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _quiet_environment() -> None:
    """Defaults that every stage needs before torch, ray or transformers is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class _Parser(argparse.ArgumentParser):
    """Names the nearest of the choices when none was hit; prints while a broken pipe is caught."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            choices = [choice.strip("'") for choice in found[2].split(", ")]
            near = difflib.get_close_matches(found[1].lower(), choices, n=1, cutoff=0.5)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _flush()  # of --help
        super().exit(status, message)


def _parser(words: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glipv2",
        description="GLIPv2 pretraining with caption self-training, from sources to report.",
        epilog="Start with: glipv2 run infra/recipes/quickstart.yaml   (make quickstart)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = words[0] if words else ""
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:  # the others' modules need not be imported
            module = "audit" if words[:2] == ["label", "audit"] else name
            importlib.import_module(f"glipv2.jobs.{module}").add_arguments(sub)
    return parser


def _guarded(parsed: argparse.Namespace) -> int:
    from glipv2.pipeline.errors import (
        DISK_FULL,
        MachinesLostError,
        PreemptedError,
        RankFailedError,
        StoreError,
        UserError,
        is_disk_full,
    )

    module = importlib.import_module(f"glipv2.jobs.{parsed.command}")
    try:
        return int(module.run(parsed))
    except (StoreError, RankFailedError, MachinesLostError) as error:
        print(f"glipv2 {parsed.command}: {error}", file=sys.stderr)  # noqa: T201
        return CAN_BE_RUN_AGAIN
    except PreemptedError as error:
        print(f"glipv2 {parsed.command}: {error}", file=sys.stderr)  # noqa: T201
        return PREEMPTED
    except UserError as error:
        print(f"glipv2 {parsed.command}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(  # noqa: T201
            f"glipv2 {parsed.command}: {error}; make room, then the same command goes on from here",
            file=sys.stderr,
        )
        return DISK_FULL
    except KeyboardInterrupt:
        told = _told_to_stop.is_set()
        said = "told to stop" if told else "interrupted"
        print(f"{said}; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return TOLD_TO_STOP if told else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
