//! The `moesaic` binary.

fn main() -> std::process::ExitCode {
    moesaic::main_entry()
}
