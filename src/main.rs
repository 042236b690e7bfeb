//! The `mirrorfs` program: parse, run, exit code.

fn main() {}
