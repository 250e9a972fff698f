//! `model export` and `model import`: a model as a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use prestage_integration::api::models::ModelImported;
use serde_json::json;

use super::super::table::printable;
use super::super::{Failure, print_json};
use super::wrapped;
use crate::client::{Client, encode};
use crate::config::units::human_bytes;

/// More than the daemon takes: a model has a tenth of it.
const FILE_MAX: u64 = 1 << 20;

pub(super) async fn export(
    client: &Client,
    id: i64,
    file: Option<PathBuf>,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let bytes = client.get_file(&format!("/v1/models/{id}/export")).await?;
    let path = file.unwrap_or_else(|| PathBuf::from(format!("model-{id}.prestage")));
    if path == Path::new("-") {
        return Ok(out.write_all(&bytes)?);
    }
    let failed = |what: &str, error: io::Error| {
        let hint = if error.kind() == io::ErrorKind::AlreadyExists { "; name another with --out" } else { "" };
        Failure::Failed(format!("cannot {what} {}: {error}{hint}", path.display()))
    };
    let mut made = File::create_new(&path).map_err(|error| failed("make", error))?;
    made.write_all(&bytes).and_then(|()| made.sync_all()).map_err(|error| failed("write", error))?;
    let (size, shown) = (bytes.len() as u64, path.display().to_string());
    if json {
        return print_json(out, &json!({ "model": id, "file": shown, "size_bytes": size }));
    }
    let shown = printable(&shown);
    let text = format!("model {id}, {}, is in {shown}; `prestagectl model import` takes it up\n", human_bytes(size));
    Ok(out.write_all(text.as_bytes())?)
}

pub(super) async fn import(client: &Client, path: &Path, scope: Option<&str>) -> Result<ModelImported, Failure> {
    let failed = |error: io::Error| Failure::Failed(format!("cannot read {}: {error}", path.display()));
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 == FILE_MAX {
        let most = human_bytes(FILE_MAX);
        return Err(Failure::Failed(format!("{} is no model: it has {most} or more", path.display())));
    }
    let query = scope.map_or_else(String::new, |scope| format!("?scope={}", encode(scope)));
    Ok(client.post_file(&format!("/v1/models/import{query}"), bytes).await?)
}

pub(super) fn imported(reply: &ModelImported) -> String {
    let ModelImported { scope, model, before } = reply;
    let before = before.map_or_else(String::new, |before| format!(", in place of model {before}"));
    wrapped(
        &format!(
            "model {model} of {scope} is imported and runs in shadow{before}; it is promoted when it proves better, or with \
             `prestagectl model promote {model}`"
        ),
        "",
    )
}
