//! The attachment record: what a domain's disks were before they were pointed at exports.
//!
//! It lives in the domain's own `<metadata>`, so it travels with the definition (backup, migration, another host) and
//! needs no database to undo an attachment. libvirt keeps foreign metadata as it is, one element per namespace:
//!
//! ```text
//! <metadata>
//!   <prestage:attach xmlns:prestage="https://prestage.dev/xmlns/domain/1">
//!     <prestage:disk target="vda" socket="/run/prestage/vm/web/vda.sock">
//!       <prestage:original>…the <disk> element as it was, escaped…</prestage:original>
//!     </prestage:disk>
//!     <prestage:memoryBacking>…as it was, escaped; empty if there was none…</prestage:memoryBacking>
//!   </prestage:attach>
//! </metadata>
//! ```
//!
//! The originals are escaped text rather than elements: text comes back byte for byte, white space included.
//! `memoryBacking` is there only if shared memory was added with an attachment.

use std::path::PathBuf;

use roxmltree::Node;

use super::xml::{Splices, child, escape_attribute, escape_text, indent_of, inner_range, is};

/// The namespace of the record. The number is the format's version.
pub const NAMESPACE: &str = "https://prestage.dev/xmlns/domain/1";

/// All that the metadata of one domain says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) disks: Vec<DiskRecord>,
    /// The `<memoryBacking>` element before shared memory was added; empty text if there was none.
    pub(super) memory_backing: Option<String>,
}

/// One attached disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskRecord {
    pub(super) target: String,
    pub(super) socket: PathBuf,
    /// The exact text of the `<disk>` element.
    pub(super) original: String,
}

fn ours(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().name() == name && node.tag_name().namespace() == Some(NAMESPACE)
}

fn element<'a, 'i>(domain: Node<'a, 'i>) -> Option<Node<'a, 'i>> {
    child(domain, "metadata")?.children().find(|n| ours(*n, "attach"))
}

impl Record {
    /// The record of a domain, empty if it has none.
    pub(super) fn read(domain: Node<'_, '_>) -> Self {
        let Some(attach) = element(domain) else { return Self::default() };
        let text = |n: Node<'_, '_>| n.text().unwrap_or_default().to_owned();
        let disks = attach
            .children()
            .filter(|n| ours(*n, "disk"))
            .filter_map(|n| {
                Some(DiskRecord {
                    target: n.attribute("target")?.to_owned(),
                    socket: PathBuf::from(n.attribute("socket")?),
                    original: n.children().find(|c| ours(*c, "original")).map(text).unwrap_or_default(),
                })
            })
            .collect();
        let memory_backing = attach.children().find(|n| ours(*n, "memoryBacking")).map(text);
        Self { disks, memory_backing }
    }

    pub(super) fn disk(&self, target: &str) -> Option<&DiskRecord> {
        self.disks.iter().find(|d| d.target == target)
    }

    fn to_xml(&self, indent: &str) -> String {
        let mut out = format!("<prestage:attach xmlns:prestage=\"{NAMESPACE}\">");
        for disk in &self.disks {
            let target = escape_attribute(&disk.target);
            let socket = escape_attribute(&disk.socket.to_string_lossy());
            let original = escape_text(&disk.original);
            out += &format!("\n{indent}  <prestage:disk target=\"{target}\" socket=\"{socket}\">");
            out += &format!("\n{indent}    <prestage:original>{original}</prestage:original>");
            out += &format!("\n{indent}  </prestage:disk>");
        }
        if let Some(backing) = &self.memory_backing {
            out += &format!("\n{indent}  <prestage:memoryBacking>{}</prestage:memoryBacking>", escape_text(backing));
        }
        out += &format!("\n{indent}</prestage:attach>");
        out
    }

    /// Puts this record into the domain in the place of the one there; an empty record leaves no trace.
    pub(super) fn write(&self, xml: &str, domain: Node<'_, '_>, splices: &mut Splices) {
        let metadata = child(domain, "metadata");
        if self.disks.is_empty() {
            self.erase(xml, metadata, splices);
            return;
        }
        if let Some(old) = element(domain) {
            let range = old.range();
            splices.replace(range.clone(), self.to_xml(indent_of(xml, range.start)));
            return;
        }
        match metadata {
            Some(metadata) => {
                let range = metadata.range();
                let indent = indent_of(xml, range.start).to_owned();
                let inner = format!("{indent}  ");
                let text = format!("\n{inner}{}", self.to_xml(&inner));
                let last = metadata.children().rfind(Node::is_element).map(|n| n.range().end);
                match (last, inner_range(xml, metadata)) {
                    (Some(end), _) => splices.insert(end, text),
                    (None, Some(content)) => splices.insert(content.start, format!("{text}\n{indent}")),
                    (None, None) => splices.replace(range, format!("<metadata>{text}\n{indent}</metadata>")),
                }
            }
            None => {
                // Beside the name: every domain has one, and libvirt puts metadata there too.
                let beside = child(domain, "uuid").or_else(|| child(domain, "name"));
                let Some(range) = beside.map(|n| n.range()) else { return };
                let indent = indent_of(xml, range.start).to_owned();
                let inner = format!("{indent}  ");
                let text = format!("\n{indent}<metadata>\n{inner}{}\n{indent}</metadata>", self.to_xml(&inner));
                splices.insert(range.end, text);
            }
        }
    }

    fn erase(&self, xml: &str, metadata: Option<Node<'_, '_>>, splices: &mut Splices) {
        let Some(metadata) = metadata else { return };
        let Some(attach) = metadata.children().find(|n| ours(*n, "attach")) else { return };
        let alone =
            metadata.children().all(|n| n == attach || (n.is_text() && n.text().unwrap_or_default().trim().is_empty()));
        splices.remove_with_indent(xml, if alone { metadata.range() } else { attach.range() });
    }
}

/// Whether a `<disk>` is a vhost-user disk on exactly this record's socket.
pub(super) fn serves(record: &DiskRecord, disk: Node<'_, '_>) -> bool {
    is(disk, "disk")
        && disk.attribute("type") == Some("vhostuser")
        && child(disk, "source").and_then(|s| s.attribute("path")).is_some_and(|p| record.socket == *p)
}
