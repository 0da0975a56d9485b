"""Every fault that a pretraining run may meet, and the tests that hold its promised outcome.

What befalls labelling, evaluation and object stores has its tests beside theirs.
"""

import pytest
from checklist import assert_tests_exist

KILL = "test_kill_and_resume.py"
STREAM = "test_stream.py"
EXACT = "test_stream_exact.py"
CHECKPOINT = "test_checkpoint.py"
ENGINE = "test_engine.py"
HEALTH = "test_health.py"
LAUNCH = "test_launch.py"
LAUNCHERS = "test_launchers.py"
WATCH = "test_watch.py"
SAVER = "test_saver.py"
LEASE = "test_lease.py"
LOADER = "test_loader.py"
CACHE = "test_cache.py"
HANGS = "test_hangs.py"
LABEL_PLAN = "test_label_plan.py"
BIT_FOR_BIT = (
    f"{KILL}::test_killed_stopped_and_hanging_it_ends_with_the_same_losses_and_weights_bit_for_bit"
)
DRILL = f"{LAUNCHERS}::test_the_kill_drill_finds_nothing"
FORCED = "test_forced_settings.py"
ANOTHER_RUN = f"{KILL}::test_a_run_is_not_resumed_as_another_run"
DAMAGED = (
    f"{CHECKPOINT}::test_an_altered_truncated_or_missing_file_makes_the_step_before_the_newest"
)
SPIKE = (
    f"{HEALTH}::test_a_step_without_update_changes_nothing_and_a_spike_is_gone_back_from_and_"
    "replays"
)
REFUSED_STEP = (
    f"{ENGINE}::test_a_state_saved_by_two_zero2_ranks_resumes_bit_for_bit_and_fits_any_stage_and_"
    "world_size"
)

CHECKLIST = {
    "1 a rank is killed: all start again from the newest commit, losses and samples as without": {
        "at any step": [
            BIT_FOR_BIT,
            f"{LAUNCH}::test_a_dead_rank_is_told_and_all_are_started_again",
        ],
        "many times, at any moment": [
            DRILL,
            "test_kill_drill.py::"
            "test_a_sample_that_was_never_used_or_too_often_is_found_and_lanes_may_drift",
        ],
        "under other launchers": [
            f"{LAUNCHERS}::test_torchrun_starts_dead_ranks_again_and_passes_on_that_it_is_told_to_stop",
            f"{LAUNCHERS}::test_deepspeeds_launcher_ends_with_a_killed_rank_and_the_same_command_"
            "goes_on",
            f"{LAUNCHERS}::test_ray_train_starts_dead_workers_again",
        ],
        "again and again": [f"{LAUNCH}::test_a_crash_loop_ends_and_says_where_to_look"],
    },
    "2 a rank is killed between the files of a save: there is no such step, and nothing is left": {
        "a real kill": [
            f"{KILL}::test_a_rank_killed_between_the_files_of_a_save_leaves_no_step_and_nothing_of_it",
        ],
        "a file that never comes": [
            f"{SAVER}::test_without_the_file_of_every_rank_there_is_no_checkpoint",
            f"{SAVER}::test_without_the_model_file_there_is_no_checkpoint",
            f"{CHECKPOINT}::test_a_save_that_was_cut_off_before_its_commit_does_not_exist",
        ],
        "leftovers": [
            f"{CHECKPOINT}::test_what_another_attempt_left_in_a_committed_step_is_removed",
            f"{CHECKPOINT}::test_pruning_keeps_the_newest_and_counts_only_committed_ones",
        ],
    },
    "3 several resumes within an epoch: the same ledger": {
        "three": [
            f"{EXACT}::test_three_resumes_with_other_ranks_and_workers_change_nothing",
            f"{STREAM}::test_three_resumes_and_changes_of_world_size_in_one_epoch_lose_nothing",
        ],
        "two with no step in between": [
            f"{LOADER}::test_two_resumes_with_no_step_in_between_change_nothing",
            f"{KILL}::test_two_resumes_that_make_no_step_leave_the_ledger_as_it_is",
        ],
    },
    "4 another number of ranks within an epoch: nothing to convert, losses within 1e-6": {
        "2, 1 and 2": [
            f"{KILL}::test_world_size_2_then_1_then_2_in_one_epoch_gives_the_same_losses",
        ],
        "and another ZeRO stage": [
            REFUSED_STEP,
            f"{KILL}::test_world_size_and_zero_stage_change_twice_and_sixty_losses_stay",
        ],
    },
    "7 a loss or gradient that is not finite: no rank updates, the batch is kept, a few end it": {
        "loss of one rank": [
            REFUSED_STEP,
            f"{ENGINE}::test_a_refused_step_leaves_no_trace_at_any_stage",
        ],
        "gradient of one rank": [
            f"{ENGINE}::test_a_refused_step_leaves_no_gradient_where_it_is_offloaded",
        ],
        "gradient of zeros": [REFUSED_STEP],
        "overflow in fp16": [
            f"{ENGINE}::test_an_overflow_of_fp16_is_told_and_changes_nothing_and_at_the_lowest_scale_"
            "it_is_an_error",
        ],
        "batch and limit": [
            f"{HEALTH}::test_a_step_left_out_keeps_its_batch_and_too_many_in_a_hundred_end_the_run",
        ],
        "the run goes on": [SPIKE],
    },
    "8 told to stop: the step is saved in time, else the last commit counts": {
        "with time": [
            BIT_FOR_BIT,
            f"{LAUNCH}::test_told_to_stop_it_tells_the_ranks_and_waits",
            f"{LAUNCHERS}::test_a_ray_job_that_is_told_to_stop_loses_no_step",
        ],
        "without": [
            f"{LAUNCH}::test_ranks_that_do_not_save_in_time_are_killed",
            f"{LAUNCH}::test_the_second_ctrl_c_does_not_wait",
        ],
        "exit code": [f"{LAUNCH}::test_the_command_line_names_the_exit_code"],
    },
    "9 a rank hangs: noticed by the clock of its section, stacks of all ranks, then as killed": {
        "stopped": [BIT_FOR_BIT, f"{LAUNCH}::test_a_single_rank_that_was_stopped_is_continued"],
        "by section": [
            f"{WATCH}::test_what_hangs_leaves_its_stacks_and_ends",
            f"{WATCH}::test_ranks_that_never_find_each_other_end_with_their_stacks",
        ],
        "in a save, beside training, and while loading": [
            f"{HANGS}::test_a_rank_that_stops_in_a_save",
            f"{HANGS}::test_a_rank_whose_write_hangs_beside_training_leaves_its_own_stacks",
            f"{HANGS}::test_a_process_that_loads_data_and_stops",
        ],
        "in code that holds Python's lock": [
            f"{WATCH}::test_c_code_that_keeps_pythons_lock_is_ended_as_well",
        ],
        "stacks of the others": [
            f"{LAUNCH}::test_when_one_rank_hangs_the_others_leave_their_stacks",
        ],
        "nothing hangs": [f"{WATCH}::test_what_takes_its_usual_time_is_left_alone"],
        "a host that is cut off": [
            f"{LAUNCHERS}::test_a_host_that_is_cut_off_and_comes_back_costs_no_step",
        ],
    },
    "12 commit records that are none: passed over with a warning, never a silent fresh start": {
        "none": [f"{CHECKPOINT}::test_a_save_that_was_cut_off_before_its_commit_does_not_exist"],
        "empty or cut": [f"{CHECKPOINT}::test_an_empty_or_cut_commit_record_is_no_commit"],
        "all damaged": [
            f"{CHECKPOINT}::test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_silently",
        ],
        "of a folder without": [
            f"{CHECKPOINT}::test_a_folder_without_checkpoint_is_named_in_the_error",
        ],
    },
    "13 a full disk: the checkpoint before stays, the cause is named, and there is no loop": {
        "of checkpoints": [
            f"{SAVER}::test_a_full_disk_is_told_at_the_next_step_and_leaves_the_checkpoint_before",
            f"{KILL}::test_a_full_disk_stops_the_run_at_once_and_room_lets_it_go_on",
        ],
        "of the cache": [f"{CACHE}::test_on_a_full_disk_old_entries_make_room_for_new_ones"],
        "of Ray's spills": ["test_spill.py::test_a_full_disk_under_rays_spills_stops_no_labelling"],
        "the message": ["test_stages.py::test_a_full_disk_is_said_with_an_exit_code_of_its_own"],
    },
    "14 a damaged checkpoint: found before a weight changes, the file named, the one before used": {
        "a byte, a cut, a missing file": [DAMAGED],
        "in a run": [f"{SAVER}::test_a_damaged_step_is_passed_over_and_can_be_saved_again"],
        "of one rank": [
            f"{CHECKPOINT}::test_what_one_rank_finds_damaged_both_pass_over",
        ],
        "its head": ["test_state_file.py::test_a_damaged_header_is_named"],
    },
    "15 uneven data: nobody hangs, equal steps on all ranks, every sample comes": {
        "shards that ranks and workers can't share evenly": [
            f"{STREAM}::test_the_lanes_of_an_epoch_hold_every_sample_exactly_once",
            f"{STREAM}::test_each_sample_comes_exactly_once_per_epoch_with_bad_ones_in_between",
            f"{EXACT}::test_units_cover_every_sample_once_and_are_of_one_shard",
        ],
        "an empty shard": [f"{STREAM}::test_a_set_with_an_empty_shard_gives_all_of_its_samples"],
        "too few samples": [
            f"{STREAM}::test_a_set_with_fewer_samples_than_lanes_is_refused_with_the_cure",
        ],
        "a rank without boxes": [
            "test_loss_equality.py::test_a_rank_without_any_box_trains_beside_one_with_boxes",
        ],
    },
    "17 a second trainer on one run folder: refused": {
        "on a disk": [
            BIT_FOR_BIT,
            f"{LEASE}::test_the_second_on_a_local_disk_is_told_who_holds_it",
        ],
        "on an object store": [
            f"{LEASE}::test_a_holder_that_lives_is_left_alone_and_named",
            f"{LAUNCHERS}::test_a_run_on_an_object_store_has_one_trainer_and_goes_on_by_itself",
        ],
        "whatever happens": [
            f"{SAVER}::test_a_second_trainer_that_commits_first_stops_this_one",
            f"{CHECKPOINT}::test_of_two_processes_that_commit_one_step_the_second_is_told",
        ],
    },
    "18 saves that were cut off do not count as kept": {
        "several in a row": [
            f"{CHECKPOINT}::test_pruning_keeps_the_newest_and_counts_only_committed_ones",
            f"{SAVER}::test_of_five_saves_the_newest_that_are_to_be_kept_are_left",
        ],
    },
    "20 loader processes are killed: batches in order, each sample once, no shared memory left": {
        "twenty times": [
            "test_loader_deaths.py::test_twenty_killed_loader_processes_change_no_loss_and_no_"
            "sample_and_leave_no_shared_memory",
        ],
        "with their rank": [f"{LAUNCH}::test_the_helpers_of_a_killed_rank_end_with_it"],
    },
    "21 clocks that jump or disagree: one run in one folder": {
        "of ranks": [f"{LAUNCHERS}::test_ranks_whose_clocks_disagree_make_one_run"],
        "of a lease": [f"{LEASE}::test_a_dead_holders_lease_expires_whatever_the_clocks_say"],
    },
    "22 settings, data, teacher or code changed between two starts: refused with what differs": {
        "settings": [ANOTHER_RUN],
        "those of speed, length and place": [
            "test_run_settings.py::test_speed_length_and_place_may_change_one_by_one_and_all_together",
        ],
        "data": [
            f"{STREAM}::test_a_position_of_another_sequence_is_refused_and_the_change_is_named"
        ],
        "of labels": [
            "test_label_kills.py::test_other_settings_for_the_same_set_are_refused_by_name"
        ],
        "teacher or parser": [
            f"{LABEL_PLAN}::test_a_machine_with_another_teacher_or_parser_labels_nothing",
            f"{LABEL_PLAN}::"
            "test_an_ensemble_of_foreign_teachers_labels_with_a_threshold_of_its_own",
        ],
        "code": [f"{FORCED}::test_labels_of_another_version_of_the_code_are_other_labels"],
        "unless forced": [
            f"{FORCED}::"
            "test_labels_of_other_settings_are_added_by_force_and_each_shard_says_whose_it_is",
            f"{FORCED}::test_no_force_mixes_labels_of_other_pairs_into_a_set",
            f"{FORCED}::test_a_run_goes_on_with_other_rates_and_losses_by_force_only_and_keeps_"
            "what_it_was_trained_with",
        ],
    },
    "23 a loss spike: back to before, a stretch skipped, and the run replays": {
        "a run": [SPIKE],
        "a kill right then": [
            f"{HEALTH}::test_a_kill_right_after_going_back_was_decided_does_not_resume_beyond_it",
        ],
        "when and how often": [
            f"{HEALTH}::test_a_loss_far_above_the_median_of_a_hundred_sends_the_run_back",
            f"{HEALTH}::test_a_loss_that_spikes_again_and_again_ends_the_run",
        ],
    },
    "25 what must not matter: the same ledger and losses": {
        "loader processes": [
            f"{LOADER}::test_any_number_of_workers_gives_the_same_batches_and_positions",
        ],
        "the cache": [f"{CACHE}::test_a_second_epoch_is_read_from_the_cache"],
        "both, in runs": [
            f"{KILL}::test_loader_processes_and_the_state_of_the_cache_change_nothing",
        ],
    },
}


@pytest.mark.parametrize("row", CHECKLIST)
def test_every_fault_has_its_tests(row: str) -> None:
    assert_tests_exist(CHECKLIST[row])
