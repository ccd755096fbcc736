use super::*;
use crate::model::{Owner, PodRef};

fn map(pairs: &[(&str, &str)]) -> Annotations {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn pod(k8s_namespace: &str, annotations: &[(&str, &str)]) -> PodView {
    PodView {
        pod: PodRef { k8s_namespace: k8s_namespace.into(), name: "p".into(), uid: "u".into() },
        annotations: map(annotations),
        containers: Vec::new(),
        image_volumes: Vec::new(),
        owner: None,
        is_static: false,
        priority: 7,
        pull_secrets: Vec::new(),
        is_ending: false,
    }
}

fn policy() -> OptInPolicy {
    OptInPolicy {
        kill_switch: false,
        annotation_prefixes: vec!["lighterman.dev".into(), "tote.dev".into()],
        denied_k8s_namespaces: ["kube-system".to_owned()].into(),
        denied_selector: None,
        allowed_selector: None,
        recover_on: [Trigger::Unavailable].into(),
        require_repositories: false,
    }
}

const ALLOW_ANNOTATION: (&str, &str) = ("lighterman.dev/allow", "true");
const RECOVER_ANNOTATION: (&str, &str) = ("lighterman.dev/recover", "true");
const YES: OptIn = OptIn::Yes { on_denied: false, repositories: RepositoryList::Any };

fn evaluate(policy: &OptInPolicy, pod: &PodView, namespace: &[(&str, &str)]) -> (OptIn, Vec<InvalidAnnotation>) {
    let mut invalid = Vec::new();
    (policy.evaluate(pod, &map(&[]), &map(namespace), None, &mut invalid), invalid)
}

#[test]
fn both_the_namespace_and_the_pod_must_opt_in_with_exactly_true() {
    let verdict = |namespace: &[(&str, &str)], annotations: &[(&str, &str)]| {
        let (opt_in, invalid) = evaluate(&policy(), &pod("shop", annotations), namespace);
        (opt_in, invalid.len())
    };
    let no = OptIn::No(OptOutReason::NotOptedIn);
    assert_eq!(verdict(&[ALLOW_ANNOTATION], &[RECOVER_ANNOTATION]), (YES, 0));
    assert_eq!(verdict(&[], &[RECOVER_ANNOTATION]), (no.clone(), 0));
    assert_eq!(verdict(&[ALLOW_ANNOTATION], &[]), (no.clone(), 0));
    assert_eq!(verdict(&[ALLOW_ANNOTATION], &[("lighterman.dev/recover", "false")]), (no.clone(), 0));
    for wrong in ["True", "yes", "1", "", " true"] {
        assert_eq!(verdict(&[("lighterman.dev/allow", wrong)], &[RECOVER_ANNOTATION]), (no.clone(), 1), "{wrong:?}");
        assert_eq!(verdict(&[ALLOW_ANNOTATION], &[("lighterman.dev/recover", wrong)]), (no.clone(), 1), "{wrong:?}");
    }
}

#[test]
fn annotations_with_a_prefix_of_another_tool_are_accepted() {
    let theirs = pod("shop", &[("tote.dev/recover", "true")]);
    assert_eq!(evaluate(&policy(), &theirs, &[("tote.dev/allow", "true")]).0, YES);
    let both = [("tote.dev/allow", "true"), ("lighterman.dev/allow", "false")];
    assert_eq!(evaluate(&policy(), &theirs, &both).0, OptIn::No(OptOutReason::NotOptedIn), "the first prefix counts");
}

#[test]
fn the_name_auto_salvage_is_accepted_under_every_prefix_and_the_name_recover_counts_first() {
    let namespace = [ALLOW_ANNOTATION];
    let opt_in = |annotations: &[(&str, &str)]| evaluate(&policy(), &pod("shop", annotations), &namespace).0;
    let no = OptIn::No(OptOutReason::NotOptedIn);
    assert_eq!(opt_in(&[("tote.dev/auto-salvage", "true")]), YES);
    assert_eq!(opt_in(&[("lighterman.dev/auto-salvage", "true")]), YES);
    assert_eq!(opt_in(&[("lighterman.dev/auto-salvage", "false")]), no);
    assert_eq!(opt_in(&[("lighterman.dev/recover", "false"), ("lighterman.dev/auto-salvage", "true")]), no);
    assert_eq!(
        opt_in(&[("lighterman.dev/auto-salvage", "false"), ("tote.dev/recover", "true")]),
        no,
        "the first prefix"
    );
    assert_eq!(opt_in(&[("other.dev/auto-salvage", "true")]), no, "the prefix is not in the policy");
}

#[test]
fn the_owner_of_a_pod_may_opt_in_by_the_name_auto_salvage() {
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "r".into(), uid: "u".into() };
    let pod = PodView { owner: Some(owner), ..pod("shop", &[]) };
    let owners = map(&[("tote.dev/auto-salvage", "true")]);
    let opt_in = policy().evaluate(&pod, &map(&[]), &map(&[ALLOW_ANNOTATION]), Some(&[&owners]), &mut Vec::new());
    assert_eq!(opt_in, YES);
}

#[test]
fn the_kill_switch_denied_namespaces_and_the_ignore_annotation_of_the_pod_come_first() {
    let verdict = |policy: &OptInPolicy, pod: &PodView| evaluate(policy, pod, &[ALLOW_ANNOTATION]).0;
    let off = OptInPolicy { kill_switch: true, ..policy() };
    assert_eq!(verdict(&off, &pod("shop", &[RECOVER_ANNOTATION])), OptIn::No(OptOutReason::KillSwitch));
    assert_eq!(
        verdict(&policy(), &pod("kube-system", &[RECOVER_ANNOTATION])),
        OptIn::No(OptOutReason::DeniedNamespace)
    );
    for value in ["true", "yes", ""] {
        let ignored = pod("shop", &[RECOVER_ANNOTATION, ("lighterman.dev/ignore", value)]);
        assert_eq!(verdict(&policy(), &ignored), OptIn::No(OptOutReason::Ignored), "{value:?}");
    }
    assert_eq!(verdict(&policy(), &pod("shop", &[RECOVER_ANNOTATION, ("lighterman.dev/ignore", "false")])), YES);
}

#[test]
fn a_denied_namespace_can_be_allowed_by_its_labels_and_others_denied_by_theirs() {
    let policy = OptInPolicy {
        denied_selector: Some("tier=secret".parse().unwrap()),
        allowed_selector: Some("component=cni".parse().unwrap()),
        ..policy()
    };
    let verdict = |name: &str, labels: &[(&str, &str)]| {
        policy.evaluate(
            &pod(name, &[RECOVER_ANNOTATION]),
            &map(labels),
            &map(&[ALLOW_ANNOTATION]),
            None,
            &mut Vec::new(),
        )
    };
    let denied = OptIn::No(OptOutReason::DeniedNamespace);
    assert_eq!(verdict("kube-system", &[]), denied);
    assert_eq!(verdict("kube-system", &[("component", "cni")]), YES);
    assert_eq!(verdict("shop", &[("tier", "secret")]), denied);
    assert_eq!(verdict("shop", &[("tier", "secret"), ("component", "cni")]), YES);
}

#[test]
fn owners_are_read_only_for_a_pod_without_annotation_and_the_nearest_annotated_owner_decides() {
    let owner =
        Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web-1".into(), uid: "o".into() };
    let owned = |annotations: &[(&str, &str)]| PodView { owner: Some(owner.clone()), ..pod("shop", annotations) };
    let verdict = |pod: &PodView, owners: Option<&[&Annotations]>| {
        policy().evaluate(pod, &map(&[]), &map(&[ALLOW_ANNOTATION]), owners, &mut Vec::new())
    };
    let (silent, yes, no) = (map(&[]), map(&[RECOVER_ANNOTATION]), map(&[("lighterman.dev/recover", "false")]));
    assert_eq!(verdict(&owned(&[]), None), OptIn::NeedsOwners);
    assert_eq!(verdict(&owned(&[RECOVER_ANNOTATION]), None), YES);
    assert_eq!(verdict(&owned(&[("lighterman.dev/recover", "false")]), None), OptIn::No(OptOutReason::NotOptedIn));
    assert_eq!(verdict(&owned(&[]), Some(&[&silent, &yes])), YES);
    assert_eq!(verdict(&owned(&[]), Some(&[&no, &yes])), OptIn::No(OptOutReason::NotOptedIn));
    assert_eq!(verdict(&owned(&[]), Some(&[])), OptIn::No(OptOutReason::NotOptedIn));
    let unallowed = policy().evaluate(&owned(&[]), &map(&[]), &map(&[]), None, &mut Vec::new());
    assert_eq!(unallowed, OptIn::No(OptOutReason::NotOptedIn), "owners are not read for a namespace without opt-in");
}

#[test]
fn a_denial_is_ignored_where_the_namespace_or_the_policy_says_so() {
    let namespace = [ALLOW_ANNOTATION, ("lighterman.dev/recover-on-denied", "true")];
    let on_denied = OptIn::Yes { on_denied: true, repositories: RepositoryList::Any };
    assert_eq!(evaluate(&policy(), &pod("shop", &[RECOVER_ANNOTATION]), &namespace).0, on_denied);
    let everywhere = OptInPolicy { recover_on: Trigger::ALL.into(), ..policy() };
    assert_eq!(evaluate(&everywhere, &pod("shop", &[RECOVER_ANNOTATION]), &[ALLOW_ANNOTATION]).0, on_denied);
}

#[test]
fn a_namespace_may_list_repositories_and_a_policy_may_require_the_list() {
    let list = |policy: &OptInPolicy, namespace: &[(&str, &str)]| match evaluate(
        policy,
        &pod("shop", &[RECOVER_ANNOTATION]),
        namespace,
    ) {
        (OptIn::Yes { repositories, .. }, invalid) => (repositories, invalid.len()),
        (other, _) => panic!("{other:?}"),
    };
    let strict = OptInPolicy { require_repositories: true, ..policy() };
    let listed = ("tote.dev/repositories", "r.test/shop/*");
    let unreadable = ("lighterman.dev/repositories", "r.test/shop/*,shop web");
    let shop = RepositoryList::parse("r.test/shop/*").unwrap();
    assert_eq!(list(&policy(), &[ALLOW_ANNOTATION]), (RepositoryList::Any, 0));
    assert_eq!(list(&strict, &[ALLOW_ANNOTATION]), (RepositoryList::none(), 0));
    assert_eq!(list(&policy(), &[ALLOW_ANNOTATION, listed]), (shop.clone(), 0));
    assert_eq!(list(&strict, &[ALLOW_ANNOTATION, listed]), (shop, 0));
    assert_eq!(
        list(&policy(), &[ALLOW_ANNOTATION, unreadable]),
        (RepositoryList::none(), 1),
        "an invalid list permits nothing"
    );
}

#[test]
fn a_pods_priority_is_its_annotations_or_its_classes() {
    let mut invalid = Vec::new();
    let mut priority = |annotations: &[(&str, &str)]| policy().priority(&pod("shop", annotations), &mut invalid);
    assert_eq!(priority(&[]), 7);
    assert_eq!(priority(&[("lighterman.dev/priority", "-3")]), -3);
    assert_eq!(priority(&[("lighterman.dev/priority", "high")]), 7);
    assert_eq!(invalid, [InvalidAnnotation { key: "lighterman.dev/priority".into(), value: "high".into() }]);
}

#[test]
fn triggers_are_read_by_their_names() {
    for trigger in Trigger::ALL {
        assert_eq!(trigger.name().parse(), Ok(trigger));
    }
    assert!("Denied".parse::<Trigger>().unwrap_err().contains("not-found"));
}
