//! The `mirrorfs` program: parse, run, exit code.

fn main() -> std::process::ExitCode {
    mirrorfs::run::run(std::env::args_os())
}
