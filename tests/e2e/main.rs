//! The whole system on real parts: three nodes with containerd 1.6, 1.7 and 2.x, a control plane, a registry, and the agents as the
//! DaemonSet that users apply. `make test` sets everything up; one cluster serves all tests, one after the other.

mod bed;
mod pods;
mod scenarios;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};

use bed::Bed;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share a registry that is stopped and started.
    arguments.test_threads = Some(1);
    let needed = !arguments.list && scenarios::ALL.iter().any(|(name, _)| is_selected(&arguments, name));
    let bed = match needed.then(Bed::up).transpose() {
        Ok(bed) => bed.map(Arc::new),
        Err(error) => {
            eprintln!("the test bed does not come up: {error}");
            return ExitCode::FAILURE;
        }
    };
    let trials = scenarios::ALL.iter().map(|(name, scenario)| {
        let bed = bed.clone();
        Trial::test(*name, move || {
            let bed = bed.as_deref().ok_or("no test bed")?;
            scenario(bed).map_err(Failed::from)
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    drop(bed);
    conclusion.exit_code()
}

fn is_selected(arguments: &Arguments, name: &str) -> bool {
    arguments.filter.as_deref().is_none_or(|filter| name.contains(filter))
}
