//! What is said of the tiers' upkeep, and of disks that become larger.

use super::render::notes;
use super::table::printable;
use crate::config::units::{human_bytes, human_sizes};
use prestage_integration::api::tiers::{Resized, Service, TierResized, TierService};
use prestage_integration::api::types::{DiskResized, TierName};

fn name(tier: TierName) -> &'static str {
    match tier {
        TierName::Ram => "ram",
        TierName::Ssd => "ssd",
    }
}

pub(super) fn resized(reply: &Resized) -> String {
    reply.tiers.iter().map(line).collect()
}

fn line(tier: &TierResized) -> String {
    let [before, after] = human_sizes([tier.before_bytes, tier.after_bytes]);
    let until = match &tier.to_keep {
        Some(setting) => format!(", until the next start; set {} to keep it", printable(setting)),
        None => ", as configured".to_owned(),
    };
    match tier.before_bytes == tier.after_bytes {
        true => format!("{} tier has {after} already{until}\n", name(tier.tier)),
        false => format!("{} tier: {before} -> {after}{until}\n", name(tier.tier)),
    }
}

pub(super) fn service(reply: &Service) -> String {
    reply.tiers.iter().map(state).collect()
}

fn state(tier: &TierService) -> String {
    let (name, size) = (name(tier.tier), human_bytes(tier.size_bytes));
    let path = tier.path.as_deref().map(printable).unwrap_or_default();
    match (tier.in_service, tier.tier, tier.closed) {
        (true, ..) => format!("{name} tier in service, {size}\n"),
        (false, TierName::Ram, _) => format!("{name} tier out of service, {size} given back\n"),
        (false, TierName::Ssd, Some(false)) => {
            let why = match tier.hangs {
                true => "its device does not answer",
                false => "its device, or a store with a write under way, has not answered yet",
            };
            format!(
                "{name} tier out of service, and on record as that; {path} is NOT closed, since {why}: do not unmount or remove it before \
                 `prestagectl cache drain --ssd` says that it is closed\n"
            )
        }
        (false, TierName::Ssd, _) => format!("{name} tier out of service; {path} is closed\n"),
    }
}

pub(super) fn disk_resized(reply: &DiskResized) -> String {
    let DiskResized { disk, before_bytes, after_bytes, told, notes: more } = reply;
    let [before, after] = human_sizes([*before_bytes, *after_bytes]);
    let first = match (before_bytes == after_bytes, told) {
        (true, _) => format!("disk {disk} has {after}, as its guest was told before\n"),
        (false, true) => format!("disk {disk}: {before} -> {after}, and its guest is told\n"),
        (false, false) => format!("disk {disk}: {before} -> {after}\n"),
    };
    format!("{first}{}", notes(more))
}
