//! The whole system on real parts: three nodes with containerd 1.7, 2.3 and 2.4, a control plane, a
//! registry, and the agents as the DaemonSet that users apply. `make test` sets everything up. One
//! cluster serves the cases and the scenarios.
//!
//! The cases run first, in parallel. The scenarios follow one after the other, because a scenario
//! stops the shared registry or kills agents. Other clusters follow: nodes that discard layers
//! (`discarding`), and each address family (`address_families`).
//! A single row: `cargo test --test e2e -- case::init_container`.

mod address_families;
mod api;
mod cases;
mod discarding;
mod figures;
mod images;
mod pods;
mod registries;
mod scenarios;
mod stalls;
mod test_bed;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

use cases::{CaseOnNode, CaseRunner};
use scenarios::Scenario;
use test_bed::{TestBed, TestError};

/// Cases that run at the same time. A case mostly waits, but every pod costs a kubelet half a
/// second of processor time.
const CASES_IN_PARALLEL: usize = 8;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let is_to_run = |name: &str| !arguments.list && is_selected(&arguments, name);
    let cases_on_nodes: Vec<_> =
        CaseOnNode::all().into_iter().map(|(name, case_on_node)| (name, Arc::new(case_on_node))).collect();
    let needs_stalls = stalls::ALL.iter().any(|(name, _)| is_to_run(name));
    let needed = needs_stalls
        || cases_on_nodes.iter().any(|(name, _)| is_to_run(name))
        || scenarios::ALL.iter().any(|(name, _)| is_to_run(name));
    let bed = match needed.then(|| TestBed::up(needs_stalls)).transpose() {
        Ok(bed) => bed.map(Arc::new),
        Err(error) => {
            eprintln!("the test bed did not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let cases = match run_cases(&arguments, bed.as_ref(), cases_on_nodes) {
        Ok(conclusion) => conclusion,
        Err(error) => {
            eprintln!("the images of the cases could not be imported into the nodes: {error}");
            return ExitCode::FAILURE;
        }
    };
    let scenarios = run_scenarios(&arguments, bed.as_ref(), scenarios::ALL);
    drop(bed);
    let mut conclusions = vec![cases, scenarios];
    let needed = discarding::ALL.iter().any(|(name, _)| is_to_run(name));
    match needed.then(discarding::up).transpose() {
        Ok(bed) => conclusions.push(run_scenarios(&arguments, bed.map(Arc::new).as_ref(), discarding::ALL)),
        Err(error) => {
            eprintln!("the test bed of nodes that discard layers did not start: {error}");
            return ExitCode::FAILURE;
        }
    }
    for family in address_families::ALL {
        let needed = family.scenarios.iter().any(|(name, _)| is_to_run(name));
        match needed.then(|| family.up()).transpose() {
            Ok(bed) => conclusions.push(run_scenarios(&arguments, bed.map(Arc::new).as_ref(), family.scenarios)),
            Err(error) => {
                eprintln!("the test bed of address family {} did not start: {error}", family.name);
                return ExitCode::FAILURE;
            }
        }
    }
    let failed = conclusions.into_iter().find(Conclusion::has_failed);
    failed.map_or(ExitCode::SUCCESS, |failed| failed.exit_code())
}

fn run_cases(
    arguments: &Arguments,
    bed: Option<&Arc<TestBed>>,
    cases_on_nodes: Vec<(String, Arc<CaseOnNode>)>,
) -> Result<Conclusion, TestError> {
    let selected: Vec<_> = cases_on_nodes
        .iter()
        .filter(|(name, _)| is_selected(arguments, name))
        .map(|(_, case_on_node)| &**case_on_node)
        .collect();
    let runner = bed.map(|bed| CaseRunner::prepare(bed, &selected)).transpose()?.map(Arc::new);
    let trials = cases_on_nodes.into_iter().map(|(name, case_on_node)| {
        let (bed, runner) = (bed.cloned(), runner.clone());
        Trial::test(name, move || {
            let (bed, runner) = bed.as_deref().zip(runner.as_deref()).ok_or("no test bed")?;
            runner.run(bed, &case_on_node).map_err(Failed::from)
        })
    });
    // The stall rows wait for minutes on nodes of their own. Started first, they end before the
    // cases.
    let stall_trials = stalls::ALL.iter().map(|(name, row)| {
        let bed = bed.cloned();
        Trial::test(*name, move || row(bed.as_deref().ok_or("no test bed")?).map_err(Failed::from))
    });
    let threads = CASES_IN_PARALLEL + stalls::ALL.len();
    let arguments = Arguments { test_threads: Some(threads), ..arguments.clone() };
    let conclusion = libtest_mimic::run(&arguments, stall_trials.chain(trials).collect());
    if let Some((bed, runner)) = bed.zip(runner) {
        figures::of_cases(bed, runner.score());
    }
    Ok(conclusion)
}

fn run_scenarios(
    arguments: &Arguments,
    bed: Option<&Arc<TestBed>>,
    scenarios: &[(&'static str, Scenario)],
) -> Conclusion {
    let trials = scenarios.iter().map(|(name, scenario)| {
        let bed = bed.cloned();
        let scenario = *scenario;
        let ignored = scenarios::ignored(name);
        if let Some(reason) = ignored.as_deref().filter(|_| is_selected(arguments, name)) {
            eprintln!("{name} is ignored: {reason}");
        }
        let trial = Trial::test(*name, move || {
            let bed = bed.as_deref().ok_or("no test bed")?;
            scenario(bed).map_err(Failed::from)
        });
        trial.with_ignored_flag(ignored.is_some())
    });
    let arguments = Arguments { test_threads: Some(1), ..arguments.clone() };
    libtest_mimic::run(&arguments, trials.collect())
}

fn is_selected(arguments: &Arguments, name: &str) -> bool {
    arguments.filter.as_deref().is_none_or(|filter| name.contains(filter))
        && !arguments.skip.iter().any(|skipped| name.contains(skipped))
}
