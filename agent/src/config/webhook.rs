//! `[[webhook]]`: who is told what is done about machines.

use std::path::PathBuf;

use prestage_integration::webhook::Target;

use super::reader::{Entry, Place, Problems, Section, Table, Value};
use super::settings::between_texts;
use super::value::Setting;
use crate::notify::events::KINDS;

/// Most endpoints: each is a task, and every event is kept for each.
const WEBHOOKS_MAX: usize = 16;

/// Somebody who is told (`[[webhook]]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// What waits for it is kept under this name; default: host and port of the URL.
    pub name: String,
    /// `https`, or `http` to this host itself or with `allow_http`.
    pub url: String,
    /// Lines of `whsec_…`; a name without `/` is a systemd credential.
    pub secret_file: String,
    /// Kinds of events; `None` is all.
    pub events: Option<Vec<String>>,
    pub allow_http: bool,
    /// Authorities that may vouch for the receiver, in place of the host's.
    pub ca_file: Option<PathBuf>,
}

impl std::fmt::Display for Webhook {
    /// Without the URL's path, which may hold a key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let origin =
            Target::parse(&self.url, self.allow_http).map_or_else(|_| "?".to_owned(), |target| target.origin());
        write!(f, "{origin}, secret {}", self.secret_file)?;
        match &self.events {
            Some(events) => write!(f, ", events {}", events.join(", ")),
            None => f.write_str(", all events"),
        }
    }
}

fn kinds(events: &[String]) -> Result<(), String> {
    if events.is_empty() {
        return Err("it is empty, and nothing would ever be told; leave it out for all events".to_owned());
    }
    let known = KINDS.map(|(kind, _)| kind);
    match events.iter().find(|event| !known.contains(&event.as_str())) {
        Some(other) => Err(format!("`{other}` is no kind of event; there are {}", known.join(", "))),
        None => Ok(()),
    }
}

fn secret_file(file: &String) -> Result<(), String> {
    match file.starts_with('/') || !file.is_empty() && !file.contains('/') {
        true => Ok(()),
        false => Err(format!("`{file}` is neither an absolute path nor the name of a systemd credential")),
    }
}

/// Takes `[[webhook]]` out of the document.
pub(super) fn read(document: &mut Table, problems: &mut Problems) -> Vec<Webhook> {
    let entries = match document.remove("webhook") {
        None => return Vec::new(),
        Some(Entry { value: Value::Array(entries), .. }) => entries,
        Some(Entry { place, .. }) => {
            problems.add(&place, "webhook", "expected `[[webhook]]` with double brackets: there may be several");
            return Vec::new();
        }
    };
    let mut webhooks: Vec<(Webhook, Place)> = Vec::new();
    for Entry { value, place } in entries {
        let Value::Table(table) = value else {
            problems.add(&place, "webhook", "expected `[[webhook]]` with url and secret_file");
            continue;
        };
        let Some(webhook) = read_one(table, &place, problems) else { continue };
        match webhooks.iter_mut().find(|(other, _)| other.name == webhook.name) {
            None => webhooks.push((webhook, place)),
            Some((_, first)) if first.file == place.file => problems.add(
                &place,
                "webhook.name",
                format!(
                    "webhook `{}` is declared twice, first at line {}; give each a `name`",
                    webhook.name,
                    first.line.unwrap_or(0)
                ),
            ),
            Some(earlier) => *earlier = (webhook, place),
        }
    }
    if let Some((_, place)) = webhooks.get(WEBHOOKS_MAX) {
        problems.add(
            place,
            "webhook",
            format!("there are {} webhooks; at most {WEBHOOKS_MAX} are told", webhooks.len()),
        );
    }
    webhooks.into_iter().map(|(webhook, _)| webhook).collect()
}

fn read_one(table: Table, place: &Place, problems: &mut Problems) -> Option<Webhook> {
    let mut section = Section::new("webhook", table);
    let before = problems.0.len();
    let allow_http = section.get("allow_http", false, |_| Ok(()), problems);
    let allowed = |url: &String| Target::parse(url, allow_http).map(drop).map_err(|error| error.to_string());
    let url = section.optional("url", allowed, problems);
    let name = section.optional("name", between_texts(1, 64), problems);
    let secret_file = section.optional("secret_file", secret_file, problems);
    let events = section.optional("events", |events: &Vec<String>| kinds(events), problems);
    let ca_file = section.get("ca_file", None, |_| Ok(()), problems);
    section.finish(problems, |_| None);
    match (url, secret_file) {
        (Some(url), Some(secret_file)) => {
            let origin = Target::parse(&url, allow_http).ok()?.origin();
            let name =
                name.unwrap_or_else(|| origin.split_once("://").map_or(origin.clone(), |(_, host)| host.to_owned()));
            Some(Webhook { name, url, secret_file, events, allow_http, ca_file })
        }
        (url, _) => {
            // A bad value has been noted already.
            if problems.0.len() == before {
                let missing = if url.is_none() { "url" } else { "secret_file" };
                problems.add(place, format!("webhook.{missing}"), format!("a `[[webhook]]` needs `{missing}`"));
            }
            None
        }
    }
}

impl Setting for Vec<String> {
    fn read(value: &Value) -> Result<Self, String> {
        let Value::Array(items) = value else {
            return Err(format!("expected a list such as [\"a\", \"b\"], found {}", value.kind()));
        };
        items.iter().map(|item| String::read(&item.value)).collect()
    }

    fn show(&self) -> Option<String> {
        Some(toml::Value::from(self.clone()).to_string())
    }
}
