//! The `lighterman` binary; all code is in the library.

fn main() -> std::process::ExitCode {
    lighterman::cli::run()
}
