//! Errors of the API as RFC 9457 problem details (`application/problem+json`).
//!
//! [`ErrorCode`] is what clients match on and never changes its meaning; `detail` is for people.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Stable kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request does not make sense: a field is missing, unknown or out of range.
    InvalidRequest,
    /// The disk, machine, profile or path does not exist.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The body is larger than the limit.
    TooLarge,
    /// The body is not JSON.
    UnsupportedMediaType,
    /// A thing of that name, socket or store exists already.
    AlreadyExists,
    /// It is in use: a hypervisor is connected, or the configuration owns it.
    InUse,
    /// It cannot be done to this machine or disk, whatever one waits for; the detail says what to change.
    NotPossible,
    /// The backing store cannot be opened or used.
    StoreFailed,
    /// libvirt cannot be reached.
    HypervisorUnavailable,
    /// A part of the daemon that this needs is switched off or degraded.
    Unavailable,
    /// Too many ask for the same; `Retry-After` says when to come again.
    Busy,
    /// No room left.
    NoSpace,
    /// It took too long; a change may still complete.
    Timeout,
    /// A defect of the daemon.
    Internal,
}

impl ErrorCode {
    /// HTTP status it is sent with.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::AlreadyExists | Self::InUse => StatusCode::CONFLICT,
            Self::NotPossible => StatusCode::UNPROCESSABLE_ENTITY,
            Self::StoreFailed => StatusCode::BAD_GATEWAY,
            Self::HypervisorUnavailable | Self::Unavailable | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The same for every problem of this code, as RFC 9457 asks.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid request",
            Self::NotFound => "not found",
            Self::MethodNotAllowed => "method not allowed",
            Self::TooLarge => "request too large",
            Self::UnsupportedMediaType => "unsupported media type",
            Self::AlreadyExists => "already exists",
            Self::InUse => "in use",
            Self::NotPossible => "not possible",
            Self::StoreFailed => "backing store failed",
            Self::HypervisorUnavailable => "libvirt is unavailable",
            Self::Unavailable => "unavailable",
            Self::Busy => "busy",
            Self::NoSpace => "no space left",
            Self::Timeout => "timed out",
            Self::Internal => "internal error",
        }
    }

    /// Part of the problem's `type` URI.
    fn slug(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid-request",
            Self::NotFound => "not-found",
            Self::MethodNotAllowed => "method-not-allowed",
            Self::TooLarge => "too-large",
            Self::UnsupportedMediaType => "unsupported-media-type",
            Self::AlreadyExists => "already-exists",
            Self::InUse => "in-use",
            Self::NotPossible => "not-possible",
            Self::StoreFailed => "store-failed",
            Self::HypervisorUnavailable => "hypervisor-unavailable",
            Self::Unavailable => "unavailable",
            Self::Busy => "busy",
            Self::NoSpace => "no-space",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }
}

/// Why a call failed: a code to match on and a sentence that says what failed, on what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct ApiError {
    pub code: ErrorCode,
    pub detail: String,
}

impl ApiError {
    #[must_use]
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }

    #[must_use]
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, detail)
    }

    #[must_use]
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, detail)
    }

    #[must_use]
    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, detail)
    }

    /// The wire form; `instance` is the path asked for.
    #[must_use]
    pub fn to_problem(&self, instance: Option<String>) -> Problem {
        Problem {
            problem_type: format!("urn:prestage:problem:{}", self.code.slug()),
            title: self.code.title().to_owned(),
            status: self.code.status().as_u16(),
            detail: self.detail.clone(),
            instance,
            code: self.code,
        }
    }
}

/// RFC 9457 problem details.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:prestage:problem:<code>`.
    #[serde(rename = "type")]
    pub problem_type: String,
    pub title: String,
    pub status: u16,
    /// What failed, on what, and what to do.
    pub detail: String,
    /// Path asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    pub code: ErrorCode,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Plain strings and numbers only: serialising them cannot fail.
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let kind = HeaderValue::from_static("application/problem+json");
        let mut response = (status, [(header::CONTENT_TYPE, kind)], body).into_response();
        if self.code == ErrorCode::Busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.to_problem(None).into_response();
        // For the layer around all routes, which adds the path and logs it.
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_told_that_it_is_busy_is_told_when_to_come_again() {
        let response = ApiError::new(ErrorCode::Busy, "32 wait already").into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers().get(header::RETRY_AFTER), Some(&HeaderValue::from_static("1")));
        let response = ApiError::new(ErrorCode::Unavailable, "no").into_response();
        assert_eq!(response.headers().get(header::RETRY_AFTER), None);
    }
}
