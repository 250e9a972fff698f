//! Shared guest memory: a vhost-user disk's server reads and writes the guest's buffers itself.
//!
//! libvirt needs `<access mode='shared'/>` in `<memoryBacking>`, or `memAccess='shared'` on every NUMA cell. With
//! `<source type='memfd'/>` the memory stays anonymous; without it libvirt backs it by a file in `memory_backing_dir`.

use roxmltree::{Document, Node};

use super::error::PlanError;
use super::xml::{Splices, canonical, child, child_attribute, indent_of, inner_range, is};

/// Whether the domain's memory is shared. Errors where a part is private by explicit wish.
pub(super) fn is_shared(domain: Node<'_, '_>) -> Result<bool, PlanError> {
    let cells: Vec<Node<'_, '_>> = child(domain, "cpu")
        .and_then(|cpu| child(cpu, "numa"))
        .map(|numa| numa.children().filter(|n| is(*n, "cell")).collect())
        .unwrap_or_default();
    if let Some(cell) = cells.iter().find(|c| c.attribute("memAccess") == Some("private")) {
        let id = cell.attribute("id").unwrap_or("?");
        return Err(PlanError::PrivateMemory { element: format!("the memory of NUMA cell {id} (<cell memAccess>)") });
    }
    let modules = child(domain, "devices").into_iter().flat_map(|d| d.children()).filter(|n| is(*n, "memory"));
    for module in modules {
        // An NVDIMM is a file of its own; buffers of disk requests do not lie in it.
        if module.attribute("access") == Some("private") && module.attribute("model") != Some("nvdimm") {
            return Err(PlanError::PrivateMemory { element: "a memory device (<memory access>)".to_owned() });
        }
    }
    let backing = child(domain, "memoryBacking");
    let shared = backing.and_then(|b| child_attribute(b, "access", "mode")) == Some("shared");
    Ok(shared || (!cells.is_empty() && cells.iter().all(|c| c.attribute("memAccess") == Some("shared"))))
}

/// A remark where shared memory works but is slow: a plain file on disk is written back by the kernel.
pub(super) fn remark(domain: Node<'_, '_>) -> Option<String> {
    let backing = child(domain, "memoryBacking")?;
    let source = child_attribute(backing, "source", "type");
    (source != Some("memfd") && child(backing, "hugepages").is_none()).then(|| {
        "the guest's memory is backed by a file in libvirt's memory_backing_dir; <source type='memfd'/> in <memoryBacking> \
         avoids its write-back"
            .to_owned()
    })
}

/// `<memoryBacking>` made shared: `original` is the element as it is, or empty if there is none.
fn shared_backing(original: &str, indent: &str) -> String {
    let fresh = || {
        format!(
            "<memoryBacking>\n{indent}  <source type='memfd'/>\n{indent}  <access mode='shared'/>\n{indent}</memoryBacking>"
        )
    };
    let Ok(doc) = Document::parse(original) else { return fresh() };
    let backing = doc.root_element();
    let Some(inner) = inner_range(original, backing) else { return fresh() };
    let mut splices = Splices::default();
    let mut added = String::new();
    let source = child(backing, "source");
    match source.and_then(|s| s.attribute("type")) {
        Some("memfd" | "file") => {}
        // Huge pages are files of hugetlbfs already.
        None if child(backing, "hugepages").is_some() => {}
        _ => match source {
            Some(source) => splices.replace(source.range(), "<source type='memfd'/>".to_owned()),
            None => added += &format!("\n{indent}  <source type='memfd'/>"),
        },
    }
    match child(backing, "access") {
        Some(access) => splices.replace(access.range(), "<access mode='shared'/>".to_owned()),
        None => added += &format!("\n{indent}  <access mode='shared'/>"),
    }
    splices.insert(inner.start, added);
    splices.apply(original)
}

/// Makes the domain's memory shared and returns what `<memoryBacking>` was (empty if there was none).
pub(super) fn share(xml: &str, domain: Node<'_, '_>, splices: &mut Splices) -> String {
    if let Some(backing) = child(domain, "memoryBacking") {
        let range = backing.range();
        let original = xml[range.clone()].to_owned();
        let indent = indent_of(xml, range.start);
        splices.replace(range, shared_backing(&original, indent));
        return original;
    }
    let beside = ["currentMemory", "memory", "name"].iter().find_map(|name| child(domain, name));
    if let Some(range) = beside.map(|n| n.range()) {
        let indent = indent_of(xml, range.start);
        splices.insert(range.end, format!("\n{indent}{}", shared_backing("", indent)));
    }
    String::new()
}

/// Puts back the `<memoryBacking>` that [`share`] replaced, unless something else needs it or it was changed since: then
/// it stays, and the remark says so. `disk` is the disk being detached.
pub(super) fn unshare(
    xml: &str,
    domain: Node<'_, '_>,
    disk: Option<Node<'_, '_>>,
    original: &str,
    splices: &mut Splices,
) -> Option<String> {
    let Some(backing) = child(domain, "memoryBacking") else {
        return None; // removed by hand
    };
    let needs_it =
        |n: Node<'_, '_>| n.attributes().any(|a| matches!(a.value(), "vhostuser" | "vhost-user" | "virtiofs"));
    let mut others = child(domain, "devices").into_iter().flat_map(|d| d.children()).filter(|n| Some(*n) != disk);
    if others.any(|n| n.descendants().any(needs_it)) {
        return Some("shared memory was left on: another device of the VM needs it".to_owned());
    }
    let expected = shared_backing(original, "");
    let unchanged = Document::parse(&expected).is_ok_and(|e| canonical(e.root_element()) == canonical(backing));
    if !unchanged {
        return Some("shared memory was left on: <memoryBacking> was changed after the disk was attached".to_owned());
    }
    if original.is_empty() {
        splices.remove_with_indent(xml, backing.range());
    } else {
        splices.replace(backing.range(), original.to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(xml: &str) -> Result<bool, PlanError> {
        let doc = Document::parse(xml).unwrap();
        is_shared(doc.root_element())
    }

    #[test]
    fn shared_memory_is_recognised_in_all_its_spellings() {
        for (xml, expected) in [
            ("<domain/>", false),
            ("<domain><memoryBacking/></domain>", false),
            ("<domain><memoryBacking><source type='memfd'/></memoryBacking></domain>", false),
            ("<domain><memoryBacking><access mode='shared'/></memoryBacking></domain>", true),
            ("<domain><cpu><numa><cell id='0' memAccess='shared'/></numa></cpu></domain>", true),
            ("<domain><cpu><numa><cell id='0' memAccess='shared'/><cell id='1'/></numa></cpu></domain>", false),
        ] {
            assert_eq!(shared(xml), Ok(expected), "{xml}");
        }
        for xml in [
            "<domain><memoryBacking><access mode='shared'/></memoryBacking><cpu><numa><cell id='1' memAccess='private'/></numa></cpu></domain>",
            "<domain><memoryBacking><access mode='shared'/></memoryBacking><devices><memory model='dimm' access='private'/></devices></domain>",
        ] {
            assert!(matches!(shared(xml), Err(PlanError::PrivateMemory { .. })), "{xml}");
        }
    }

    #[test]
    fn sharing_and_unsharing_give_the_first_text_back() {
        for backing in [
            "",
            "\n  <memoryBacking/>",
            "\n  <memoryBacking></memoryBacking>",
            "\n  <memoryBacking>\n    <hugepages/>\n    <locked/>\n  </memoryBacking>",
            "\n  <memoryBacking>\n    <source type='anonymous'/>\n    <access mode='private'/>\n    <allocation mode='immediate'/>\n  </memoryBacking>",
            "\n  <memoryBacking>\n    <source type='file'/>\n  </memoryBacking>",
        ] {
            let xml = format!("<domain>\n  <name>n</name>\n  <memory>1</memory>{backing}\n  <devices/>\n</domain>");
            let doc = Document::parse(&xml).unwrap();
            let mut splices = Splices::default();
            let original = share(&xml, doc.root_element(), &mut splices);
            let changed = splices.apply(&xml);
            assert_eq!(shared(&changed), Ok(true), "{changed}");
            let doc = Document::parse(&changed).unwrap();
            let mut splices = Splices::default();
            assert_eq!(unshare(&changed, doc.root_element(), None, &original, &mut splices), None);
            assert_eq!(splices.apply(&changed), xml);
        }
    }

    #[test]
    fn memory_stays_shared_where_it_was_changed_or_is_needed() {
        let changed = "<domain><memory>1</memory><memoryBacking><source type='memfd'/><access mode='shared'/><locked/></memoryBacking></domain>";
        let needed = "<domain><memory>1</memory><memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\
                      <devices><filesystem><driver type='virtiofs'/></filesystem></devices></domain>";
        for xml in [changed, needed] {
            let doc = Document::parse(xml).unwrap();
            let mut splices = Splices::default();
            assert!(unshare(xml, doc.root_element(), None, "", &mut splices).is_some());
            assert_eq!(splices.apply(xml), xml);
        }
    }
}
