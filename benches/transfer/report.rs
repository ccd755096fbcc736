//! Output of figures and notes.

/// Why a figure could not be measured, for the reader of the output.
pub(crate) type BenchError = Box<dyn std::error::Error + Send + Sync>;

/// Prints progress on stderr, apart from the figures.
pub(crate) fn note(text: &str) {
    eprintln!("transfer: {text}");
}

/// Prints a figure and the conditions of its measurement.
pub(crate) fn figure(name: &str, value: f64, context: &str) {
    println!("figure {name} {value:.2} ({context})");
}

/// The middle value, or the mean of the two middle values.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<_> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Megabytes (10^6 bytes) per second.
pub(crate) fn mb_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}
