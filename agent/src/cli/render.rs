//! What people read: one function a reply.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prestage_integration::api::types::{
    Attached, CacheTiers, Counters, Detached, Disk, DiskList, DiskState, Dropped, Health, PassedOver, Profile,
    ProfileList, Saved, StoreState, TakesEffect, TierName, Vm, VmList, VmPages, Warmed,
};

use super::status::recovery;
use super::table::{Align, Fields, Table, printable};
use super::templates;
use crate::config::units::{human_bytes, human_duration, human_sizes};

/// `part` of `whole` in percent, `-` of nothing. All of it is what says 100.0.
pub(super) fn percent(part: u64, whole: u64) -> String {
    let most = if part < whole { 99.9 } else { f64::INFINITY };
    if whole == 0 { "-".to_owned() } else { format!("{:.1}", (100.0 * part as f64 / whole as f64).min(most)) }
}

pub(super) fn health(health: Health) -> &'static str {
    match health {
        Health::Ok => "ok",
        Health::Degraded => "DEGRADED",
        Health::Off => "off",
    }
}

pub(super) fn with_detail(state: Health, detail: Option<&str>) -> String {
    match detail {
        None => health(state).to_owned(),
        Some(detail) => format!("{}: {detail}", health(state)),
    }
}

pub(super) fn dash(text: Option<&str>) -> String {
    text.unwrap_or("-").to_owned()
}

pub(super) fn count(number: u64, one: &str, many: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {many}") }
}

/// Time since, as of `now`.
pub(super) fn ago(unix_ms: u64, now_unix_ms: u64) -> String {
    format!("{} ago", human_duration(Duration::from_millis(now_unix_ms.saturating_sub(unix_ms))))
}

pub(super) fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn store_state(state: &DiskState) -> String {
    match (state.store_state, &state.store_reason) {
        (StoreState::Ok, None) => "ok".to_owned(),
        (StoreState::Ok, Some(reason)) => reason.clone(),
        (StoreState::Degraded, None) => "DEGRADED".to_owned(),
        (StoreState::Degraded, Some(reason)) => format!("DEGRADED: {reason}"),
    }
}

pub(super) fn disks(list: &DiskList) -> String {
    if list.disks.is_empty() {
        return "no disks; serve one with `prestagectl disk add NAME STORE` or `prestagectl vm attach VM TARGET`\n"
            .to_owned();
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("MODE", Align::Left),
        ("CONNECTED", Align::Left),
        ("VM", Align::Left),
        ("READS", Align::Right),
        ("STORE", Align::Left),
        ("STATE", Align::Left),
    ]);
    for disk in &list.disks {
        let state = &disk.state;
        table.row([
            disk.name.clone(),
            human_bytes(state.capacity_bytes),
            if disk.read_only { "ro" } else { "rw" }.to_owned(),
            if state.connected {
                format!("yes, {}", count(state.queues.into(), "queue", "queues"))
            } else {
                "no".to_owned()
            },
            machine(disk).unwrap_or_else(|| "-".to_owned()),
            disk.counters.reads.to_string(),
            disk.store.clone(),
            store_state(state),
        ]);
    }
    table.render()
}

fn machine(disk: &Disk) -> Option<String> {
    let vm = disk.vm.as_ref()?;
    Some(disk.target.as_ref().map_or_else(|| vm.clone(), |target| format!("{vm}:{target}")))
}

pub(super) fn disk(disk: &Disk) -> String {
    let (state, counters) = (&disk.state, &disk.counters);
    let mut fields = Fields::default();
    fields.add("name", &disk.name).add("store", &disk.store).add("storage", &disk.storage);
    for (i, image) in disk.images.iter().enumerate().skip(1) {
        fields.add(if i == 1 { "on" } else { "" }, image);
    }
    if let Some(qemu) = &disk.through_qemu {
        fields.add("through", qemu);
    }
    fields.add("store state", store_state(state)).add("size", human_bytes(state.capacity_bytes));
    fields.add("mode", if disk.read_only { "read-only" } else { "read-write" });
    fields.add("socket", &disk.socket);
    fields.add("vm", machine(disk).unwrap_or_else(|| "-".to_owned()));
    fields.add(
        "connected",
        if state.connected {
            format!("yes, {}", count(state.queues.into(), "queue", "queues"))
        } else {
            "no".to_owned()
        },
    );
    if let Some(nbd) = &disk.nbd {
        fields.add("NBD", &nbd.uri);
        if let Some(uri) = &nbd.tcp {
            fields.add("NBD over TLS", uri);
        }
        let now = now_unix_ms();
        for client in &nbd.clients {
            let what = format!("{}, {} requests, {} under way", client.peer, client.requests, client.in_flight);
            fields.add("NBD client", format!("{what}, connected {}", ago(client.since_unix_ms, now)));
        }
        if nbd.clients.is_empty() {
            fields.add("NBD client", "none");
        }
    }
    let mut text = fields.render();
    text.push('\n');
    text.push_str(&counted(counters));
    text
}

fn counted(counters: &Counters) -> String {
    let served = counters.served_ram + counters.served_ssd + counters.served_store;
    let mut fields = Fields::default();
    fields.add(
        "reads",
        format!("{}, {}, mean wait {} ms", counters.reads, human_bytes(counters.read_bytes), wait_ms(counters)),
    );
    for (name, part) in [
        ("from RAM", counters.served_ram),
        ("from SSD", counters.served_ssd),
        ("waited for store", counters.served_store),
    ] {
        fields.add(name, format!("{part} ({} %)", percent(part, served)));
    }
    fields.add("read errors", counters.read_errors);
    fields.add("writes", format!("{}, {}", counters.writes, human_bytes(counters.write_bytes)));
    fields.add("flushes, discards", format!("{}, {}", counters.flushes, counters.discards));
    fields.add("store reads", format!("{}, {}", counters.store_reads, human_bytes(counters.store_read_bytes)));
    fields.add("store writes", format!("{}, {}", counters.store_writes, human_bytes(counters.store_write_bytes)));
    fields.add(
        "prefetch",
        format!(
            "{} issued, {} used ({} % of what arrived), {} evicted unused, {} cancelled",
            human_bytes(counters.prefetch_issued_bytes),
            human_bytes(counters.prefetch_used_bytes),
            percent(
                counters.prefetch_used_bytes.min(counters.prefetch_completed_bytes),
                counters.prefetch_completed_bytes
            ),
            human_bytes(counters.prefetch_evicted_unused_bytes),
            human_bytes(counters.prefetch_cancelled_bytes)
        ),
    );
    fields.add("prefetch late", format!("{} reads waited for one", counters.prefetch_late));
    fields.add(
        "ssd traffic",
        format!("{} read, {} written", human_bytes(counters.ssd_read_bytes), human_bytes(counters.ssd_write_bytes)),
    );
    fields.add("accesses dropped", counters.accesses_dropped);
    fields.render()
}

/// Mean time of a read in milliseconds, `-` of none.
pub(super) fn wait_ms(counters: &Counters) -> String {
    match counters.reads {
        0 => "-".to_owned(),
        reads => format!("{:.2}", counters.read_wait_us as f64 / reads as f64 / 1000.0),
    }
}

pub(super) fn vms(list: &VmList) -> String {
    if list.vms.is_empty() {
        return "no machines\n".to_owned();
    }
    let clones = list.vms.iter().any(|vm| vm.clone.is_some());
    let mut columns = vec![("VM", Align::Left), ("STATE", Align::Left), ("SHARED MEMORY", Align::Left)];
    columns.extend(clones.then_some(("TEMPLATE READ", Align::Left)));
    columns.extend(["DISK", "BUS", "SERVED AS", "SOURCE"].map(|name| (name, Align::Left)));
    let mut table = Table::new(&columns);
    for vm in &list.vms {
        let mut head = vec![vm.name.clone(), vm.state.clone(), if vm.shared_memory { "yes" } else { "no" }.to_owned()];
        head.extend(clones.then(|| dash(vm.clone.as_ref().map(templates::cell).as_deref())));
        if vm.disks.is_empty() {
            head.push("-".to_owned());
            table.row(head);
            continue;
        }
        for (at, disk) in vm.disks.iter().enumerate() {
            // The machine's own columns stand once.
            let head = if at == 0 { head.clone() } else { vec![String::new(); head.len()] };
            let tail =
                [disk.target.clone(), disk.bus.clone(), dash(disk.attached.as_deref()), dash(disk.source.as_deref())];
            table.row(head.into_iter().chain(tail));
        }
    }
    table.render()
}

pub(super) fn vm(vm: &Vm) -> String {
    let mut fields = Fields::default();
    fields.add("machine", format!("{} ({})", vm.name, vm.uuid)).add("state", &vm.state);
    fields.add("vCPUs", vm.vcpus).add("memory", human_bytes(vm.memory_bytes));
    fields.add("shared memory", if vm.shared_memory { "yes" } else { "no" });
    let mut text = fields.render();
    if !vm.disks.is_empty() {
        text.push('\n');
        text.push_str(&vms(&VmList { vms: vec![vm.clone()] }));
    }
    if let Some(clone) = &vm.clone {
        text.push('\n');
        text.push_str(&templates::fields(clone));
    }
    if let Some(seen) = &vm.pages {
        text.push('\n');
        text.push_str(&pages(seen));
    }
    text
}

/// How a machine's memory fares.
fn pages(seen: &VmPages) -> String {
    let mut fields = Fields::default();
    fields.add("memory pages", with_detail(seen.health, Some(&seen.state)));
    if let Some(signal) = &seen.signal {
        fields.add("seen by", signal);
    }
    for PassedOver { signal, why } in &seen.passed_over {
        fields.add("not by", format!("{signal}: {why}"));
    }
    for missing in &seen.missing {
        fields.add("not possible", missing);
    }
    if let (Some(present), Some(swapped), Some(absent)) = (seen.present_bytes, seen.swapped_bytes, seen.absent_bytes) {
        let [present, swapped, absent] = [present, swapped, absent].map(human_bytes);
        fields.add("residency", format!("{present} in memory, {swapped} in swap, {absent} never used"));
    }
    let every = match (seen.period, &seen.signal) {
        (_, None) => String::new(),
        (0, _) => ", none is looked at now".to_owned(),
        (1, _) => ", all are looked at now".to_owned(),
        (period, _) => format!(", at intervals of {period} now"),
    };
    fields.add("faults", format!("{} seen, {} lost{every}", seen.faults, seen.faults_lost));
    fields.add(
        "brought in",
        format!(
            "{}: {} used, {} not touched yet, {} in vain; {} foreseen too late",
            human_bytes(seen.staged_bytes),
            human_bytes(seen.used_bytes),
            human_bytes(seen.unread_bytes),
            human_bytes(seen.wasted_bytes),
            human_bytes(seen.late_bytes)
        ),
    );
    if seen.pushed_bytes > 0 || seen.push_state.is_some() {
        let [pushed, back] = [seen.pushed_bytes, seen.refaulted_bytes].map(human_bytes);
        let failed = match seen.push_failed {
            0 => String::new(),
            failed => format!(", {} failed", count(failed, "order", "orders")),
        };
        let state = seen.push_state.as_deref().unwrap_or("switched off");
        fields.add("pushed out", format!("{pushed}; {back} read back, whoever put it out{failed}; {state}"));
    }
    if let Some(held) = &seen.held {
        fields.add("waits", held);
    }
    let sets: Vec<String> = seen
        .sets
        .iter()
        .map(|set| {
            format!("{} ({}, {})", set.program, human_bytes(set.size_bytes), count(set.runs.into(), "run", "runs"))
        })
        .collect();
    if seen.recognised > 0 {
        fields.add(
            "recognised",
            count(seen.recognised, "program that nobody announced", "times a program that nobody announced"),
        );
    }
    fields.add("learned", if sets.is_empty() { "no program yet".to_owned() } else { sets.join(", ") });
    fields.render()
}

fn effect(effect: TakesEffect) -> &'static str {
    match effect {
        TakesEffect::Now => "",
        TakesEffect::NextStart => {
            "It takes effect when the machine is next started; a reboot inside the guest is not enough.\n"
        }
    }
}

pub(super) fn notes(notes: &[String]) -> String {
    notes.iter().map(|note| format!("Note: {}\n", printable(note))).collect()
}

pub(super) fn attached(reply: &Attached) -> String {
    let Attached { vm, target, disk, store, socket, takes_effect, notes: more } = reply;
    let first = printable(&format!("{vm} {target} is served by disk {disk} from {store}, on {socket}"));
    format!("{first}\n{}{}", effect(*takes_effect), notes(more))
}

pub(super) fn detached(reply: &Detached) -> String {
    let Detached { vm, target, disk, store, takes_effect, notes: more } = reply;
    let first = printable(&format!("{vm} {target} has its source {store} again; disk {disk} served it"));
    format!("{first}\n{}{}", effect(*takes_effect), notes(more))
}

pub(super) fn tiers(tiers: &CacheTiers) -> String {
    let name = |tier| match tier {
        TierName::Ram => "ram",
        TierName::Ssd => "ssd",
    };
    let mut table = Table::new(&[
        ("TIER", Align::Left),
        ("SIZE", Align::Right),
        ("USED", Align::Right),
        ("USED %", Align::Right),
        ("BLOCKS", Align::Right),
        ("DATA", Align::Right),
        ("UNREAD", Align::Right),
        ("HITS", Align::Right),
        ("EVICTED", Align::Right),
    ]);
    // A state may be a sentence: it has a line of its own.
    let mut states = Fields::default();
    for tier in &tiers.tiers {
        states.add(name(tier.tier), with_detail(tier.health, tier.detail.as_deref()));
        if let Some(note) = &tier.size_note {
            states.add(&format!("{} size", name(tier.tier)), note);
        }
        if let Some(text) = tier.recovery.as_ref().and_then(recovery) {
            states.add("ssd kept", text);
        }
        let [capacity, used, valid] = human_sizes([tier.capacity_bytes, tier.used_bytes, tier.valid_bytes]);
        table.row([
            name(tier.tier).to_owned(),
            capacity,
            used,
            percent(tier.used_bytes, tier.capacity_bytes),
            tier.blocks.to_string(),
            valid,
            human_bytes(tier.prefetched_unused_bytes),
            tier.hits.to_string(),
            tier.evictions.to_string(),
        ]);
    }
    let mut text = format!("{}\n{}", table.render(), states.render());
    let mut cached = Table::new(&[
        ("TIER", Align::Left),
        ("CACHED", Align::Right),
        ("DISKS", Align::Left),
        ("STORAGE", Align::Left),
    ]);
    for tier in &tiers.tiers {
        for storage in &tier.storages {
            let disks = if storage.disks.is_empty() { "-".to_owned() } else { storage.disks.join(", ") };
            cached.row([name(tier.tier).to_owned(), human_bytes(storage.used_bytes), disks, storage.storage.clone()]);
        }
    }
    if tiers.tiers.iter().any(|tier| !tier.storages.is_empty()) {
        text.push('\n');
        text.push_str(&cached.render());
    }
    text
}

pub(super) fn warmed(disk: &str, reply: &Warmed) -> String {
    if reply.queued_bytes + reply.already_cached_bytes + reply.refused_bytes == 0 {
        return format!("{disk}: nothing to bring: no boot or program is learned yet;\nname ranges with --ranges\n");
    }
    let already = match reply.already_cached_bytes {
        0 => String::new(),
        bytes => format!(", {} in RAM or on the SSD already", human_bytes(bytes)),
    };
    let mut text = format!("{disk}: {} to bring{already}\n", human_bytes(reply.queued_bytes));
    if reply.refused_bytes > 0 {
        text.push_str(&format!("{} did not fit the cache or its queue\n", human_bytes(reply.refused_bytes)));
    }
    text
}

pub(super) fn dropped(reply: &Dropped) -> String {
    format!("dropped {} from RAM, {} from SSD\n", human_bytes(reply.ram_bytes), human_bytes(reply.ssd_bytes))
}

pub(super) fn profiles(list: &ProfileList, now_unix_ms: u64) -> String {
    if list.profiles.is_empty() {
        return "nothing learned yet; profiles appear when guests read\n".to_owned();
    }
    let mut table = Table::new(&[
        ("ID", Align::Left),
        ("RUNS", Align::Right),
        ("SIZE", Align::Right),
        ("MEMORY", Align::Right),
        ("SAVED", Align::Left),
        ("DISKS", Align::Left),
        ("STORAGE", Align::Left),
        ("STATE", Align::Left),
    ]);
    for profile in &list.profiles {
        table.row([
            profile.id.clone(),
            profile.runs.to_string(),
            human_bytes(profile.size_bytes),
            human_bytes(profile.memory_bytes),
            profile.saved_unix_ms.map_or_else(|| "never".to_owned(), |at| ago(at, now_unix_ms)),
            if profile.disks.is_empty() { "-".to_owned() } else { profile.disks.join(", ") },
            profile.storage.clone(),
            with_detail(profile.health, profile.detail.as_deref()),
        ]);
    }
    table.render()
}

pub(super) fn profile(profile: &Profile, now_unix_ms: u64) -> String {
    let mut fields = Fields::default();
    fields.add("id", &profile.id).add("storage", &profile.storage);
    fields.add("disks", if profile.disks.is_empty() { "-".to_owned() } else { profile.disks.join(", ") });
    fields.add("state", with_detail(profile.health, profile.detail.as_deref()));
    fields.add("saved", profile.saved_unix_ms.map_or_else(|| "never".to_owned(), |at| ago(at, now_unix_ms)));
    fields
        .add("runs", profile.runs)
        .add("size", human_bytes(profile.size_bytes))
        .add("memory", human_bytes(profile.memory_bytes));
    fields.add("contexts", profile.contexts);
    let mut text = fields.render();
    if !profile.phases.is_empty() {
        let mut table = Table::new(&[
            ("PHASE", Align::Left),
            ("RUNS", Align::Right),
            ("EXTENTS", Align::Right),
            ("BYTES", Align::Right),
        ]);
        for phase in &profile.phases {
            table.row([
                phase.kind.clone(),
                phase.runs.to_string(),
                phase.extents.to_string(),
                human_bytes(phase.size_bytes),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

pub(super) fn saved(reply: &Saved) -> String {
    if reply.profiles == 0 {
        return "nothing new to save\n".to_owned();
    }
    format!("saved {}, {}\n", count(reply.profiles.into(), "profile", "profiles"), human_bytes(reply.size_bytes))
}
