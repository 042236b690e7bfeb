//! The suite's most telling tests once more, over /dev/fuse: what a transport could get wrong. Where the
//! kernel has FUSE over io_uring all others run over that; `MIRRORFS_TRANSPORT=dev` runs them over this.

use crate::fixture::{can_mount, over};

macro_rules! over_dev_fuse {
    ($($module:ident { $($test:ident)+ })+) => {
        $(mod $module {
            $(#[test]
            fn $test() {
                if super::can_mount() {
                    super::over("dev", crate::$module::$test);
                }
            })+
        })+
    };
}

over_dev_fuse! {
    semantics {
        reading_a_pending_file_gives_srcs_bytes_and_leaves_them_in_dst
        the_first_bytes_of_a_large_file_come_before_the_whole_and_the_rest_follows
        a_program_in_the_mount_can_be_executed
        writing_into_a_pending_file_keeps_the_rest_of_it
        truncating_a_pending_file_keeps_what_is_before_the_cut
        fallocate_and_punching_holes_work_on_pending_files
        copy_file_range_from_and_into_pending_files_copies_the_bytes
        every_kind_of_entry_can_be_made_in_a_pending_directory
        what_was_listed_or_was_not_there_is_seen_anew_as_soon_as_it_changes
        renaming_over_replaces_and_exchanges_and_refuses_as_told
        a_large_pending_directory_can_be_listed_and_removed
        hard_links_behave_as_on_a_plain_file_system
        permissions_are_checked_for_the_caller_in_every_state
        a_shared_mapping_of_a_pending_file_shows_and_changes_its_bytes
        direct_io_reads_and_writes_pending_and_hydrated_files
        a_blocked_lock_does_not_stop_anybody_else
        many_readers_of_one_pending_file_all_get_its_bytes
        the_mark_and_the_control_directory_are_invisible_and_out_of_reach
        mounted_over_dst_the_path_stays_the_same_through_finish
        open_files_live_on_in_a_mount_that_was_detached
        a_daemon_that_was_killed_leaves_a_dead_mount_and_mounting_again_resumes
    }
    mixed {
        writing_into_a_large_pending_file_pulls_only_the_blocks_that_it_changes_in_part
        random_changes_are_those_of_a_plain_file
        writers_and_readers_at_once_see_whole_blocks
        an_upgrade_goes_on_with_a_mixed_file
        whole_blocks_are_written_while_src_is_away
        a_change_elsewhere_does_not_wait_for_bytes_that_hang
    }
    concurrent {
        clients_on_their_own_subtrees_see_plain_directories
        clients_on_the_same_names_are_explained_by_some_order
        clients_that_write_into_one_pending_file_see_each_other
    }
    differential {
        root_sees_no_difference_from_a_plain_directory
    }
    signals {
        a_signal_with_a_handler_ends_no_wait_and_a_later_kill_does
        who_waits_can_be_ended_after_an_upgrade_whether_he_had_a_signal_before_or_not
    }
    full {
        threads_that_serve_users_pass_no_quota
    }
    upgrade {
        no_operation_fails_while_the_program_is_replaced_twenty_times_on_ext4
        who_waits_for_a_slow_source_gets_his_file_from_the_next_program
        names_that_were_seen_before_their_directory_was_populated_keep_their_inodes
        a_program_that_cannot_take_over_changes_nothing
        limits_and_a_pause_stay_and_the_daemon_is_the_same_one
    }
    readahead {
        a_reader_in_order_has_many_pieces_asked_for_at_once_on_a_slow_source
        nothing_is_asked_for_ahead_of_who_reads_here_and_there
        a_bad_block_ahead_hurts_nobody_who_does_not_ask_for_it
        a_change_while_jobs_ahead_are_in_flight_gives_the_users_bytes
    }
    badsource {
        who_needs_a_source_that_died_waits_until_it_is_back
        a_file_that_hangs_delays_nobody_who_does_not_wait_for_it
        a_source_that_hangs_keeps_no_daemon_from_ending
    }
}
