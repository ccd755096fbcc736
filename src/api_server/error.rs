//! One request to the API server, with a timeout, and its errors by what a caller can do.

use std::error::Error;
use std::time::Duration;

use kube::core::Status;

use crate::ports::{ClaimError, ClusterError};

/// Timeout of a request: long enough for an API server that starts or is busy, short enough that an
/// unreachable API server does not delay a recovery.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes of an error text of the API server. Admission webhooks write texts of any length.
const MAX_TEXT: usize = 512;

#[derive(Debug, Clone)]
pub(crate) enum ApiError {
    /// No answer, or a status that allows a retry.
    Unavailable(String),
    /// The API server answers, and a required admission webhook of the cluster does not.
    Webhook(String),
    /// The object, or its namespace, is gone or terminating.
    NotFound(String),
    /// The object changed since the read, or exists already.
    Conflict(String),
    /// Another object has the name: its UID differs from the UID in the request.
    Replaced(String),
    /// The resulting object would be invalid.
    Invalid(String),
    /// The agent lacks a right; the text names the right.
    Forbidden(String),
    /// Any other error.
    Other(String),
}

/// Awaits an answer for at most `limit`.
pub(crate) async fn call<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer.map_err(ApiError::from),
        Err(_) => Err(ApiError::Unavailable(format!("no answer within {} s", limit.as_secs()))),
    }
}

impl From<kube::Error> for ApiError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::from_status(&status),
            kube::Error::HyperError(_) | kube::Error::Service(_) => Self::Unavailable(error_chain(&error)),
            other => Self::Other(error_chain(&other)),
        }
    }
}

impl ApiError {
    fn from_status(status: &Status) -> Self {
        let text = truncate(&status.message, MAX_TEXT).to_owned();
        let causes = || status.details.iter().flat_map(|details| &details.causes);
        // The API server answers 403 to a creation in a namespace that is being deleted.
        if causes().any(|cause| cause.reason == "NamespaceTerminating") {
            return Self::NotFound(text);
        }
        match status.code {
            // The field decides, not the text: admission policies answer 422 too, with any text.
            422 if causes().any(|cause| cause.field == "metadata.uid") => Self::Replaced(text),
            404 => Self::NotFound(text),
            409 => Self::Conflict(text),
            422 => Self::Invalid(text),
            401 | 403 => Self::Forbidden(text),
            // For a webhook with `failurePolicy: Fail` that cannot be called, the API server
            // answers 500 with this text alone (apiserver/pkg/admission/plugin/webhook/errors).
            500..=599 if text.contains("failed calling webhook") => Self::Webhook(text),
            408 | 429 | 500..=599 => Self::Unavailable(text),
            _ => Self::Other(text),
        }
    }

    /// The error of the port; `what` names the object of the request.
    pub(crate) fn into_cluster_error(self, what: &str) -> ClusterError {
        match self {
            // Other writers changed the object so often that the API server gave up; a retry may
            // succeed.
            Self::Unavailable(text) | Self::Conflict(text) => ClusterError::Unavailable(text),
            Self::Webhook(text) => ClusterError::Webhook(text),
            Self::NotFound(_) | Self::Replaced(_) => ClusterError::Gone(what.to_owned()),
            Self::Forbidden(text) => ClusterError::Forbidden(text),
            Self::Invalid(text) | Self::Other(text) => ClusterError::Other(text),
        }
    }
}

impl From<ApiError> for ClaimError {
    /// A conflict comes from the fence of the update. A missing Lease was deleted by another agent.
    fn from(failure: ApiError) -> Self {
        match failure {
            ApiError::Conflict(_) | ApiError::NotFound(_) | ApiError::Replaced(_) => Self::Lost,
            ApiError::Unavailable(text)
            | ApiError::Webhook(text)
            | ApiError::Forbidden(text)
            | ApiError::Invalid(text)
            | ApiError::Other(text) => Self::Unavailable(text),
        }
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unavailable(text)
            | Self::Webhook(text)
            | Self::NotFound(text)
            | Self::Conflict(text)
            | Self::Replaced(text)
            | Self::Invalid(text)
            | Self::Forbidden(text)
            | Self::Other(text) => f.write_str(text),
        }
    }
}

/// An error with its causes: "ServiceError: client error (Connect)" alone does not name the fault.
pub(crate) fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next.filter(|_| text.len() < MAX_TEXT) {
        let cause_text = cause.to_string();
        // Many errors contain the text of their cause already.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    truncate(&text, MAX_TEXT).to_owned()
}

/// At most `most` bytes of the text, cut between characters.
pub(crate) fn truncate(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Whether the text is a valid object name (RFC 1123 subdomain). References in pods can contain any
/// text, and kube inserts the text into the URL's path unchanged.
pub(crate) fn is_object_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(is_allowed)
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_name_cannot_address_another_object() {
        for name in ["web", "web-7d9f", "0.a-b.c", &"x".repeat(253)] {
            assert!(is_object_name(name), "{name}");
        }
        for name in
            ["", ".", "..", "a/b", "a?b", "a%2fb", "a..b", "-a", "a-", "a.-b", "A", "ä", "a b", &"x".repeat(254)]
        {
            assert!(!is_object_name(name), "{name}");
        }
    }

    #[test]
    fn a_text_is_truncated_between_characters() {
        assert_eq!(truncate("größe", 5), "grö");
        assert_eq!(truncate("größe", 4), "grö");
        assert_eq!(truncate("größe", 3), "gr");
        assert_eq!(truncate("größe", 99), "größe");
        assert_eq!(truncate("é", 1), "");
    }

    #[test]
    fn a_status_code_decides_whether_the_error_is_retryable() {
        let error = |code| {
            ApiError::from_status(&Status::failure("why", "reason").with_code(code)).into_cluster_error("pod a/b")
        };
        for code in [408, 409, 429, 500, 503, 504] {
            assert!(error(code).is_retryable(), "{code}");
        }
        assert!(matches!(error(404), ClusterError::Gone(what) if what == "pod a/b"));
        assert!(matches!(error(403), ClusterError::Forbidden(text) if text == "why"));
        assert!(matches!(error(401), ClusterError::Forbidden(_)));
        assert!(matches!(error(422), ClusterError::Other(_)));
    }

    #[test]
    fn a_failing_admission_webhook_is_not_reported_as_an_unavailable_api_server() {
        let text = "Internal error occurred: failed calling webhook \"policy.example\": failed to call webhook: no endpoints available";
        let error =
            ApiError::from_status(&Status::failure(text, "InternalError").with_code(500)).into_cluster_error("pod a/b");
        assert!(error.is_retryable());
        assert!(error.to_string().starts_with("an admission webhook"), "{error}");
        assert!(!error.to_string().contains("cannot be reached"), "{error}");
    }

    #[test]
    fn an_invalid_uid_means_a_replaced_object_and_other_invalid_fields_do_not() {
        let error = |message: &str, field: &str| {
            let causes = json!([{ "reason": "FieldValueInvalid", "message": message, "field": field }]);
            let status = json!({ "code": 422, "message": message, "details": { "causes": causes } });
            ApiError::from_status(&serde_json::from_value(status).unwrap()).into_cluster_error("pod a/b")
        };
        assert!(matches!(error("field is immutable", "metadata.uid"), ClusterError::Gone(_)));
        assert!(matches!(error("field is immutable", "metadata.name"), ClusterError::Other(_)));
        let denied = "ValidatingAdmissionPolicy 'audit' denied request: no agent sends a metadata.uid";
        assert!(matches!(error(denied, ""), ClusterError::Other(text) if text == denied));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_a_response_times_out() {
        let silent = std::future::pending::<Result<(), kube::Error>>();
        assert!(matches!(call(REQUEST_TIMEOUT, silent).await, Err(ApiError::Unavailable(_))));
    }
}
