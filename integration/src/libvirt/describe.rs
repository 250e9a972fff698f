//! Domain XML → the plain description of its disks and memory.

use std::path::PathBuf;

use roxmltree::Node;

use super::disk::Disk;
use super::error::PlanError;
use super::memory;
use super::record::{Record, serves};
use super::store::StoreSource;
use super::template;
use super::vm::{AttachInfo, DiskKind, VmDisk};
use super::xml::parse;

/// What XML tells about a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) disks: Vec<VmDisk>,
    pub(super) shared_memory: bool,
    /// Folder of the template that it is a clone of.
    pub(super) clone_of: Option<PathBuf>,
}

/// Describes a domain from the definition of its running instance, if it runs, and the one of its next start, if it is
/// persistent. One of the two there must be.
pub(super) fn describe(running: Option<&str>, next: Option<&str>) -> Result<Described, PlanError> {
    let no_xml = || PlanError::BadXml { reason: "the domain has no definition".to_owned() };
    let running_doc = running.map(parse).transpose()?;
    let next_doc = next.map(parse).transpose()?;
    let running = running_doc.as_ref().map(|d| d.root_element());
    let next = next_doc.as_ref().map(|d| d.root_element());
    let shown = running.or(next).ok_or_else(no_xml)?;
    let definition = next.or(running).ok_or_else(no_xml)?;
    let disks = Disk::all(shown)
        .into_iter()
        .map(|disk| {
            let kind = match disk.kind() {
                "file" => DiskKind::File,
                "block" => DiskKind::Block,
                "network" => DiskKind::Network,
                "vhostuser" => DiskKind::VhostUser,
                "volume" => DiskKind::Volume,
                other => DiskKind::Other(other.to_owned()),
            };
            let attached = attach_info(disk.target, running, next);
            VmDisk {
                target: disk.target.to_owned(),
                bus: disk.bus().to_owned(),
                device: disk.device().to_owned(),
                kind,
                source: disk.source_text(),
                format: disk.format().to_owned(),
                read_only: disk.read_only() || attached.as_ref().is_some_and(|a| a.read_only),
                attached,
            }
        })
        .collect();
    let clone_of = template::noted_template(shown).map(PathBuf::from);
    Ok(Described { disks, shared_memory: memory::is_shared(definition).unwrap_or(false), clone_of })
}

/// The attachment in the running definition, in the next one, or in both.
fn attach_info(target: &str, running: Option<Node<'_, '_>>, next: Option<Node<'_, '_>>) -> Option<AttachInfo> {
    let find = |domain: Node<'_, '_>| {
        let disk = Disk::find(domain, target).ok()?;
        Record::read(domain).disk(target).filter(|r| serves(r, disk.node)).cloned()
    };
    let in_use = running.and_then(find);
    let next_start = next.and_then(find);
    let record = next_start.as_ref().or(in_use.as_ref())?;
    let original = roxmltree::Document::parse(&record.original).ok();
    let original = original.as_ref().map(|d| Disk { node: d.root_element(), target });
    Some(AttachInfo {
        socket: record.socket.clone(),
        store: original.and_then(|d| StoreSource::of_disk(d.node)),
        read_only: original.is_some_and(|d| d.read_only()),
        serial: original.and_then(|d| d.serial()).map(str::to_owned),
        in_use: in_use.is_some(),
        next_start: next_start.is_some(),
    })
}
