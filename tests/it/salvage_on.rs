//! The tests of salvage once more, on xfs and btrfs: their holes, journals and block counts are others.

use crate::badsource::on;

macro_rules! on_others {
    ($($test:ident)+) => {
        mod xfs {
            $(#[test] fn $test() { super::on("xfs", crate::salvage::$test) })+
        }
        mod btrfs {
            $(#[test] fn $test() { super::on("btrfs", crate::salvage::$test) })+
        }
    };
}

on_others! {
    what_can_be_read_of_a_bad_file_is_here_when_src_is_dead
    both_names_of_a_bad_file_have_what_can_be_read
    what_a_user_writes_over_bad_pages_makes_the_file_whole
    a_bad_file_that_a_user_has_changed_is_not_given_up
    a_bad_file_that_is_another_in_src_is_pulled_again_whole
    what_can_be_read_stays_when_the_rest_is_given_up
    what_can_be_read_stays_when_the_rest_is_given_up_without_a_daemon
    an_exit_at_each_point_once_loses_nothing
}
