//! A driver that holds results back, and checks every action.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestCaseError;

use super::super::super::*;
use super::super::test_node::{BACK_OFF, REFUSED, TestNode, container, failed, opted_in, pod, recovered, waiting};
use super::{Answer, Event, Status};
use crate::decide::cause::{is_pending, waits_for_image};
use crate::decide::container_records::Subject;
use crate::decide::pull_failure::PullVerdict;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::decide::stalled_connections::TcpConnection;
use crate::model::{KubeletEvent, NamespaceView, OutageKind, PodView, RecoveryOutcome, WaitingState};

type Checked = Result<(), TestCaseError>;

/// Longer than the wait of a recovery that failed for good, and one back-off more.
pub(super) const FORGOTTEN_AFTER: Duration = Duration::from_secs(2 * 3600 + 1800);

/// In the last hour of the rest, every wanted image has an attempt: no back-off is longer than
/// 5 min then, because the rest brings no import.
const LAST_HOUR: Duration = Duration::from_secs(3600);

/// Actions on one input. A change of the policy reconciles three pods with two containers each, and
/// the end of a recovery reports to three pods.
const MAX_ACTIONS: usize = 40;

pub(super) struct Driver {
    node: TestNode,
    /// The pods that exist.
    views: BTreeMap<PodRef, PodView>,
    /// Every image that a pod ever named. A pod's images may change while an answer is under way.
    images: BTreeMap<PodRef, BTreeSet<Reference>>,
    opt_in_reads: Vec<PodRef>,
    event_reads: Vec<PodRef>,
    probes: Vec<String>,
    removals: Vec<(Reference, Vec<PodRef>)>,
    is_listing: bool,
    is_measuring: bool,
    /// Running recoveries, and whether each is canceled.
    running: BTreeMap<Reference, bool>,
    imported: BTreeSet<Reference>,
    /// UID, container and text of everything reported since the last reset.
    reported: BTreeSet<(String, Option<String>, String)>,
    last_started: BTreeMap<Reference, Instant>,
}

fn name(pod: u8) -> PodRef {
    super::super::pod(&pod.to_string(), "").pod
}

fn image(number: u8) -> String {
    format!("r.test/shop/image:{number}")
}

fn waiting_state(status: Status) -> Option<WaitingState> {
    match status {
        Status::Pending => waiting("ContainerCreating", ""),
        Status::Refused => waiting("ErrImagePull", REFUSED),
        Status::NotFound => waiting("ErrImagePull", "manifest: not found"),
        Status::Denied => waiting("ErrImagePull", "403 Forbidden"),
        Status::BackOff => waiting("ImagePullBackOff", BACK_OFF),
        Status::NotUnderstood => waiting("ErrImagePull", "a message that no rule matches"),
        Status::Crashing => waiting("CrashLoopBackOff", ""),
        Status::Running => None,
    }
}

/// Takes the indexed element, if there is any.
fn take<T>(from: &mut Vec<T>, index: Index) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(index.index(from.len())))
}

impl Driver {
    pub(super) fn new(options: RecoveryOptions) -> Self {
        Self {
            node: TestNode::with_options(options),
            views: BTreeMap::new(),
            images: BTreeMap::new(),
            opt_in_reads: Vec::new(),
            event_reads: Vec::new(),
            probes: Vec::new(),
            removals: Vec::new(),
            is_listing: false,
            is_measuring: false,
            running: BTreeMap::new(),
            imported: BTreeSet::new(),
            reported: BTreeSet::new(),
            last_started: BTreeMap::new(),
        }
    }

    pub(super) fn apply(&mut self, event: Event) -> Checked {
        match event {
            Event::Apply { pod: number, containers: [(one, first), (two, second)], is_ending } => {
                let containers = vec![
                    container("c", &image(one), waiting_state(first)),
                    container("d", &image(two), waiting_state(second)),
                ];
                self.apply_pod(PodView { containers, is_ending, ..pod(&number.to_string(), "") })
            }
            Event::Delete(number) => self.delete(&name(number)),
            Event::Sync(numbers) => {
                let existing: BTreeSet<_> = numbers.into_iter().map(name).collect();
                self.views.retain(|pod, _| existing.contains(pod));
                self.reported.retain(|(uid, ..)| existing.iter().any(|pod| pod.uid == *uid));
                self.handle(Input::Pod(PodEvent::Synced(existing.into_iter().collect())))
            }
            Event::OptIn(index, answer) => match take(&mut self.opt_in_reads, index) {
                Some(pod) => self.answer_opt_in(pod, answer),
                None => Ok(()),
            },
            Event::KubeletEvents(index, pulls) => match take(&mut self.event_reads, index) {
                Some(pod) => {
                    let message = format!("Pulling image \"{}\"", image(0));
                    let event = KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message };
                    self.handle(Input::KubeletEventsRead { pod, events: pulls.then_some(event).into_iter().collect() })
                }
                None => Ok(()),
            },
            Event::Probe(index, answers) => match take(&mut self.probes, index) {
                Some(registry) => {
                    let result = answers.then_some(()).ok_or(OutageKind::Refused);
                    self.handle(Input::RegistryProbed(RegistryProbe { registry, result }))
                }
                None => Ok(()),
            },
            Event::End(index, end) => {
                let mut running: Vec<_> = self.running.keys().cloned().collect();
                take(&mut running, index).map_or(Ok(()), |reference| self.end(reference, end))
            }
            Event::RemoveRecord(index) => match take(&mut self.removals, index) {
                Some((reference, pods)) => self.handle(Input::RecordRemoved { reference, pods }),
                None => Ok(()),
            },
            Event::Connections(has_ended) => self.end_connections(has_ended),
            Event::Providers(provided) => {
                self.node.facts.provided = provided;
                self.handle(Input::ProvidersChanged)
            }
            Event::KillSwitch(is_on) => {
                self.node.policy.opt_in.kill_switch = is_on;
                self.handle(Input::PolicyChanged)
            }
            Event::Concurrency(number) => {
                self.node.policy.budgets.concurrent_recoveries = number.into();
                self.handle(Input::PolicyChanged)
            }
            Event::ImageRecords(numbers) => {
                let records = numbers.into_iter().map(|number| (image(number), Digest::of(b"image"))).collect();
                self.node.image_records = Arc::new(records);
                self.handle(Input::ImageRecordsChanged)
            }
            Event::Imports => self.handle(Input::ImportsChanged),
            Event::Recording(is_recording) => {
                self.node.facts.recording = is_recording;
                Ok(())
            }
            Event::Tick => self.handle(Input::Tick),
            Event::Wait(milliseconds) => {
                self.node.now += Duration::from_millis(milliseconds);
                Ok(())
            }
            Event::WaitUntilDue => {
                self.node.now = self.node.pods.next_due().map_or(self.node.now, |due| due.max(self.node.now));
                self.handle(Input::Due)?;
                prop_assert!(self.node.pods.next_due().is_none_or(|due| due > self.node.now), "the driver would spin");
                Ok(())
            }
        }
    }

    /// Applies a pod, with the resets of its reports: those of a container that runs, and those of
    /// a whole pod that waits no more.
    fn apply_pod(&mut self, view: PodView) -> Checked {
        let uid = &view.pod.uid;
        let runs = |name: &str| view.containers.iter().any(|c| c.name == name && c.waiting.is_none());
        let waits = !view.is_ending && view.containers.iter().any(|c| waits_for_image(c) || is_pending(c));
        self.reported.retain(|(of, container, _)| of != uid || container.as_deref().map_or(waits, |name| !runs(name)));
        self.views.insert(view.pod.clone(), view.clone());
        let images = view.containers.iter().map(|container| container.image.parse::<Reference>().unwrap());
        self.images.entry(view.pod.clone()).or_default().extend(images);
        self.handle(Input::Pod(PodEvent::Applied(Box::new(view))))
    }

    fn delete(&mut self, pod: &PodRef) -> Checked {
        self.views.remove(pod);
        self.reported.retain(|(uid, ..)| *uid != pod.uid);
        self.handle(Input::Pod(PodEvent::Deleted(pod.clone())))
    }

    fn answer_opt_in(&mut self, pod: PodRef, answer: Answer) -> Checked {
        let result = match answer {
            Answer::Yes => opted_in(),
            Answer::No => Ok(OptInSources { namespace: Arc::new(NamespaceView::default()), owners: None }),
            Answer::Failed => Err("unreachable".into()),
        };
        self.handle(Input::OptInRead { pod, result })
    }

    /// `None` ends a canceled recovery as abandoned, and another recovery without a provider.
    fn end(&mut self, reference: Reference, end: Option<RecoveryEnd>) -> Checked {
        let is_canceled = self.running.remove(&reference).unwrap_or_default();
        let default = if is_canceled { RecoveryEnd::Abandoned } else { RecoveryEnd::NoProvider };
        let mut result = match end.unwrap_or(default) {
            RecoveryEnd::Done if self.node.pods.options.recovery.dry_run => {
                RecoveryResult::DryRun { note: format!("outcome dry run {reference}") }
            }
            RecoveryEnd::Done => recovered(1),
            RecoveryEnd::NoProvider => failed(RecoveryEnd::NoProvider, RecoveryOutcome::NoProvider),
            RecoveryEnd::Failed => failed(RecoveryEnd::Failed, RecoveryOutcome::FetchFailed),
            RecoveryEnd::Final => failed(RecoveryEnd::Final, RecoveryOutcome::Unusable),
            RecoveryEnd::Abandoned => failed(RecoveryEnd::Abandoned, RecoveryOutcome::Abandoned),
        };
        match &mut result {
            RecoveryResult::NotRecovered(failed) => failed.note = format!("{} {reference}", failed.note),
            RecoveryResult::Recovered { .. } => drop(self.imported.insert(reference.clone())),
            RecoveryResult::DryRun { .. } => {}
        }
        self.handle(Input::RecoveryEnded { reference, result })
    }

    fn end_connections(&mut self, has_ended: bool) -> Checked {
        if !std::mem::take(&mut self.is_listing) {
            return Ok(());
        }
        let (local, remote) = ("10.0.0.7:40000".parse().unwrap(), "192.0.2.1:443".parse().unwrap());
        let silent = TcpConnection { local, remote, cookie: 1, silent_for: Duration::from_secs(150), unread: 0 };
        self.handle(Input::ConnectionsEnded(has_ended.then_some(silent).into_iter().collect()))
    }

    fn handle(&mut self, input: Input) -> Checked {
        let is_import = matches!(&input, Input::RecoveryEnded { result: RecoveryResult::Recovered { .. }, .. });
        let is_removal = matches!(&input, Input::RecordRemoved { .. });
        let actions = self.node.handle(input);
        prop_assert!(actions.len() <= MAX_ACTIONS, "{} actions: {actions:?}", actions.len());
        let (mut nudges, mut verdicts, mut verdict_reports) = (BTreeMap::<_, u32>::new(), 0, 0);
        for action in actions {
            match action {
                Action::Nudge(pod) => *nudges.entry(pod).or_default() += 1,
                Action::Report(pod, report) => verdict_reports += self.check_report(&pod, &report)?,
                Action::Observe(Observation::Verdict { pod, subject, verdict }) => {
                    verdicts += usize::from(matches!(verdict, PullVerdict::Report(_)));
                    self.check_verdict(&pod, &subject, &verdict)?;
                }
                other => self.check_work(other)?,
            }
        }
        prop_assert_eq!(verdicts, verdict_reports, "each verdict against a recovery has one Event");
        for (pod, count) in nudges {
            prop_assert!(is_removal || self.views.contains_key(&pod), "{} is gone and is nudged", pod);
            prop_assert!(is_removal || !self.images[&pod].is_disjoint(&self.imported), "{}: no import", pod);
            prop_assert!(count <= if is_import { 1 } else { 2 }, "{count} nudges of {pod}");
        }
        Ok(())
    }

    /// Whether the report follows from a verdict, as a number.
    fn check_report(&mut self, pod: &PodRef, report: &PodReport) -> Result<usize, TestCaseError> {
        let PodReport { kind, note } = report;
        let is_outcome = note.starts_with("outcome");
        let is_repeated = match kind {
            PodReportKind::Failed | PodReportKind::Recovered | PodReportKind::RecordRemoved => true,
            PodReportKind::NotRecoverable | PodReportKind::Unclassified | PodReportKind::Stalled => !is_outcome,
            PodReportKind::NoProvider | PodReportKind::PullEnded | PodReportKind::DryRun => false,
        };
        if !is_repeated {
            let key = if is_outcome { note } else { kind.reason() };
            let is_new = self.reported.insert((pod.uid.clone(), None, key.to_owned()));
            prop_assert!(is_new, "{} is told twice: {}", pod, note);
        }
        let is_about_verdict = is_repeated
            && matches!(kind, PodReportKind::NotRecoverable | PodReportKind::Unclassified | PodReportKind::Stalled);
        Ok(usize::from(is_about_verdict && !note.contains("meanwhile") && !note.contains("verifies")))
    }

    fn check_verdict(&mut self, pod: &PodRef, subject: &Subject, verdict: &PullVerdict) -> Checked {
        let label = match verdict {
            PullVerdict::Recover(..) => "recover",
            PullVerdict::Ignore(reason) => reason.label(),
            PullVerdict::Report(reason) => reason.label(),
        };
        let container = subject.container_name().map(str::to_owned);
        let topic = format!("{label} {}", subject.image().unwrap_or_default());
        prop_assert!(self.reported.insert((pod.uid.clone(), container, topic)), "{subject:?} of {pod} twice: {label}");
        Ok(())
    }

    fn check_work(&mut self, action: Action) -> Checked {
        match action {
            Action::Recover(RecoveryOrder { reference, .. }) => {
                self.last_started.insert(reference.clone(), self.node.now);
                let wants = |pod| self.images[pod].contains(&reference);
                prop_assert!(self.views.keys().any(wants), "no pod wants {}", reference);
                prop_assert!(self.running.insert(reference, false).is_none(), "a recovery runs twice at a time");
            }
            Action::Cancel(reference) => {
                prop_assert_eq!(self.running.insert(reference, true), Some(false), "canceled once, while running");
            }
            Action::ReadOptIn(view) => self.opt_in_reads.push(view.pod),
            Action::ReadKubeletEvents(pod) => self.event_reads.push(pod),
            Action::ProbeRegistry(registry) => self.probes.push(registry),
            Action::RemoveRecord { reference, pods } => self.removals.push((reference, pods)),
            Action::EndConnections { .. } => {
                prop_assert!(!std::mem::replace(&mut self.is_listing, true), "two lists at a time");
            }
            Action::MeasureDisks => {
                prop_assert!(!std::mem::replace(&mut self.is_measuring, true), "two measurements at a time");
            }
            Action::Delete(pod) => prop_assert!(self.reported.insert((pod.uid, None, "deletion".into()))),
            _ => {}
        }
        Ok(())
    }

    /// Answers everything at once for this long: each pod opts in, and no peer has an image.
    pub(super) fn rest(&mut self, duration: Duration) -> Checked {
        let end = self.node.now + duration;
        if self.node.policy.opt_in.kill_switch {
            self.apply(Event::KillSwitch(false))?;
        }
        while self.node.now < end {
            for pod in std::mem::take(&mut self.opt_in_reads) {
                self.answer_opt_in(pod, Answer::Yes)?;
            }
            for pod in std::mem::take(&mut self.event_reads) {
                self.handle(Input::KubeletEventsRead { pod, events: Vec::new() })?;
            }
            for registry in std::mem::take(&mut self.probes) {
                let result = Err(OutageKind::Refused);
                self.handle(Input::RegistryProbed(RegistryProbe { registry, result }))?;
            }
            for reference in self.running.keys().cloned().collect::<Vec<_>>() {
                self.end(reference, None)?;
            }
            self.end_connections(false)?;
            let minute = self.node.now + Duration::from_secs(60);
            self.node.now = self.node.pods.next_due().map_or(minute, |due| due.clamp(self.node.now, minute));
            self.handle(Input::Due)?;
            self.handle(Input::Tick)?;
        }
        Ok(())
    }

    /// Each container with a known cause has a report, or its image had an attempt in the last
    /// hour.
    pub(super) fn check_that_no_pod_is_forgotten(&self) -> Checked {
        for (pod, view) in self.views.iter().filter(|(_, view)| !view.is_ending) {
            for container in view.containers.iter().filter(|container| waits_for_image(container)) {
                let message = &container.waiting.as_ref().unwrap().message;
                let started = self.last_started.get(&container.image.parse().unwrap());
                let is_tried = started.is_some_and(|at| self.node.now - *at < LAST_HOUR);
                let of_container = |(uid, name, topic): &&(String, Option<String>, String)| {
                    *uid == pod.uid && name.as_ref() == Some(&container.name) && !topic.starts_with("recover ")
                };
                let is_reported = self.reported.iter().find(of_container).is_some();
                prop_assert!(message == BACK_OFF || is_tried || is_reported, "{} waits for {container:?}", pod);
            }
        }
        Ok(())
    }

    /// Without pods, every recovery is canceled, and no other starts.
    pub(super) fn remove_all_pods(&mut self) -> Checked {
        for pod in self.views.keys().cloned().collect::<Vec<_>>() {
            self.delete(&pod)?;
        }
        prop_assert!(self.running.values().all(|is_canceled| *is_canceled), "{:?}", self.running);
        self.rest(LAST_HOUR)?;
        prop_assert!(self.running.is_empty() && self.node.pods.running.is_empty());
        prop_assert!(self.node.pods.waiting.is_empty() && self.node.pods.requested_since.is_empty());
        prop_assert!(self.node.pods.undecided.is_empty() && self.node.pods.unprovided_blobs.is_empty());
        Ok(())
    }
}
