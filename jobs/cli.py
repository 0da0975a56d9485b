"""glipv2 COMMAND ...: one subcommand per file of this folder.

Exit codes: 0 done; 1 a check failed; 2 a mistake in input or configuration, explained; 3 stopped
but can be run again with the same command; 130 interrupted.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "prepare": "turn a source (toy, voc, coco, pairs) into grounded shards",
    "view": "a page that shows samples of a shard set with boxes and coloured phrases",
    "pretrain": "shards -> checkpoints (DeepSpeed); the same command resumes",
    "label": "let a teacher ground the phrases of image-text pairs (Ray)",
    "evaluate": "score checkpoints: COCO AP, phrase-grounding recall (Ray)",
    "run": "the main job: prepare, teacher, label, student and control, evaluate, report",
    "report": "one static page of a finished main job",
    "ground": "boxes for one image and a text",
    "doctor": "versions, devices, what is missing and how to mend it",
}
CAN_BE_RUN_AGAIN = 3


def main(arguments: Sequence[str] | None = None) -> int:
    _quiet_environment()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser(words).parse_args(words)
    return _guarded(parsed)


def _quiet_environment() -> None:
    """Defaults that every stage needs before torch, ray or transformers is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _parser(words: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glipv2",
        description="GLIPv2 pretraining with caption self-training, from sources to report.",
        epilog="Start with: glipv2 run infra/recipes/quickstart.yaml   (make quickstart)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = words[0] if words else ""
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == chosen:  # the others' modules need not be imported
            importlib.import_module(f"glipv2.jobs.{name}").add_arguments(sub)
    return parser


def _guarded(parsed: argparse.Namespace) -> int:
    from glipv2.pipeline.errors import UserError
    from glipv2.pipeline.launch import RankFailedError

    module = importlib.import_module(f"glipv2.jobs.{parsed.command}")
    try:
        return int(module.run(parsed))
    except UserError as error:
        print(f"glipv2 {parsed.command}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except RankFailedError as error:
        print(f"glipv2 {parsed.command}: {error}", file=sys.stderr)  # noqa: T201
        return CAN_BE_RUN_AGAIN
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 130


if __name__ == "__main__":
    sys.exit(main())
