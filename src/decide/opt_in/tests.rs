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
        ending: false,
    }
}

fn policy() -> Policy {
    Policy {
        kill_switch: false,
        annotation_prefixes: vec!["lighterman.dev".into(), "tote.dev".into()],
        denied_k8s_namespaces: ["kube-system".to_owned()].into(),
        denied_selector: None,
        allowed_selector: None,
        salvage_on: [Trigger::Unavailable].into(),
        require_repositories: false,
    }
}

const ALLOW_IT: (&str, &str) = ("lighterman.dev/allow", "true");
const SALVAGE: (&str, &str) = ("lighterman.dev/auto-salvage", "true");
const YES: OptIn = OptIn::Yes { on_denied: false, repositories: RepositoryList::Any };

fn asked(policy: &Policy, pod: &PodView, namespace: &[(&str, &str)]) -> (OptIn, Vec<OddAnnotation>) {
    let mut odd = Vec::new();
    (policy.opt_in(pod, &map(&[]), &map(namespace), None, &mut odd), odd)
}

#[test]
fn both_the_namespace_and_the_pod_must_opt_in_with_exactly_true() {
    let verdict = |namespace: &[(&str, &str)], annotations: &[(&str, &str)]| {
        let (opt_in, odd) = asked(&policy(), &pod("shop", annotations), namespace);
        (opt_in, odd.len())
    };
    let no = OptIn::No(NotHelped::NotOptedIn);
    assert_eq!(verdict(&[ALLOW_IT], &[SALVAGE]), (YES, 0));
    assert_eq!(verdict(&[], &[SALVAGE]), (no.clone(), 0));
    assert_eq!(verdict(&[ALLOW_IT], &[]), (no.clone(), 0));
    assert_eq!(verdict(&[ALLOW_IT], &[("lighterman.dev/auto-salvage", "false")]), (no.clone(), 0));
    for wrong in ["True", "yes", "1", "", " true"] {
        assert_eq!(verdict(&[("lighterman.dev/allow", wrong)], &[SALVAGE]), (no.clone(), 1), "{wrong:?}");
        assert_eq!(verdict(&[ALLOW_IT], &[("lighterman.dev/auto-salvage", wrong)]), (no.clone(), 1), "{wrong:?}");
    }
}

#[test]
fn people_who_come_from_elsewhere_keep_their_annotations() {
    let theirs = pod("shop", &[("tote.dev/auto-salvage", "true")]);
    assert_eq!(asked(&policy(), &theirs, &[("tote.dev/allow", "true")]).0, YES);
    let both = [("tote.dev/allow", "true"), ("lighterman.dev/allow", "false")];
    assert_eq!(asked(&policy(), &theirs, &both).0, OptIn::No(NotHelped::NotOptedIn), "the first prefix counts");
}

#[test]
fn the_kill_switch_denied_namespaces_and_the_pods_own_no_come_first() {
    let verdict = |policy: &Policy, pod: &PodView| asked(policy, pod, &[ALLOW_IT]).0;
    let off = Policy { kill_switch: true, ..policy() };
    assert_eq!(verdict(&off, &pod("shop", &[SALVAGE])), OptIn::No(NotHelped::KillSwitch));
    assert_eq!(verdict(&policy(), &pod("kube-system", &[SALVAGE])), OptIn::No(NotHelped::DeniedNamespace));
    for value in ["true", "yes", ""] {
        let ignored = pod("shop", &[SALVAGE, ("lighterman.dev/ignore", value)]);
        assert_eq!(verdict(&policy(), &ignored), OptIn::No(NotHelped::Ignored), "{value:?}");
    }
    assert_eq!(verdict(&policy(), &pod("shop", &[SALVAGE, ("lighterman.dev/ignore", "false")])), YES);
}

#[test]
fn a_denied_namespace_can_be_allowed_by_its_labels_and_others_denied_by_theirs() {
    let policy = Policy {
        denied_selector: Some("tier=secret".parse().unwrap()),
        allowed_selector: Some("component=cni".parse().unwrap()),
        ..policy()
    };
    let verdict = |name: &str, labels: &[(&str, &str)]| {
        policy.opt_in(&pod(name, &[SALVAGE]), &map(labels), &map(&[ALLOW_IT]), None, &mut Vec::new())
    };
    let denied = OptIn::No(NotHelped::DeniedNamespace);
    assert_eq!(verdict("kube-system", &[]), denied);
    assert_eq!(verdict("kube-system", &[("component", "cni")]), YES);
    assert_eq!(verdict("shop", &[("tier", "secret")]), denied);
    assert_eq!(verdict("shop", &[("tier", "secret"), ("component", "cni")]), YES);
}

#[test]
fn owners_are_asked_only_where_the_pod_says_nothing_and_the_nearest_that_speaks_decides() {
    let owner =
        Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web-1".into(), uid: "o".into() };
    let owned = |annotations: &[(&str, &str)]| PodView { owner: Some(owner.clone()), ..pod("shop", annotations) };
    let verdict = |pod: &PodView, owners: Option<&[&Annotations]>| {
        policy().opt_in(pod, &map(&[]), &map(&[ALLOW_IT]), owners, &mut Vec::new())
    };
    let (silent, yes, no) = (map(&[]), map(&[SALVAGE]), map(&[("lighterman.dev/auto-salvage", "false")]));
    assert_eq!(verdict(&owned(&[]), None), OptIn::AskOwners);
    assert_eq!(verdict(&owned(&[SALVAGE]), None), YES);
    assert_eq!(verdict(&owned(&[("lighterman.dev/auto-salvage", "false")]), None), OptIn::No(NotHelped::NotOptedIn));
    assert_eq!(verdict(&owned(&[]), Some(&[&silent, &yes])), YES);
    assert_eq!(verdict(&owned(&[]), Some(&[&no, &yes])), OptIn::No(NotHelped::NotOptedIn));
    assert_eq!(verdict(&owned(&[]), Some(&[])), OptIn::No(NotHelped::NotOptedIn));
    let unallowed = policy().opt_in(&owned(&[]), &map(&[]), &map(&[]), None, &mut Vec::new());
    assert_eq!(unallowed, OptIn::No(NotHelped::NotOptedIn), "nobody is asked for a namespace that did not allow it");
}

#[test]
fn a_denial_is_ignored_where_the_namespace_or_the_rules_say_so() {
    let namespace = [ALLOW_IT, ("lighterman.dev/salvage-on-denied", "true")];
    let on_denied = OptIn::Yes { on_denied: true, repositories: RepositoryList::Any };
    assert_eq!(asked(&policy(), &pod("shop", &[SALVAGE]), &namespace).0, on_denied);
    let everywhere = Policy { salvage_on: Trigger::ALL.into(), ..policy() };
    assert_eq!(asked(&everywhere, &pod("shop", &[SALVAGE]), &[ALLOW_IT]).0, on_denied);
}

#[test]
fn a_namespace_may_list_repositories_and_a_policy_may_require_the_list() {
    let list = |policy: &Policy, namespace: &[(&str, &str)]| match asked(policy, &pod("shop", &[SALVAGE]), namespace) {
        (OptIn::Yes { repositories, .. }, odd) => (repositories, odd.len()),
        (other, _) => panic!("{other:?}"),
    };
    let strict = Policy { require_repositories: true, ..policy() };
    let listed = ("tote.dev/repositories", "r.test/shop/*");
    let unreadable = ("lighterman.dev/repositories", "r.test/shop/*,shop web");
    let shop = RepositoryList::parse("r.test/shop/*").unwrap();
    assert_eq!(list(&policy(), &[ALLOW_IT]), (RepositoryList::Any, 0));
    assert_eq!(list(&strict, &[ALLOW_IT]), (RepositoryList::none(), 0));
    assert_eq!(list(&policy(), &[ALLOW_IT, listed]), (shop.clone(), 0));
    assert_eq!(list(&strict, &[ALLOW_IT, listed]), (shop, 0));
    assert_eq!(list(&policy(), &[ALLOW_IT, unreadable]), (RepositoryList::none(), 1), "a mistake permits nothing");
}

#[test]
fn a_pods_priority_is_its_annotations_or_its_classes() {
    let mut odd = Vec::new();
    let mut priority = |annotations: &[(&str, &str)]| policy().priority(&pod("shop", annotations), &mut odd);
    assert_eq!(priority(&[]), 7);
    assert_eq!(priority(&[("lighterman.dev/priority", "-3")]), -3);
    assert_eq!(priority(&[("lighterman.dev/priority", "high")]), 7);
    assert_eq!(odd, [OddAnnotation { key: "lighterman.dev/priority".into(), value: "high".into() }]);
}

#[test]
fn triggers_are_read_by_their_names() {
    for trigger in Trigger::ALL {
        assert_eq!(trigger.name().parse(), Ok(trigger));
    }
    assert!("Denied".parse::<Trigger>().unwrap_err().contains("not-found"));
}
