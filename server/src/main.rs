//! The `moesaic` binary.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    moesaic::main_entry()
}
