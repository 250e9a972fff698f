//! Bodies of requests: bytes in, what they ask for out.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ApiError, ErrorCode};

/// A JSON body; an empty one is `T::default()` where every field has a default.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Serialize> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let json = match request.headers().get(header::CONTENT_TYPE) {
            None => true,
            Some(kind) => kind.to_str().is_ok_and(|kind| {
                let essence = kind.split(';').next().unwrap_or_default().trim();
                essence.eq_ignore_ascii_case("application/json")
            }),
        };
        let Raw(bytes) = Raw::from_request(request, state).await?;
        if !json {
            return Err(ApiError::new(
                ErrorCode::UnsupportedMediaType,
                "send the body as `content-type: application/json`",
            ));
        }
        parse(if bytes.is_empty() { b"{}" } else { &bytes }).map(Body).map_err(ApiError::invalid)
    }
}

fn parse<T: DeserializeOwned + Serialize>(text: &[u8]) -> Result<T, String> {
    let misfit = |error: serde_json::Error| format!("the body does not fit: {error}");
    let asked: T = serde_json::from_slice(text).map_err(misfit)?;
    let given: Value = serde_json::from_slice(text).map_err(misfit)?;
    let meant = serde_json::to_value(&asked).map_err(misfit)?;
    match list_for_object(&given, &meant, "") {
        Some(at) if at.is_empty() => {
            Err("the body does not fit: it is a list, and is to be an object, `{...}`".to_owned())
        }
        Some(at) => Err(format!("the body does not fit: `{at}` is a list, and is to be an object, `{{...}}`")),
        None => Ok(asked),
    }
}

/// Where a list stands in place of an object. Derived deserializers take the values of a structure as a list too, in the order in which the
/// fields happen to be declared, and an empty one for all defaults: nobody means that.
fn list_for_object(given: &Value, meant: &Value, at: &str) -> Option<String> {
    match (given, meant) {
        (Value::Array(_), Value::Object(_)) => Some(at.to_owned()),
        (Value::Array(given), Value::Array(meant)) => given
            .iter()
            .zip(meant)
            .enumerate()
            .find_map(|(number, (given, meant))| list_for_object(given, meant, &format!("{at}[{number}]"))),
        (Value::Object(given), Value::Object(meant)) => given.iter().find_map(|(name, given)| {
            let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
            list_for_object(given, meant.get(name)?, &at)
        }),
        _ => None,
    }
}

/// A body of any kind.
pub(super) struct Raw(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Raw {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        Bytes::from_request(request, state).await.map(Raw).map_err(|rejection| {
            let code = match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::TooLarge,
                _ => ErrorCode::InvalidRequest,
            };
            ApiError::new(code, format!("the body could not be read: {}", rejection.body_text()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::demand::VmPolicy;
    use crate::api::types::{DropRequest, WarmRequest};

    #[test]
    fn a_list_is_no_object_at_any_depth() {
        let warm = |text: &str| parse::<WarmRequest>(text.as_bytes());
        let range = r#"{"offset_bytes": 0, "length_bytes": 4096}"#;
        assert_eq!(warm(&format!(r#"{{"disk": "d", "ranges": [{range}]}}"#)).unwrap().ranges.unwrap().len(), 1);
        let said = warm(&format!(r#"{{"disk": "d", "ranges": [{range}, [0, 4096]]}}"#)).unwrap_err();
        assert!(said.contains("`ranges[1]` is a list, and is to be an object"), "{said}");
        for text in ["[]", r#"["ram"]"#, " [ ] "] {
            let said = parse::<DropRequest>(text.as_bytes()).unwrap_err();
            assert!(said.contains("it is a list, and is to be an object"), "{text}: {said}");
        }
        assert_eq!(parse::<DropRequest>(b"{}").unwrap(), DropRequest::default());
        assert!(parse::<VmPolicy>(b"[]").is_err());
    }
}
