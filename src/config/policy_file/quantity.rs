//! Sizes and rates as Kubernetes writes them: 50Mi, 2Gi, 100M.

/// The values that [`parse`] accepts, for messages.
pub(in crate::config) const ALLOWED: &str =
    "a whole number of bytes below 16Ei, also with the unit k, M, G, T, Ki, Mi, Gi or Ti (50Mi),";

const UNITS: [(&str, u64); 8] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

/// Bytes. `None` for any text but digits and one of the units, and for a number over 64 bits.
pub(in crate::config) fn parse(text: &str) -> Option<u64> {
    let unit = UNITS.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)));
    let (digits, factor) = unit.unwrap_or((text, 1));
    // `u64::from_str` would accept a sign too.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// Writes the bytes exactly, with the largest unit that divides them.
pub(super) fn show(bytes: u64) -> String {
    let exact = UNITS.iter().filter(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    exact
        .max_by_key(|(_, factor)| *factor)
        .map_or_else(|| bytes.to_string(), |(unit, factor)| format!("{}{unit}", bytes / factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_parsed_as_kubernetes_writes_them() {
        let all =
            [("0", 0), ("50Mi", 50 << 20), ("2Gi", 2 << 30), ("100M", 100_000_000), ("1k", 1000), ("3Ti", 3 << 40)];
        for (text, bytes) in all {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
        for text in ["", "Mi", "-1", "+1", "1.5Gi", "1 Gi", "1K", "1GiB", "1e3", "16777216Ti", "99999999999999999999"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_formatted_quantity_is_parsed_back(number in 0u64..5000, factor in 0usize..8) {
            let bytes = number * UNITS[factor].1;
            proptest::prop_assert_eq!(parse(&show(bytes)), Some(bytes));
        }
    }
}
