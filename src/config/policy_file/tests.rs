//! The fields of a policy file, and the errors for wrong files.

use super::*;
use crate::decide::policy::Budgets;

fn flags() -> Policy {
    Policy::default()
}

#[test]
fn every_field_of_the_policy_file_replaces_its_flag() {
    let text = r#"
# For the maintenance of Friday night.
killSwitch: true
deniedNamespaces: [kube-system, "007"]
deniedNamespaceSelector: tier=system
allowedNamespaceSelector: "lighterman.dev/cni in (calico, cilium)"
recoverOn:
  - unavailable
  - denied
concurrentRecoveries: 3
concurrentBlobs: 8
maxImageBytes: 20Gi
minFreeBytes: 4294967296
imageGcPercent: 90
evictionPercent: 10
maxDownloadRate: 50Mi
maxUploadRate: 100M
"#;
    let overrides = PolicyOverrides::parse(text).unwrap();
    let policy = overrides.apply(&flags());
    assert!(policy.opt_in.kill_switch);
    assert_eq!(policy.opt_in.denied_k8s_namespaces, ["007".to_owned(), "kube-system".to_owned()].into());
    let budgets = Budgets {
        concurrent_recoveries: 3,
        concurrent_blobs: 8,
        max_image_bytes: 20 << 30,
        min_free_bytes: 4 << 30,
        image_gc_percent: 90,
        eviction_percent: 10,
        max_download_rate: 50 << 20,
        max_upload_rate: 100_000_000,
    };
    assert_eq!(policy.budgets, budgets);
    assert_eq!(overrides.denied_namespace_selector, "tier=system".parse().ok());
    assert_eq!(overrides.allowed_namespace_selector, "lighterman.dev/cni in (calico, cilium)".parse().ok());
    assert_eq!(overrides.recover_on, Some([Trigger::Unavailable, Trigger::Denied].into()));
    let shown: Vec<_> = overrides.settings().into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
    assert_eq!(shown[1], "deniedNamespaces: [007, kube-system]");
    assert_eq!(shown[7..9], ["maxImageBytes: 20Gi", "minFreeBytes: 4Gi"]);
    assert_eq!(shown[9..11], ["imageGcPercent: 90", "evictionPercent: 10"]);
    assert_eq!(shown.len(), 13);
}

#[test]
fn absent_fields_leave_the_flags_in_force() {
    for text in ["", "\n\n", "# nothing yet\n", "---\n", "{}", "killSwitch:\n", "\u{feff}"] {
        assert_eq!(PolicyOverrides::parse(text), Ok(PolicyOverrides::default()), "{text:?}");
    }
    assert_eq!(PolicyOverrides::default().apply(&flags()), flags());
    let policy = PolicyOverrides::parse("concurrentBlobs: 1").unwrap().apply(&flags());
    assert_eq!(policy.budgets, Budgets { concurrent_blobs: 1, ..flags().budgets });
    assert_eq!(policy.opt_in, flags().opt_in);
    let nothing_denied = PolicyOverrides::parse("deniedNamespaces: []").unwrap().apply(&flags());
    assert!(nothing_denied.opt_in.denied_k8s_namespaces.is_empty());
}

#[test]
fn an_error_names_its_position_and_the_allowed_values() {
    for (text, line, column, expected) in [
        ("killSwitch: true\nkillSwich: true\n", 2, 1, "killSwich"),
        ("# x\nkillSwitch: true\nkillSwitch: false\n", 3, 1, "killSwitch is set a second time"),
        ("\nkillSwitch: yes\n", 2, 13, "true or false"),
        ("killSwitch: [true]\n", 1, 13, "true or false"),
        ("concurrentBlobs: 1\nconcurrentRecoveries: 0\n", 2, 23, "from 1 to 256"),
        ("concurrentRecoveries: two", 1, 23, "from 1 to 256"),
        ("concurrentBlobs: 257", 1, 18, "from 1 to 256"),
        ("maxImageBytes: -1", 1, 16, "a negative number is given"),
        ("maxImageBytes: 1.5", 1, 16, "a fraction"),
        ("maxDownloadRate: 50 MB/s", 1, 18, "50Mi"),
        ("maxUploadRate: 99999999999999999999", 1, 16, "whole number of bytes"),
        ("minFreeBytes: {a: 1}", 1, 15, "a mapping is given"),
        ("imageGcPercent: 101", 1, 17, "from 0 to 100"),
        ("evictionPercent: 91", 1, 18, "from 0 to 90"),
        ("recoverOn: []", 1, 12, "bad-bytes, storage-denied, proxy, denied, never"),
        ("recoverOn: denied", 1, 12, "a list"),
        ("recoverOn:\n  - unavailable\n  - notfound\n", 3, 5, "not-found"),
        ("deniedNamespaces: kube-system", 1, 19, "a list of namespaces"),
        ("deniedNamespaces:\n  - kube-system\n  - 7\n", 3, 5, "in quotes"),
        ("deniedNamespaces: [Kube]", 1, 20, "a-z"),
        ("deniedNamespaces: [a, ]\nallowedNamespaceSelector: ''\n", 2, 27, "a label selector"),
        ("killSwitch: true\n  oops", 1, 13, "true oops"),
        ("killSwitch: true\n---\nkillSwitch: false\n", 2, 1, "one document"),
        ("- killSwitch\n", 1, 1, "killSwitch: true"),
        ("<html>", 1, 1, "killSwitch: true"),
        ("recoverOn: &a [denied]\n", 1, 15, "no anchors"),
    ] {
        let error = PolicyOverrides::parse(text).expect_err(text);
        assert!(!error.reason.is_empty() && !error.reason.contains('\n'), "{error}");
        assert_eq!((error.line, error.column), (line, column), "{text:?}: {error}");
        assert!(error.reason.contains(expected), "{text:?}: {error}");
    }
}

#[test]
fn the_error_for_an_unknown_field_lists_the_known_fields() {
    let error = PolicyOverrides::parse("maxUpload: 1").unwrap_err();
    assert!(error.reason.contains("maxUploadRate"), "{error}");
}

#[test]
fn yaml_bombs_are_rejected_before_expansion() {
    let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b]\n";
    let deep = format!("recoverOn: {}", "[".repeat(100_000));
    let many = format!("deniedNamespaces: [{}]", "a,".repeat(MAX_NODES));
    let long = format!("#{}", " ".repeat(MAX_BYTES));
    let merged = "x: &x {killSwitch: true}\n<<: *x\n";
    for text in [bomb, &deep, &many, &long, merged] {
        assert!(PolicyOverrides::parse(text).is_err(), "{}", text.chars().take(40).collect::<String>());
    }
}

#[test]
fn invalid_utf_8_is_reported_with_its_position() {
    let error = PolicyOverrides::parse_bytes(b"killSwitch: true\n# caf\xe9\n").unwrap_err();
    assert_eq!((error.line, error.column, error.reason.as_str()), (2, 6, "not UTF-8"));
}

proptest::proptest! {
    #[test]
    fn any_policy_file_is_read_or_rejected_without_a_panic(text in "((killSwitch|recoverOn|maxImageBytes|x): ?[\\[\\]{}&*a-z0-9\"'!|>-]{0,12}\n){0,4}|.{0,80}") {
        if let Err(error) = PolicyOverrides::parse(&text) {
            proptest::prop_assert!(error.line >= 1 && error.column >= 1 && !error.reason.is_empty());
        }
    }
}
