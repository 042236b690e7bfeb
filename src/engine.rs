//! Engine: how bytes get from one file to another. It has never heard of marks.

pub mod job;
