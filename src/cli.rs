//! The command line: subcommands and exit codes.

mod agent;
pub mod demo;
mod pull;
mod socket;
mod status;

use std::io::IsTerminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::config::AgentArgs;

/// Recovers container images that Kubernetes nodes cannot pull, from other nodes of the cluster.
#[derive(Debug, Parser)]
#[command(name = "lighterman", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Log level: error, warn, info, debug, or levels by module (info,lighterman::transfer=debug)
    #[arg(long, global = true, env = "LIGHTERMAN_LOG", value_name = "FILTER", default_value = "info")]
    log: String,

    /// Format of the log, which goes to standard error
    #[arg(long, global = true, env = "LIGHTERMAN_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

const EXAMPLES: &str = "\
Examples:
  lighterman demo                          three agents on this machine, one image, a registry that is down
  lighterman demo --nodes 5 --image-size 1GiB --json
  lighterman pull nginx:1.27               on a node: fetch an image from its peers now
  lighterman status                        on a node: the state of its agent
  lighterman agent --node-name \"$(hostname)\"  the agent, as the DaemonSet runs it; see `lighterman agent --help`

Exit codes: 0 done, 1 failed, 64 wrong flags, settings or references.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node's agent, as the DaemonSet does
    Agent(Box<AgentArgs>),
    /// Recover an image between agents on this machine
    Demo(demo::DemoArgs),
    /// Fetch an image from peers to this node, on request
    Pull(pull::PullArgs),
    /// Print the state of this node's agent: peers, recoveries, registries that are down
    Status(status::StatusArgs),
}

/// Format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Plain text
    Text,
    /// One JSON object per line
    Json,
}

/// Wrong flags or settings (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;

/// Parses the command line, runs the subcommand, and returns the exit code.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let Cli { command, log, log_format } = cli;
    if let Err(error) = start_log(&log, log_format) {
        return fail_usage(&format!("--log {log:?}: {error}"));
    }
    match command {
        Command::Agent(args) => match args.into_config() {
            Ok(config) => agent::run(config),
            Err(error) => fail_usage(&error.to_string()),
        },
        Command::Demo(args) => demo::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Status(args) => status::run(args),
    }
}

/// Help and version are no errors. An error is one line, which is easy to find in a pod's log.
fn usage(error: &clap::Error) -> ExitCode {
    if error.exit_code() == 0 {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:")).collect();
    let message = lines.iter().filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    let message = message.map(|line| line.trim_start_matches("error: ")).collect::<Vec<_>>().join(" ");
    fail_usage(&message)
}

fn fail_usage(message: &str) -> ExitCode {
    eprintln!("lighterman: {message} (see lighterman --help)");
    ExitCode::from(EXIT_USAGE)
}

fn start_log(filter: &str, format: LogFormat) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = tracing_subscriber::EnvFilter::builder().parse(filter)?;
    // A pod's log and a file keep color codes as text.
    let is_colored = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_colored).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// A multi-threaded runtime with I/O and time, for every subcommand.
///
/// # Errors
/// The system's error when no thread can be started.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers(processors)).enable_all().build()
}

/// Most threads of a runtime. A fetched byte costs some 2 ns with its hash, so six threads fill
/// 25 Gbit/s.
const MAX_WORKERS: usize = 8;

/// Threads for all work that does not block: half of the processors that this process may use. The
/// node's own pods need the other half, and an idle thread costs more to wake than it contributes.
/// In a swarm of eight agents on two processors with links of 100 Mbit/s, the last agent finishes
/// after 1.31 times size / bandwidth with one thread each, and after 1.47 to 1.55 times with two.
fn workers(processors: usize) -> usize {
    (processors / 2).clamp(1, MAX_WORKERS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn an_agent_leaves_half_of_the_processors_alone() {
        let processors = [1, 2, 3, 4, 16, 192];
        assert_eq!(processors.map(workers), [1, 1, 1, 2, 8, 8]);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_the_agent_has_its_environment_variable() {
        let command = Cli::command();
        let agent = command.find_subcommand("agent").unwrap();
        for argument in agent.get_arguments().filter(|argument| argument.get_long().is_some_and(|long| long != "help"))
        {
            let long = argument.get_long().unwrap();
            let expected = format!("LIGHTERMAN_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(argument.get_env().and_then(|env| env.to_str()), Some(expected.as_str()), "--{long}");
            assert!(argument.get_help().is_some(), "--{long} is not documented");
        }
    }
}
