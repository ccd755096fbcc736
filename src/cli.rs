//! The command line: which subcommands there are and what they exit with.

mod agent;
pub mod demo;
mod pull;
mod socket;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::config::AgentArgs;

/// Nodes give each other the container images that a registry cannot.
#[derive(Debug, Parser)]
#[command(name = "lighterman", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// What is logged: error, warn, info, debug, or per module (lighterman::transfer=debug)
    #[arg(long, global = true, env = "LIGHTERMAN_LOG", value_name = "FILTER", default_value = "info")]
    log: String,

    /// How it is logged, always to standard error
    #[arg(long, global = true, env = "LIGHTERMAN_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

const EXAMPLES: &str = "\
Examples:
  lighterman demo                          three agents on this machine, one image, a registry that is down
  lighterman demo --nodes 5 --image-size 1GiB --json
  lighterman pull nginx:1.27               on a node: an image from its peers, now
  lighterman status                        on a node: how its agent is
  lighterman agent --node-name \"$(hostname)\"  what the DaemonSet runs; see `lighterman agent --help`

Exit codes: 0 done, 1 failed, 64 wrong flags, settings or references.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node's agent, as the DaemonSet does
    Agent(Box<AgentArgs>),
    /// Watch an image travel between agents on this machine
    Demo(demo::DemoArgs),
    /// Bring an image to this node from its peers, by hand
    Pull(pull::PullArgs),
    /// Say how this node's agent is: its peers, its recoveries, registries that are down
    Status(status::StatusArgs),
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Wrong flags or settings (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;

/// Parses the command line, runs, and answers the exit code.
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

/// Help and version are no errors; anything else is one line, so that it can be found in a pod's log.
fn usage(error: &clap::Error) -> ExitCode {
    if error.exit_code() == 0 {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:")).collect();
    let said = lines.iter().filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    let said = said.map(|line| line.trim_start_matches("error: ")).collect::<Vec<_>>().join(" ");
    fail_usage(&said)
}

fn fail_usage(message: &str) -> ExitCode {
    eprintln!("lighterman: {message} (see lighterman --help)");
    ExitCode::from(EXIT_USAGE)
}

fn start_log(filter: &str, format: LogFormat) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = tracing_subscriber::EnvFilter::builder().parse(filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// A runtime with everything on, for whatever a subcommand does.
///
/// # Errors
/// As the system says, when it gives no threads.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers(processors)).enable_all().build()
}

/// Most threads of a runtime. A fetched byte costs some 2 ns with its hash, so that six of them fill 25 Gbit/s.
const MAX_WORKERS: usize = 8;

/// Threads that drive everything but what may block. Half of the processors that this process may use: the others are for what the node is
/// there for, and threads that seldom have anything to do cost more to wake than they bring (a swarm of eight agents on two processors, links of
/// 100 Mbit/s: the last one is done after 1.31 times size / bandwidth with one thread each, 1.47 to 1.55 with two).
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
