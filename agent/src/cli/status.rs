//! `status`: health of the daemon and its parts.

use std::time::Duration;

use prestage_integration::api::types::{CacheUse, Health, Recovery, Sandbox, SlabFound, Status, Trouble};

use super::render::{count, dash, health, percent, with_detail};
use super::table::{Fields, printable};
use crate::config::units::{human_bytes, human_duration, human_sizes};

pub(super) fn status(status: &Status) -> String {
    let mut fields = Fields::default();
    fields.add("prestaged", format!("{} on {}, pid {}", status.version, status.host, status.pid));
    fields.add("up", human_duration(Duration::from_millis(status.uptime_ms)));
    fields.add("health", health(status.health));
    fields.add("sandbox", sandbox(&status.sandbox));
    fields.add("engine", format!("{}, {}", status.engine.mode, count(status.engine.shards.into(), "shard", "shards")));
    fields.add("cache", cache_use(&status.cache)).add("hits", hits(&status.cache));
    if let Some(text) = status.cache.ssd_recovery.as_ref().and_then(recovery) {
        fields.add("recovered", text);
    }
    let disks = &status.disks;
    fields.add("disks", format!("{} in all, {} connected, {} degraded", disks.total, disks.connected, disks.degraded));
    let libvirt = &status.libvirt;
    fields.add(
        "libvirt",
        match libvirt.health {
            Health::Off => "off".to_owned(),
            _ if libvirt.connected => {
                format!("{}, connected, {}", libvirt.uri, count(libvirt.reconnects, "reconnect", "reconnects"))
            }
            // The reason then stands below, with what to do.
            _ if status.troubles.iter().any(|trouble| trouble.subject == "libvirt") => {
                format!("{}, NOT CONNECTED", libvirt.uri)
            }
            _ => format!("{}, NOT CONNECTED: {}", libvirt.uri, dash(libvirt.error.as_deref())),
        },
    );
    let learner = &status.learner;
    fields.add(
        "learner",
        format!(
            "{}, {} accesses since start, {} dropped, {}, {}",
            with_detail(learner.health, learner.detail.as_deref()),
            learner.accesses,
            learner.accesses_dropped,
            count(learner.profiles.into(), "profile", "profiles"),
            human_bytes(learner.memory_bytes)
        ),
    );
    fields.add("prefetch", if learner.prefetch { "on" } else { "off" });
    let memory = &status.memory;
    fields.add(
        "memory",
        match memory.health {
            Health::Off => with_detail(memory.health, memory.detail.as_deref()),
            _ => format!(
                "{}, {} of {} watched, {} brought in, {} of that used",
                health(memory.health),
                memory.watched,
                count(memory.machines.into(), "machine", "machines"),
                human_bytes(memory.staged_bytes),
                human_bytes(memory.used_bytes)
            ),
        },
    );
    let store = &status.store;
    fields.add(
        "database",
        format!(
            "{}, {} at {}",
            with_detail(store.health, store.detail.as_deref()),
            human_bytes(store.size_bytes),
            store.path
        ),
    );
    fields.add("db writes", format!("{} waiting, {} lost", store.queued, store.writes_dropped));
    let mut text = fields.render();
    for (head, list) in [("needs attention", &status.troubles), ("for the time being", &status.notices)] {
        if !list.is_empty() {
            text.push_str(&format!("\n{head}:\n"));
        }
        for Trouble { subject, detail } in list {
            text.push_str(&format!("  {}: {}\n", printable(subject), printable(detail)));
        }
    }
    text
}

/// What holds, and what does not and why.
fn sandbox(sandbox: &Sandbox) -> String {
    if sandbox.mode == "off" {
        return "OFF: whoever takes over prestaged has its rights".to_owned();
    }
    let (holds, lacks): (Vec<_>, Vec<_>) = sandbox.layers.iter().partition(|layer| layer.holds);
    let mut told = vec![holds.iter().map(|layer| layer.name.as_str()).collect::<Vec<_>>().join(", ")];
    told.extend(lacks.iter().map(|layer| format!("NOT {}: {}", layer.name, layer.detail)));
    // A daemon that is older does not say.
    dash(Some(told.join("; ")).as_deref().filter(|_| !sandbox.layers.is_empty()))
}

/// How full the tiers are.
fn cache_use(cache: &CacheUse) -> String {
    let tier = |name, used, capacity| match capacity {
        0 => format!("no {name}"),
        _ => format!("{name} {}", human_sizes([used, capacity]).join(" of ")),
    };
    let ram = tier("RAM", cache.ram_used_bytes, cache.ram_capacity_bytes);
    format!("{ram}, {}", tier("SSD", cache.ssd_used_bytes, cache.ssd_capacity_bytes))
}

/// What the SSD tier kept over the daemon's start and why it dropped the rest; nothing of a new one.
pub(super) fn recovery(recovery: &Recovery) -> Option<String> {
    let how = match recovery.found {
        SlabFound::Created => return None,
        SlabFound::Clean => "after a clean stop",
        SlabFound::Recovered => "after a crash",
        SlabFound::Unclean => "of a file whose content did not count any more, as after `cache drain`",
        SlabFound::Vetoed => "after it had been out of service",
        SlabFound::Damaged => "from a damaged file",
    };
    let dropped = [
        (recovery.dropped_written, "being written to"),
        (recovery.dropped_changed_store, "changed while the daemon was down"),
        (recovery.dropped_unvouched, "of stores that a run without the SSD may have changed"),
        (recovery.dropped_overtaken, "overtaken"),
        (recovery.dropped_damaged, "damaged"),
        (recovery.bad_checksums, "rotten"),
    ];
    let dropped: Vec<_> =
        dropped.iter().filter(|(blocks, _)| *blocks > 0).map(|(blocks, why)| format!("{blocks} {why}")).collect();
    let dropped = if dropped.is_empty() { String::new() } else { format!("; dropped: {}", dropped.join(", ")) };
    if recovery.unread_blocks > 0 {
        let left = count(recovery.unread_blocks, "record", "records");
        return Some(format!("the SSD's index is being read, {left} to go{dropped}"));
    }
    Some(format!("{} on the SSD {how}{dropped}", count(recovery.kept_blocks, "block", "blocks")))
}

/// What they are good for.
fn hits(cache: &CacheUse) -> String {
    let (ram, ssd) = (cache.served_ram, cache.served_ssd);
    match ram + ssd + cache.served_store {
        0 => "no reads yet".to_owned(),
        reads => {
            let [all, ram, ssd] = [ram + ssd, ram, ssd].map(|part| percent(part, reads));
            format!("{all} % of {reads} reads ({ram} % RAM, {ssd} % SSD)")
        }
    }
}
