//! Figures that the agents measured, on lines of their own for `make figures`. Nothing is asserted
//! here.

use crate::test_bed::{NODES, TestBed};

/// Prints the figures of the cases. Called before a scenario restarts an agent, which resets the
/// agent's metrics.
pub(crate) fn of_cases(bed: &TestBed, (passed, attempted): (usize, usize)) {
    if attempted == 0 {
        return;
    }
    println!("\nfigure pods_recovered_of_cases {passed}/{attempted}");
    for (figure, metric) in [
        ("import_to_running_ms", "lighterman_import_to_running_seconds"),
        ("event_to_first_byte_ms", "lighterman_event_to_first_byte_seconds"),
    ] {
        let sum_over_nodes = |part: &str| -> f64 {
            let of_node = |node| bed.metric(node, &format!("{metric}_{part}")).unwrap_or(0.0);
            NODES.iter().map(|(node, _)| of_node(node)).sum()
        };
        let count = sum_over_nodes("count");
        if count > 0.0 {
            println!("figure {figure} {:.0}", 1000.0 * sum_over_nodes("sum") / count);
        }
    }
}
