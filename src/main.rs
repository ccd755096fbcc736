//! `lighterman`: see the library for everything.

fn main() -> std::process::ExitCode {
    lighterman::cli::run()
}
