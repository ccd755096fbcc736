//! `docs/metrics.md` lists every metric as the code describes it.

use std::fs;

use lighterman::metrics::{MetricDescription, Metrics};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");

/// The variable that makes the test write the page instead of comparing it: `make metrics-page`.
const WRITE: &str = "LIGHTERMAN_WRITE_METRICS_PAGE";

#[test]
fn the_metrics_page_lists_every_metric() {
    let page = page();
    if std::env::var_os(WRITE).is_some() {
        fs::write(PAGE, &page).expect("the page can be written");
    }
    let written = fs::read_to_string(PAGE).unwrap_or_default();
    assert!(written == page, "docs/metrics.md differs from the code: run `make metrics-page`");
}

/// The text before the table.
const HEAD: &str = "# Metrics

Every agent serves its own metrics at `/metrics` on the admin port (4702). A counter begins at 0 when the agent starts.

## Alerts

| condition | meaning | remedy |
|---|---|---|
| `lighterman_registries_down > 0` | this node finds a registry down | repair the registry; pods that opted in are recovered meanwhile |
| `increase(lighterman_recoveries_total{outcome!~\"recovered\\|already_here\\|dry_run\\|abandoned\"}[15m]) > 0` | a recovery failed | the Events of the pod name the cause: [troubleshooting.md](troubleshooting.md) |
| `lighterman_images_lacking_layers > 0` for an hour | this node cannot provide all its images | [retained-layers.md](retained-layers.md) |
| `lighterman_udp_blocked == 1` | no peer answers over UDP | open UDP port 4701 between the nodes |
| `abs(lighterman_clock_skew_seconds) > 30` | the node's clock is wrong | synchronize the clock; peers reject tokens otherwise |
| `lighterman_policy_file_valid == 0` | the policy file is invalid, and the earlier policy stays in force | the agent's log names the line |

## All metrics

`make metrics-page` writes this page from the code, and a test compares the two.

| metric | kind | label | meaning |
|---|---|---|---|
";

fn page() -> String {
    let metrics = Metrics::new();
    let rows: String = metrics.descriptions().iter().map(row).collect();
    format!("{HEAD}{rows}")
}

fn row(metric: &MetricDescription) -> String {
    let MetricDescription { name, kind, label, help } = metric;
    let label = label.map(|label| format!("`{label}`")).unwrap_or_default();
    // A bar would end the cell.
    format!("| `{name}` | {kind} | {label} | {} |\n", help.replace('|', "\\|"))
}
