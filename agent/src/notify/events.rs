//! What is told: a type for each fact, as CloudEvents 1.0 in structured mode. docs/events.md says it in prose, `schemas/` in JSON Schema.

use serde::Serialize;
use serde_json::{Value, json};

use crate::calendar::rfc3339;
use crate::store::demand::{EventRow, NewEvent, Resource};

/// Media type of an event.
pub const CONTENT_TYPE: &str = "application/cloudevents+json";
/// Before the kind in the attribute `type`; after it comes the version of the data.
const TYPE_PREFIX: &str = "io.prestage.";
const TYPE_SUFFIX: &str = ".v1";

/// Unit of amounts of a resource.
#[must_use]
pub const fn unit(resource: Resource) -> &'static str {
    match resource {
        Resource::Cpu => "cores",
        Resource::Memory => "bytes",
        Resource::Disk | Resource::Network => "bytes/s",
    }
}

/// What of a machine's resource was changed, or was not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// UUID of the machine.
    pub vm: String,
    pub resource: &'static str,
    /// Of all amounts here.
    pub unit: &'static str,
    pub before: Option<f64>,
    pub asked: Option<f64>,
    /// What it is now; null where nothing was changed.
    pub got: Option<f64>,
    /// `got` was read back from the machine.
    pub verified: bool,
    /// From the decision to what was read back, ms; null where nothing was changed.
    pub took_ms: Option<u64>,
    /// `observe`, `recommend` or `act`.
    pub mode: &'static str,
    /// In words, with figures.
    pub reason: String,
}

/// So much of a resource.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Amount {
    pub resource: &'static str,
    pub unit: &'static str,
    pub amount: f64,
}

/// A reservation that was decided on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reserved {
    pub reservation: String,
    /// UUID of the machine.
    pub vm: String,
    /// RFC 3339; it ends before `to`.
    pub from: String,
    pub to: String,
    pub resources: Vec<Amount>,
    /// In words, with figures.
    pub reason: String,
}

/// Something that is not as it was foreseen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Anomaly {
    /// UUID of the machine; null for the host.
    pub vm: Option<String>,
    pub metric: String,
    pub unit: String,
    pub value: f64,
    /// Where it was foreseen to be.
    pub low: Option<f64>,
    pub high: Option<f64>,
    /// RFC 3339.
    pub since: String,
    pub reason: String,
}

/// A fact that is told.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Event {
    /// A machine got resources before it needs them.
    Prestaged(Change),
    /// What a machine had been given was taken back.
    Released(Change),
    /// A machine's allocation was changed, wholly or in part, for another reason than these.
    Changed(Change),
    /// A change was refused by the planner, the hypervisor or the guest.
    Refused(Change),
    /// A change that the planner would make and the machine's mode leaves to others.
    Recommended(Change),
    Anomaly(Anomaly),
    ReservationAdmitted(Reserved),
    ReservationRefused(Reserved),
}

/// Kinds of events with the JSON Schema of their data.
pub const KINDS: [(&str, &str); 8] = [
    ("resources.prestaged", include_str!("schemas/change.json")),
    ("resources.released", include_str!("schemas/change.json")),
    ("allocation.changed", include_str!("schemas/change.json")),
    ("allocation.refused", include_str!("schemas/change.json")),
    ("anomaly", include_str!("schemas/anomaly.json")),
    ("reservation.admitted", include_str!("schemas/reservation.json")),
    ("reservation.refused", include_str!("schemas/reservation.json")),
    ("allocation.recommended", include_str!("schemas/change.json")),
];

impl Event {
    /// As in the configuration; see [`KINDS`].
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Prestaged(_) => KINDS[0].0,
            Self::Released(_) => KINDS[1].0,
            Self::Changed(_) => KINDS[2].0,
            Self::Refused(_) => KINDS[3].0,
            Self::Anomaly(_) => KINDS[4].0,
            Self::ReservationAdmitted(_) => KINDS[5].0,
            Self::ReservationRefused(_) => KINDS[6].0,
            Self::Recommended(_) => KINDS[7].0,
        }
    }

    fn vm(&self) -> Option<&str> {
        match self {
            Self::Prestaged(change)
            | Self::Released(change)
            | Self::Changed(change)
            | Self::Refused(change)
            | Self::Recommended(change) => Some(&change.vm),
            Self::Anomaly(anomaly) => anomaly.vm.as_deref(),
            // For a machine that is to come it is a matter of the host.
            Self::ReservationAdmitted(reserved) | Self::ReservationRefused(reserved) => {
                Some(reserved.vm.as_str()).filter(|vm| !vm.is_empty())
            }
        }
    }

    /// For the outbox. `host` is the name of this host, `at_us` when it happened (Unix µs).
    #[must_use]
    pub fn told(&self, host: &str, at_us: u64) -> NewEvent {
        NewEvent {
            kind: self.kind().to_owned(),
            source: format!("/prestage/{}", crate::client::encode(host)),
            subject: self.vm().unwrap_or("host").to_owned(),
            at_us,
            // Numbers that are none become null; nothing else in an event can fail.
            data: serde_json::to_string(self).unwrap_or_else(|_| "null".to_owned()),
        }
    }
}

/// An event's bytes: the same for each try.
#[must_use]
pub fn body(row: &EventRow) -> Vec<u8> {
    let event = &row.event;
    // What the outbox holds has been checked.
    let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
    let envelope = json!({
        "specversion": "1.0",
        "id": row.id,
        "source": event.source,
        "type": format!("{TYPE_PREFIX}{}{TYPE_SUFFIX}", event.kind),
        "subject": event.subject,
        "time": rfc3339(event.at_us),
        "datacontenttype": "application/json",
        // CloudEvents' extension of that name: of one source, by text, in the order of the events.
        "sequence": format!("{:020}", row.seq),
        "data": data,
    });
    envelope.to_string().into_bytes()
}
