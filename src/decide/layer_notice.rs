//! Report of a node most of whose images lack layers, and the text of the Event.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::model::NodeName;

/// A state must last this long before its report. The agent reads pods and their namespaces one
/// after the other, and an image lacks layers for a moment while its pull ends.
const MIN_DURATION: Duration = Duration::from_secs(60);

/// Shortest time between two reports. The API server drops Events after an hour.
const MIN_INTERVAL: Duration = Duration::from_secs(3600);

/// Images of a node that should have all their layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerCounts {
    /// The number of these images.
    pub expected: usize,
    /// Images that lack a layer.
    pub lacking: usize,
}

impl LayerCounts {
    /// Whether most of the images lack layers.
    pub fn is_mostly_lacking(self) -> bool {
        self.lacking.saturating_mul(2) > self.expected
    }
}

/// A change of the state that is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerReport {
    /// From now on most of the images lack layers.
    Lacking(LayerCounts),
    /// From now on most of the images have all layers.
    Complete(LayerCounts),
}

/// The state of the last report.
#[derive(Debug, Clone, Default)]
pub struct LayerNotice {
    is_lacking: bool,
    /// The time since which the state differs from the last report.
    differs_since: Option<Instant>,
    /// The last report of missing layers.
    reported: Option<Instant>,
}

impl LayerNotice {
    /// Records the current counts. Returns the report that is due.
    pub fn observe(&mut self, layers: LayerCounts, now: Instant) -> Option<LayerReport> {
        let is_lacking = layers.is_mostly_lacking();
        if is_lacking == self.is_lacking {
            self.differs_since = None;
            return None;
        }
        let since = *self.differs_since.get_or_insert(now);
        let is_early = is_lacking && self.reported.is_some_and(|at| now.duration_since(at) < MIN_INTERVAL);
        if now.duration_since(since) < MIN_DURATION || is_early {
            return None;
        }
        (self.is_lacking, self.differs_since) = (is_lacking, None);
        if !is_lacking {
            return Some(LayerReport::Complete(layers));
        }
        self.reported = Some(now);
        Some(LayerReport::Lacking(layers))
    }
}

/// The Event's text. `reasons` counts all incomplete images of the node; `fetches` is the setting
/// `retainFetch`.
pub fn event_text(node: &NodeName, layers: LayerCounts, reasons: &BTreeMap<String, usize>, fetches: bool) -> String {
    let LayerCounts { expected: wanted, lacking } = layers;
    let reasons: Vec<_> = reasons.iter().map(|(reason, images)| format!("{reason} {images}")).collect();
    let why = match reasons.is_empty() {
        true => String::new(),
        false => format!(" Reasons, counted over all incomplete images of the node: {}.", reasons.join(", ")),
    };
    let remedy = match fetches {
        true => "The agent fetches missing layers in the background.",
        false => "Remedy: set retainFetch; the agent then fetches missing layers (not in a dry run).",
    };
    format!(
        "{lacking} of the {wanted} images on {node} that should have all layers lack some. Other nodes cannot get \
         these images from {node} while their registry is down.{why} {remedy} If no source has the layers, remove the \
         image from the node: a new pull brings its layers. discard_unpacked_layers = false in containerd's \
         configuration keeps the layers of later pulls."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(lacking: usize, expected: usize) -> LayerCounts {
        LayerCounts { expected, lacking }
    }

    /// The reports for these counts, one every 10 s.
    fn notices(notice: &mut LayerNotice, from: Instant, numbers: &[LayerCounts]) -> Vec<LayerReport> {
        let at = |tick: usize| from + Duration::from_secs(10) * u32::try_from(tick).unwrap();
        let observed = numbers.iter().enumerate().map(|(tick, layers)| notice.observe(*layers, at(tick)));
        observed.collect::<Vec<_>>().into_iter().flatten().collect()
    }

    #[test]
    fn a_lasting_lack_is_reported_once() {
        let mut notice = LayerNotice::default();
        let numbers = [layers(3, 4); 1000];
        assert_eq!(notices(&mut notice, Instant::now(), &numbers), [LayerReport::Lacking(layers(3, 4))]);
    }

    #[test]
    fn a_lack_of_half_the_images_is_not_reported() {
        for half in [layers(0, 0), layers(1, 2), layers(2, 4)] {
            assert_eq!(notices(&mut LayerNotice::default(), Instant::now(), &[half; 100]), []);
        }
    }

    #[test]
    fn a_brief_lack_is_not_reported() {
        let moments = [[layers(1, 1); 5].as_slice(), &[layers(0, 1)], &[layers(1, 1); 6]].concat();
        assert_eq!(notices(&mut LayerNotice::default(), Instant::now(), &moments), []);
    }

    #[test]
    fn a_recurring_lack_is_reported_again_after_an_hour() {
        let (mut notice, start) = (LayerNotice::default(), Instant::now());
        let minutes = |count: usize, layers: LayerCounts| vec![layers; count * 6];
        let back_and_forth = [minutes(2, layers(1, 1)), minutes(2, layers(0, 1)), minutes(58, layers(1, 1))].concat();
        let expected = [
            LayerReport::Lacking(layers(1, 1)),
            LayerReport::Complete(layers(0, 1)),
            LayerReport::Lacking(layers(1, 1)),
        ];
        assert_eq!(notices(&mut notice, start, &back_and_forth), expected);
        let last = notice.reported.unwrap();
        assert!(last >= start + MIN_DURATION + MIN_INTERVAL, "{:?}", last - start);
    }

    #[test]
    fn numbers_that_change_every_minute_make_one_report_an_hour() {
        let minute = |minute: usize| [layers(usize::from(minute.is_multiple_of(4) || minute % 4 == 1), 1); 6];
        let day: Vec<_> = (0..24 * 60).flat_map(minute).collect();
        let reports = notices(&mut LayerNotice::default(), Instant::now(), &day);
        let lacks = reports.iter().filter(|notice| matches!(notice, LayerReport::Lacking(_))).count();
        assert!((2..=24).contains(&lacks), "{lacks}");
    }

    #[test]
    fn the_text_names_the_node_the_images_the_reason_and_the_remedy() {
        let node = "n23".parse().unwrap();
        let reasons = BTreeMap::from([("layers discarded after unpacking".to_owned(), 11)]);
        let text = event_text(&node, layers(11, 14), &reasons, true);
        for part in [
            "11 of the 14 images on n23",
            "discarded after unpacking 11",
            "in the background",
            "discard_unpacked_layers",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(event_text(&node, layers(1, 1), &BTreeMap::new(), false).contains("set retainFetch"));
        assert!(text.len() <= 1024, "the API server's limit: {}", text.len());
    }
}
