//! What is printed.

/// Why figures could not be made; written for the person who reads it.
pub(crate) type BenchError = Box<dyn std::error::Error + Send + Sync>;

/// Tells what goes on, apart from the figures.
pub(crate) fn note(text: &str) {
    eprintln!("transfer: {text}");
}

/// One figure, with what it ran on.
pub(crate) fn figure(name: &str, value: f64, on: &str) {
    println!("figure {name} {value:.2} ({on})");
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<_> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Megabytes (10^6 bytes) a second.
pub(crate) fn mb_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}
