//! Attach and detach as pure functions: a domain's definition in, the changed definition out.

use std::path::{Path, PathBuf};

use roxmltree::Node;

use super::disk::Disk;
use super::error::PlanError;
use super::memory;
use super::record::{DiskRecord, Record, serves};
use super::store::StoreSource;
use super::xml::{Splices, child_text, is, parse};
use crate::export::SOCKET_PATH_BYTES;

/// The most queues QEMU gives a vhost-user disk without a much larger interrupt table; far above any use.
const MAX_QUEUES: u16 = 256;

/// Resolves a volume of a storage pool (pool, volume) to what backs it, or says why it can't.
pub type VolumeLookup<'a> = dyn Fn(&str, &str) -> Result<StoreSource, String> + 'a;

/// How to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachOptions {
    /// Add shared memory to the domain if it has none; otherwise that is an error.
    pub enable_shared_memory: bool,
    /// Queues of the disk. `None` keeps the definition's number, and without one QEMU takes one per vCPU. QEMU refuses to
    /// start if the export offers fewer, so give the smaller of the VM's vCPUs and the export's queues.
    pub queues: Option<u16>,
    /// Seconds between QEMU's attempts to reconnect after the export went away.
    pub reconnect_secs: u32,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self { enable_shared_memory: false, queues: None, reconnect_secs: 1 }
    }
}

/// What an attachment changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachPlan {
    /// The domain's name.
    pub vm: String,
    pub target: String,
    pub socket: PathBuf,
    /// The exact text of the disk element that is replaced.
    pub original: String,
    /// What backs the disk, for the export to serve.
    pub store: StoreSource,
    /// The export must refuse writes: a vhost-user disk can't be marked read-only itself.
    pub read_only: bool,
    /// The serial the export must give to the guest (VIRTIO GET_ID), where the definition has one.
    pub serial: Option<String>,
    /// Shared memory is added.
    pub shared_memory_added: bool,
    /// What the operator should know, one sentence each.
    pub remarks: Vec<String>,
    /// The whole changed definition.
    pub new_xml: String,
}

/// What a detachment changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachPlan {
    /// The domain's name.
    pub vm: String,
    pub target: String,
    /// The socket that the disk was on.
    pub socket: PathBuf,
    /// The disk element that is put back; `None` if the disk was already changed or removed by hand and only the record
    /// is dropped.
    pub original: Option<String>,
    pub remarks: Vec<String>,
    pub new_xml: String,
}

fn domain<'a, 'i>(root: Node<'a, 'i>) -> Result<(Node<'a, 'i>, String), PlanError> {
    if !is(root, "domain") {
        return Err(PlanError::BadXml { reason: format!("<{}> is not a domain", root.tag_name().name()) });
    }
    match root.attribute("type") {
        Some("kvm" | "qemu") => {}
        kind => return Err(PlanError::NotQemu { kind: kind.unwrap_or("none").to_owned() }),
    }
    let name = child_text(root, "name").filter(|n| !n.is_empty());
    let name = name.ok_or_else(|| PlanError::BadXml { reason: "the domain has no name".to_owned() })?;
    Ok((root, name.to_owned()))
}

fn check_socket(path: &Path) -> Result<(), PlanError> {
    let reason = match path.to_str() {
        None => "it is not UTF-8",
        Some(text) if !text.starts_with('/') => "it must be absolute",
        Some(text) if text.len() > SOCKET_PATH_BYTES => {
            "unix socket paths have at most 107 bytes; use a shorter run_dir"
        }
        Some(text) if text.chars().any(char::is_control) => "it has control characters",
        Some(_) => return Ok(()),
    };
    Err(PlanError::SocketPath { path: path.to_owned(), reason: reason.to_owned() })
}

/// Plans pointing the disk `target` at the export on `socket`. `xml` is the domain's persistent definition with its
/// secrets (`VIR_DOMAIN_XML_INACTIVE | VIR_DOMAIN_XML_SECURE`), since the result replaces it.
///
/// # Errors
/// Whatever makes an export an unfit substitute for the disk; each error says what to do.
pub fn plan_attach(
    xml: &str,
    target: &str,
    socket: &Path,
    options: &AttachOptions,
    volumes: &VolumeLookup<'_>,
) -> Result<AttachPlan, PlanError> {
    let doc = parse(xml)?;
    let (domain, vm) = domain(doc.root_element())?;
    check_socket(socket)?;
    if let Some(queues) = options.queues.filter(|q| !(1..=MAX_QUEUES).contains(q)) {
        return Err(PlanError::Queues { queues });
    }
    let disk = Disk::find(domain, target)?;
    let mut record = Record::read(domain);
    if let Some(attached) = record.disk(target).filter(|r| serves(r, disk.node)) {
        return Err(PlanError::AlreadyAttached { target: target.to_owned(), socket: attached.socket.clone() });
    }
    disk.check()?;
    let store = disk.store(volumes)?;

    let mut splices = Splices::default();
    let mut remarks = disk.remarks();
    let shared = memory::is_shared(domain)?;
    if shared {
        remarks.extend(memory::remark(domain));
    } else if options.enable_shared_memory {
        let before = memory::share(xml, domain, &mut splices);
        record.memory_backing.get_or_insert(before);
    } else {
        return Err(PlanError::MemoryNotShared);
    }
    let range = disk.node.range();
    let original = xml[range.clone()].to_owned();
    splices.replace(range, disk.replacement(xml, socket, options));
    // A record of this target whose disk was changed by hand meanwhile is out of date.
    record.disks.retain(|r| r.target != target);
    record.disks.push(DiskRecord { target: target.to_owned(), socket: socket.to_owned(), original: original.clone() });
    record.write(xml, domain, &mut splices);
    Ok(AttachPlan {
        vm,
        target: target.to_owned(),
        socket: socket.to_owned(),
        original,
        store,
        read_only: disk.read_only(),
        serial: disk.serial().map(str::to_owned),
        shared_memory_added: !shared,
        remarks,
        new_xml: splices.apply(xml),
    })
}

/// Plans putting back what the disk `target` was before it was attached.
///
/// # Errors
/// [`PlanError::NotAttached`] without a record; [`PlanError::Record`] if the record can't be read.
pub fn plan_detach(xml: &str, target: &str) -> Result<DetachPlan, PlanError> {
    let doc = parse(xml)?;
    let (domain, vm) = domain(doc.root_element())?;
    let mut record = Record::read(domain);
    let Some(index) = record.disks.iter().position(|r| r.target == target) else {
        Disk::find(domain, target)?;
        let attached = record.disks.iter().map(|r| r.target.clone()).collect();
        return Err(PlanError::NotAttached { target: target.to_owned(), attached });
    };
    let entry = record.disks.remove(index);
    let disk = Disk::find(domain, target).ok();

    let mut splices = Splices::default();
    let mut remarks = Vec::new();
    let restored = match disk {
        Some(disk) if serves(&entry, disk.node) => {
            check_original(&entry)?;
            splices.replace(disk.node.range(), entry.original.clone());
            Some(entry.original)
        }
        Some(_) => {
            remarks.push(format!("disk `{target}` was changed by hand since it was attached: it was left as it is"));
            None
        }
        None => {
            remarks.push(format!("disk `{target}` was removed since it was attached: only its record was dropped"));
            None
        }
    };
    if record.disks.is_empty()
        && let Some(before) = record.memory_backing.take()
    {
        let kept = memory::unshare(xml, domain, disk.map(|d| d.node), &before, &mut splices);
        remarks.extend(kept);
    }
    record.write(xml, domain, &mut splices);
    Ok(DetachPlan {
        vm,
        target: target.to_owned(),
        socket: entry.socket,
        original: restored,
        remarks,
        new_xml: splices.apply(xml),
    })
}

/// Whether the recorded text is one `<disk>` with the recorded target: metadata may have been edited by hand.
fn check_original(entry: &DiskRecord) -> Result<(), PlanError> {
    let damaged = |reason: String| PlanError::Record { target: entry.target.clone(), reason };
    let doc = roxmltree::Document::parse(&entry.original).map_err(|e| damaged(e.to_string()))?;
    let root = doc.root_element();
    let target = super::xml::child_attribute(root, "target", "dev");
    if is(root, "disk") && target == Some(entry.target.as_str()) && root.range() == (0..entry.original.len()) {
        Ok(())
    } else {
        Err(damaged("it is not the <disk> element of this target".to_owned()))
    }
}
