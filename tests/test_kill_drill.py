"""What the kill drill reads from a ledger, and from the stack of a rank."""

from kill_drill import keys_of, moment_of, uneven

from glipv2.data_prep.toy import toy_categories, toy_records
from glipv2.pipeline.position import Position
from glipv2.pipeline.shards import write_shard_set


def test_a_sample_that_was_never_used_or_too_often_is_found_and_lanes_may_drift() -> None:
    records = toy_records("toy_detection", 20, 1, 64)
    write_shard_set("memory://drill/set", records, toy_categories("toy_detection"), {}, 8)
    keys = {"set": keys_of("memory://drill/set")}
    assert len(keys["set"]) == 20
    # one lane is a few samples into its fourth epoch, the other not yet in its third
    position = Position(9, "", {"set": ((3, 2, 0), (1, 9, 0))})
    uses = {f"set/{key}": 1 + number % 4 for number, key in enumerate(keys["set"])}

    def found(uses: dict[str, int]) -> list[str]:
        steps = [[key for key, count in uses.items() if count > step] for step in range(9)]
        return uneven([{"samples": samples} for samples in steps], position, keys)

    assert found(uses) == []
    first, second = list(uses)[:2]
    assert found(uses | {first: 0}) == [f"{first} was used 0 times by epoch 1"]
    assert found(uses | {second: 5}) == [f"{second} was used 5 times by epoch 1"]
    assert found(uses | {"other/x": 1}) == ["other/x is of no set"]


DUMP = """Process 7: python -m glipv2.jobs.cli pretrain
Thread 9 (idle): "loader-0"
    next (pipeline/loader.py:90)
Thread 7 (idle): "MainThread"
{}    _train (pipeline/trainer.py:132)
Thread 8 (idle): "saver"
    all_reduce (torch/distributed/distributed_c10d.py:3075)
"""


def test_a_rank_is_in_what_its_main_thread_is_in() -> None:
    reduce = "    all_reduce (torch/distributed/distributed_c10d.py:3075)\n"
    forward = "    DeepSpeedEngine.forward (deepspeed/runtime/engine.py:3007)\n"
    backward = "    _engine_run_backward (torch/autograd/graph.py:869)\n"
    assert moment_of(DUMP.format("    steps (pipeline/loader.py:71)\n")) == "loading"
    assert moment_of(DUMP.format(forward)) == "forward"
    assert moment_of(DUMP.format(backward)) == "backward"
    assert moment_of(DUMP.format(reduce + forward)) == "collective"
    assert moment_of(DUMP.format("")) == ""
    assert moment_of(DUMP.replace("_train", "build").format(reduce)) == "start-up"
    assert moment_of("") == "start-up"
