//! The server under test, built together with the tests so that it is never stale.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    moesaic::main_entry()
}
