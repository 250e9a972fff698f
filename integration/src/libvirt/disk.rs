//! One `<disk>` element: what it is, whether an export can stand in for it, and the element that then replaces it.
//!
//! What a vhost-user disk may have is checked by libvirt in `virDomainDiskVhostUserValidate`
//! (`src/conf/domain_validate.c`): no cache, io, error policy, discard, copy-on-read, I/O thread or zero detection in
//! `<driver>`; no iotune, backing store, encryption, readonly, shareable, transient, serial, wwn, vendor, product, auth,
//! geometry or blockio. Of these the export itself provides read-only and the serial. What can't be had otherwise and
//! changes what the guest or the operator gets is refused, or named in a remark.

use std::path::Path;

use roxmltree::Node;

use super::error::PlanError;
use super::plan::{AttachOptions, VolumeLookup};
use super::store::{NbdUri, StoreSource};
use super::xml::{child, child_attribute, child_text, escape_attribute, indent_of, is};

/// A `<disk>` with a target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk<'a, 'i> {
    pub(super) node: Node<'a, 'i>,
    pub(super) target: &'a str,
}

impl<'a, 'i> Disk<'a, 'i> {
    /// All disks of a domain, in the order of the definition.
    pub(super) fn all(domain: Node<'a, 'i>) -> Vec<Self> {
        child(domain, "devices")
            .into_iter()
            .flat_map(|devices| devices.children())
            .filter(|n| is(*n, "disk"))
            .filter_map(|node| Some(Self { node, target: child(node, "target")?.attribute("dev")? }))
            .collect()
    }

    pub(super) fn find(domain: Node<'a, 'i>, target: &str) -> Result<Self, PlanError> {
        let disks = Self::all(domain);
        disks.iter().find(|d| d.target == target).copied().ok_or_else(|| PlanError::NoSuchDisk {
            target: target.to_owned(),
            present: disks.iter().map(|d| d.target.to_owned()).collect(),
        })
    }

    /// libvirt's default for a disk without `type` is `file`.
    pub(super) fn kind(&self) -> &'a str {
        self.node.attribute("type").unwrap_or("file")
    }

    pub(super) fn device(&self) -> &'a str {
        self.node.attribute("device").unwrap_or("disk")
    }

    /// The bus, or what libvirt would choose by the target's name.
    pub(super) fn bus(&self) -> &'a str {
        child_attribute(self.node, "target", "bus").unwrap_or(match self.target {
            t if t.starts_with("vd") => "virtio",
            t if t.starts_with("xvd") => "xen",
            t if t.starts_with("sd") => "scsi",
            t if t.starts_with("fd") => "fdc",
            _ => "ide",
        })
    }

    /// A driver without a type is raw: libvirt does not probe formats.
    pub(super) fn format(&self) -> &'a str {
        child_attribute(self.node, "driver", "type").unwrap_or("raw")
    }

    pub(super) fn read_only(&self) -> bool {
        child(self.node, "readonly").is_some()
    }

    pub(super) fn serial(&self) -> Option<&'a str> {
        child_text(self.node, "serial").filter(|s| !s.is_empty())
    }

    fn driver(&self, attribute: &str) -> Option<&'a str> {
        child_attribute(self.node, "driver", attribute)
    }

    /// What the source is, for people.
    pub(super) fn source_text(&self) -> Option<String> {
        if let Some(store) = StoreSource::of_disk(self.node) {
            return Some(store.to_string());
        }
        let source = child(self.node, "source")?;
        let attribute = |name| source.attribute(name);
        match self.kind() {
            "volume" => Some(format!("{}/{}", attribute("pool")?, attribute("volume")?)),
            "network" => Some(format!("{}:{}", attribute("protocol")?, attribute("name").unwrap_or_default())),
            _ => attribute("path").or(attribute("file")).or(attribute("dev")).or(attribute("dir")).map(str::to_owned),
        }
    }

    /// Whether an export can stand in for this disk.
    pub(super) fn check(&self) -> Result<(), PlanError> {
        let target = || self.target.to_owned();
        let has = |name| child(self.node, name).is_some();
        if self.device() != "disk" {
            return Err(PlanError::NotADisk { target: target(), device: self.device().to_owned() });
        }
        if self.kind() == "vhostuser" {
            let socket = child_attribute(self.node, "source", "path").unwrap_or("?").to_owned();
            return Err(PlanError::ForeignVhostUser { target: target(), socket });
        }
        if self.bus() != "virtio" {
            return Err(PlanError::NotVirtio { target: target(), bus: self.bus().to_owned() });
        }
        let source = child(self.node, "source").ok_or_else(|| PlanError::NoSource { target: target() })?;
        if has("encryption") || child(source, "encryption").is_some() {
            return Err(PlanError::Encrypted { target: target() });
        }
        if !matches!((self.format(), self.kind()), ("raw", _) | ("qcow2", "file" | "block" | "volume")) {
            let image = self.source_text().unwrap_or_default();
            return Err(PlanError::NotRaw { target: target(), format: self.format().to_owned(), image });
        }
        // An empty <backingStore/> only says that the chain ends.
        let stands_on = child(self.node, "backingStore").is_some_and(|b| b.children().any(|n| n.is_element()));
        if stands_on && self.format() == "raw" {
            return Err(PlanError::BackingStore { target: target() });
        }
        if let Some(part) = ["slices", "dataStore"].into_iter().find(|name| child(source, name).is_some()) {
            return Err(PlanError::PartialSource { target: target(), element: part.to_owned() });
        }
        if has("transient") {
            return Err(PlanError::Transient { target: target() });
        }
        if has("shareable") && !self.read_only() {
            return Err(PlanError::Shareable { target: target() });
        }
        if self.driver("iommu") == Some("on") {
            return Err(PlanError::Iommu { target: target() });
        }
        match child_attribute(self.node, "blockio", "logical_block_size") {
            None | Some("0" | "512") => Ok(()),
            Some(size) => Err(PlanError::SectorSize { target: target(), block_bytes: size.to_owned() }),
        }
    }

    /// What backs the disk, with the images below it where the definition names them.
    pub(super) fn store(&self, volumes: &VolumeLookup<'_>) -> Result<StoreSource, PlanError> {
        let backing = StoreSource::backing_of(self.node)
            .map_err(|reason| PlanError::Source { target: self.target.to_owned(), reason })?;
        let unfit = || PlanError::NotRaw {
            target: self.target.to_owned(),
            format: self.format().to_owned(),
            image: self.source_text().unwrap_or_default(),
        };
        self.source(volumes)?.in_format(self.format(), backing).ok_or_else(unfit)
    }

    fn source(&self, volumes: &VolumeLookup<'_>) -> Result<StoreSource, PlanError> {
        let target = || self.target.to_owned();
        let source = child(self.node, "source").ok_or_else(|| PlanError::NoSource { target: target() })?;
        let kind = self.kind();
        match kind {
            "file" | "block" => {
                let attribute = if kind == "file" { "file" } else { "dev" };
                let path = source.attribute(attribute).filter(|p| !p.is_empty());
                let store = path.and_then(|p| StoreSource::path(kind, p));
                store.ok_or_else(|| PlanError::NoSource { target: target() })
            }
            "network" => match source.attribute("protocol").unwrap_or_default() {
                "nbd" => NbdUri::from_source(source)
                    .map(StoreSource::Nbd)
                    .map_err(|reason| PlanError::Source { target: target(), reason }),
                protocol => Err(PlanError::Protocol { target: target(), protocol: protocol.to_owned() }),
            },
            "volume" => {
                let pool = source.attribute("pool").unwrap_or_default();
                let volume = source.attribute("volume").unwrap_or_default();
                volumes(pool, volume).map_err(|reason| PlanError::Volume {
                    target: target(),
                    pool: pool.to_owned(),
                    volume: volume.to_owned(),
                    reason,
                })
            }
            other => Err(PlanError::SourceKind { target: target(), kind: other.to_owned() }),
        }
    }

    /// What the replaced disk no longer has, where that is more than a spelling.
    pub(super) fn remarks(&self) -> Vec<String> {
        let has = |name| child(self.node, name).is_some();
        let mut remarks = Vec::new();
        if has("iotune") || has("throttlefilters") {
            remarks
                .push("libvirt's I/O limits (<iotune>, <throttlefilters>) do not apply to vhost-user disks".to_owned());
        }
        if self.driver("error_policy").is_some() || self.driver("rerror_policy").is_some() {
            remarks.push(
                "the error policy no longer applies: the guest sees I/O errors, the VM does not pause".to_owned(),
            );
        }
        if matches!(self.node.attribute("snapshot"), Some("internal" | "external")) {
            remarks.push("libvirt can't snapshot a vhost-user disk: snapshots of this VM leave it out".to_owned());
        }
        if has("geometry") {
            remarks.push("the guest no longer sees the geometry given in <geometry>".to_owned());
        }
        if has("blockio") {
            remarks.push("the guest no longer sees the block sizes given in <blockio>".to_owned());
        }
        remarks
    }

    /// The vhost-user `<disk>` that stands in for this one. Whatever identifies the device to the guest stays, in its
    /// own spelling: target, boot order, alias, ACPI index, address, model, ring options.
    pub(super) fn replacement(&self, xml: &str, socket: &Path, options: &AttachOptions) -> String {
        let indent = indent_of(xml, self.node.range().start);
        let attribute = |name: &str, value: Option<&str>| {
            value.map(|v| format!(" {name}='{}'", escape_attribute(v))).unwrap_or_default()
        };
        let queues = options.queues.map(|q| q.to_string());
        let mut driver = "<driver name='qemu' type='raw'".to_owned();
        driver += &attribute("queues", queues.as_deref().or(self.driver("queues")));
        for name in ["queue_size", "event_idx", "packed", "page_per_vq"] {
            driver += &attribute(name, self.driver(name));
        }
        let model = attribute("model", self.node.attribute("model"));
        let path = escape_attribute(&socket.to_string_lossy());
        let seconds = options.reconnect_secs;
        let mut out = format!(
            "<disk type='vhostuser' device='disk'{model} snapshot='no'>\n{indent}  {driver}/>\n{indent}  \
             <source type='unix' path='{path}'>\n{indent}    <reconnect enabled='yes' timeout='{seconds}'/>\n{indent}  \
             </source>"
        );
        for name in ["target", "boot", "alias", "acpi", "address"] {
            if let Some(kept) = child(self.node, name) {
                out += &format!("\n{indent}  {}", &xml[kept.range()]);
            }
        }
        out += &format!("\n{indent}</disk>");
        out
    }
}
