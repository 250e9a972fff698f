//! From a running machine's definition to that of a clone: pure functions on text.

use std::path::Path;

use roxmltree::Node;
use serde_json::json;

use crate::libvirt::disk::Disk;
use crate::libvirt::error::PlanError;
use crate::libvirt::record::NAMESPACE;
use crate::libvirt::xml::{Splices, child, child_attribute, child_text, escape_attribute, escape_text, is, parse};
use crate::memory::template::Template;

use super::{CLONE, TEMPLATE_NAMESPACE};

const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// Why a machine can't be saved as a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error(transparent)]
    Definition(#[from] PlanError),
    #[error(
        "disk `{target}` is writable: clones would write to the same image, and each would find it changed under its file \
         system. Make it <readonly/>, give the machine its changes in memory (overlayfs, tmpfs), or, if every writer is known to \
         agree on it, mark it <shareable/>"
    )]
    WritableDisk { target: String },
    #[error(
        "disk `{target}` is on a vhost-user socket, which needs memory that the server shares with the guest; a clone's memory \
         is its own. Give it its source back (`prestagectl vm detach`), start the machine anew and save it then"
    )]
    VhostUser { target: String },
    #[error(
        "its memory consists of {what}; a template maps one block of ordinary memory. Remove {element} with `virsh edit` and \
         start the machine anew"
    )]
    Memory { what: &'static str, element: &'static str },
    #[error("it has a {what} (<{element}>), whose state can't be copied to a clone; remove it first")]
    Device { what: &'static str, element: String },
    #[error(
        "it has UEFI variables of its own (<nvram>), a file that clones would share; use BIOS or stateless firmware \
         (<os firmware='efi'><loader stateless='yes'/>)"
    )]
    Nvram,
    #[error(
        "its definition passes arguments to QEMU (<qemu:commandline>), which a clone could contradict; remove them"
    )]
    Arguments,
    #[error(
        "it is itself a clone, of template {template}: its memory is a mapping of that; save the machine that it was made of, or another like it"
    )]
    Clone { template: String },
    #[error("it does not run; start it, and save it once it is as clones shall be")]
    NotRunning,
}

/// What is said of a machine by its definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    /// Such as `pc-q35-10.0`.
    pub(super) machine_type: String,
    /// The group QEMU runs as, where libvirt tells.
    pub(super) group: Option<u32>,
}

/// Checks whether clones can be made of a running machine.
pub(super) fn check(xml: &str) -> Result<Machine, Unfit> {
    let doc = parse(xml)?;
    let domain = doc.root_element();
    match domain.attribute("type") {
        Some("kvm" | "qemu") => {}
        kind => return Err(PlanError::NotQemu { kind: kind.unwrap_or("none").to_owned() }.into()),
    }
    let mut marks = child(domain, "metadata").into_iter().flat_map(|metadata| metadata.children());
    let of_clone = |n: &Node<'_, '_>| {
        n.tag_name().namespace() == Some(TEMPLATE_NAMESPACE) && matches!(n.tag_name().name(), STARTING | CLONE)
    };
    if let Some(mark) = marks.find(of_clone) {
        return Err(Unfit::Clone { template: mark.attribute("template").unwrap_or_default().to_owned() });
    }
    if domain.children().any(|n| n.is_element() && n.tag_name().namespace() == Some(QEMU_NAMESPACE)) {
        return Err(Unfit::Arguments);
    }
    if child(domain, "cpu").is_some_and(|cpu| child(cpu, "numa").is_some()) {
        return Err(Unfit::Memory { what: "NUMA cells", element: "<numa> and <maxMemory>" });
    }
    let backing = child(domain, "memoryBacking");
    if backing.is_some_and(|b| child(b, "hugepages").is_some()) {
        return Err(Unfit::Memory { what: "huge pages", element: "<hugepages>" });
    }
    if backing.is_some_and(|b| child(b, "locked").is_some()) {
        return Err(Unfit::Memory { what: "locked pages", element: "<locked>" });
    }
    if child(domain, "launchSecurity").is_some() {
        return Err(Unfit::Memory { what: "encrypted pages", element: "<launchSecurity>" });
    }
    let os = child(domain, "os");
    if os.is_some_and(|os| child(os, "nvram").is_some()) {
        return Err(Unfit::Nvram);
    }
    for disk in Disk::all(domain) {
        let target = || disk.target.to_owned();
        if disk.kind() == "vhostuser" {
            return Err(Unfit::VhostUser { target: target() });
        }
        let shareable = child(disk.node, "shareable").is_some();
        let empty = child(disk.node, "source").is_none();
        if !(disk.read_only() || disk.device() == "cdrom" || shareable || empty) {
            return Err(Unfit::WritableDisk { target: target() });
        }
    }
    for node in child(domain, "devices").into_iter().flat_map(|d| d.children()).filter(Node::is_element) {
        let what = match node.tag_name().name() {
            "hostdev" => "device of the host",
            "memory" => "memory device",
            "filesystem" => "shared folder",
            "tpm" => "TPM",
            "shmem" => "shared memory device",
            "vsock" => "vsock, whose number must be its own",
            "interface" if matches!(node.attribute("type"), Some("hostdev" | "vhostuser" | "vdpa")) => {
                "network interface of the host's"
            }
            _ => continue,
        };
        return Err(Unfit::Device { what, element: node.tag_name().name().to_owned() });
    }
    let machine_type = os.and_then(|os| child_attribute(os, "type", "machine")).unwrap_or_default().to_owned();
    let dac = domain.children().find(|n| is(*n, "seclabel") && n.attribute("model") == Some("dac"));
    let label = dac.and_then(|label| child_text(label, "label"));
    let group = label.and_then(|l| l.split_once(':')?.1.trim_start_matches('+').parse().ok());
    Ok(Machine { machine_type, group })
}

/// Where a clone's memory comes from.
#[derive(Debug, Clone, Copy)]
struct Memory<'a> {
    /// The template's folder, for the record in the clone's metadata.
    template: &'a Path,
    state: &'a Path,
    at: u64,
    bytes: u64,
    id: &'a str,
}

/// The record in a machine's metadata of what is being done with it. For libvirt's call that sets it `declaration` is empty: it
/// gives the element the prefix and the namespace itself.
pub(super) fn mark(prefix: &str, declaration: &str, word: &str, template: &str) -> String {
    format!("<{prefix}{word}{declaration} template=\"{}\"/>", escape_attribute(template))
}

/// The definition of a template's clone called `name`: of its own are name, UUID, MAC addresses, sockets and consoles; its memory is a private
/// mapping of the template's. Network interfaces are unplugged: until its guest is told otherwise, it uses the MAC and IP
/// addresses of the machine it was.
///
/// # Errors
/// The definition can't be read, or a path is no text.
pub fn clone_definition(template: &Template, name: &str) -> Result<String, PlanError> {
    let known = &template.manifest;
    let memory = Memory {
        template: template.path(),
        state: &template.state(),
        at: known.memory_at,
        bytes: known.memory_bytes,
        id: &known.memory_id,
    };
    with_memory(&template.definition, name, memory)
}

fn with_memory(xml: &str, name: &str, memory: Memory<'_>) -> Result<String, PlanError> {
    let doc = parse(xml)?;
    let domain = doc.root_element();
    let bad = |reason: &str| PlanError::BadXml { reason: reason.to_owned() };
    let named = child(domain, "name").ok_or_else(|| bad("the domain has no name"))?;
    let text = |path: &Path| path.to_str().map(str::to_owned).ok_or_else(|| bad("a path is not UTF-8"));
    let (state, template) = (text(memory.state)?, text(memory.template)?);
    let mut splices = Splices::default();
    // behind "<domain"
    splices.insert(domain.range().start + 7, format!(" xmlns:qemu='{QEMU_NAMESPACE}'"));
    let mark = mark("prestage:", &format!(" xmlns:prestage=\"{TEMPLATE_NAMESPACE}\""), STARTING, &template);
    let kept: String = child(domain, "metadata")
        .into_iter()
        .flat_map(|m| m.children().filter(Node::is_element))
        .filter(|n| !matches!(n.tag_name().namespace(), Some(NAMESPACE | TEMPLATE_NAMESPACE)))
        .map(|n| with_namespace(xml, n))
        .collect();
    splices.replace(named.range(), format!("<name>{}</name><metadata>{kept}{mark}</metadata>", escape_text(name)));
    for node in domain.children().filter(Node::is_element) {
        match node.tag_name().name() {
            "uuid" | "metadata" | "memoryBacking" => splices.remove_with_indent(xml, node.range()),
            "genid" => splices.replace(node.range(), "<genid/>".to_owned()),
            _ => {}
        }
    }
    for node in child(domain, "devices").into_iter().flat_map(|d| d.children()).filter(Node::is_element) {
        match node.tag_name().name() {
            "interface" => {
                let range = node.range();
                splices.replace(range, rebuilt(xml, node, &["mac", "link"], "<link state='down'/>", None));
            }
            "serial" | "parallel" | "console" if node.attribute("type") != Some("pty") => {
                let dropped = &["source", "log", "protocol", "reconnect"];
                splices.replace(node.range(), rebuilt(xml, node, dropped, "", Some("pty")));
            }
            "channel" if node.attribute("type") == Some("unix") => {
                splices.replace(node.range(), rebuilt(xml, node, &["source", "log"], "", None));
            }
            _ => {}
        }
    }
    let backend = json!({
        "qom-type": "memory-backend-file", "id": memory.id, "size": memory.bytes, "mem-path": state, "offset": memory.at,
        "share": false, "readonly": true, "rom": "off", "x-use-canonical-path-for-ramblock-id": false,
    });
    let machine = format!("memory-backend={}", memory.id);
    let arguments = ["-object", &backend.to_string(), "-machine", &machine, "-incoming", "defer"];
    let arguments: String = arguments.iter().map(|a| format!("<qemu:arg value='{}'/>", escape_attribute(a))).collect();
    let end = domain.range().end - "</domain>".len();
    splices.insert(end, format!("<qemu:commandline>{arguments}</qemu:commandline>\n"));
    Ok(splices.apply(xml))
}

/// What a clone is marked with until it runs.
pub(super) const STARTING: &str = "starting";

/// An element's text with the declaration of its namespace, which may stand further out.
fn with_namespace(xml: &str, node: Node<'_, '_>) -> String {
    let text = &xml[node.range()];
    let name = text[1..].split([' ', '\t', '\n', '/', '>']).next().unwrap_or_default();
    let (prefix, declared) = match name.split_once(':') {
        Some((prefix, _)) => (prefix, format!("xmlns:{prefix}=")),
        None => return text.to_owned(),
    };
    if text.split('>').next().is_some_and(|start| start.contains(&declared)) {
        return text.to_owned();
    }
    let namespace = escape_attribute(node.tag_name().namespace().unwrap_or_default());
    format!("<{name} xmlns:{prefix}=\"{namespace}\"{}", &text[1 + name.len()..])
}

/// A device with other children: `without` some, with `more`, and of another type where one is given.
fn rebuilt(xml: &str, node: Node<'_, '_>, without: &[&str], more: &str, kind: Option<&str>) -> String {
    let name = node.tag_name().name();
    let attributes: String = node
        .attributes()
        .filter(|a| !(kind.is_some() && a.name() == "type") && a.name() != "tty")
        .map(|a| format!(" {}='{}'", a.name(), escape_attribute(a.value())))
        .collect();
    let kind = kind.map(|kind| format!(" type='{kind}'")).unwrap_or_default();
    let children: String = node
        .children()
        .filter(|n| n.is_element() && !without.contains(&n.tag_name().name()))
        .map(|n| &xml[n.range()])
        .collect();
    format!("<{name}{kind}{attributes}>{children}{more}</{name}>")
}

/// How many network interfaces a definition has.
pub(super) fn interfaces(xml: &str) -> Vec<String> {
    let Ok(doc) = parse(xml) else { return Vec::new() };
    let devices = child(doc.root_element(), "devices").into_iter().flat_map(|d| d.children());
    let interfaces = devices.filter(|n| is(*n, "interface"));
    interfaces.filter_map(|n| child_attribute(n, "alias", "name").map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: &str = "<domain type='kvm' id='3'>
  <name>web</name>
  <uuid>48521e77-e102-44d5-88df-e45b6f9b55b3</uuid>
  <genid>1</genid>
  <metadata>
    <o:os xmlns:o='http://o'><o:x/></o:os>
    <prestage:attach xmlns:prestage='https://prestage.dev/xmlns/domain/1'/>
  </metadata>
  <memory unit='KiB'>262144</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <devices>
    <disk type='file' device='cdrom'><source file='/x.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><alias name='net0'/></interface>
    <serial type='unix'><source mode='bind' path='/run/web'/><target port='0'/></serial>
    <channel type='unix'><source mode='bind' path='/run/ga'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+109</label></seclabel>
</domain>";

    fn memory() -> Memory<'static> {
        Memory {
            template: Path::new("/t/web"),
            state: Path::new("/t/web/st'a,te"),
            at: 1 << 20,
            bytes: 256 << 20,
            id: "tc.ram",
        }
    }

    #[test]
    fn a_machine_tells_its_type_and_qemus_group() {
        assert_eq!(check(MACHINE), Ok(Machine { machine_type: "pc-q35-10.0".into(), group: Some(109) }));
    }

    #[test]
    fn a_clone_has_what_must_be_its_own_and_nothing_of_the_machines() {
        let xml = with_memory(MACHINE, "web<2>", memory()).unwrap();
        let doc = parse(&xml).unwrap();
        let domain = doc.root_element();
        assert_eq!(child_text(domain, "name"), Some("web<2>"));
        for gone in ["48521e77", "52:54:00", "/run/web", "/run/ga", "memoryBacking", "prestage:attach"] {
            assert!(!xml.contains(gone), "{gone} is left: {xml}");
        }
        for kept in [
            "<o:os",
            "br0",
            "org.qemu.guest_agent.0",
            "/x.iso",
            "<genid/>",
            "<target port='0'/>",
            "<link state='down'/>",
        ] {
            assert!(xml.contains(kept), "{kept} is missing: {xml}");
        }
        let line = domain.children().find(|n| n.tag_name().namespace() == Some(QEMU_NAMESPACE)).unwrap();
        let arguments: Vec<_> = line.children().filter_map(|n| n.attribute("value")).collect();
        assert_eq!(arguments[2..], ["-machine", "memory-backend=tc.ram", "-incoming", "defer"]);
        let backend: serde_json::Value = serde_json::from_str(arguments[1]).unwrap();
        assert_eq!(backend["mem-path"], "/t/web/st'a,te");
        assert_eq!((&backend["share"], &backend["offset"]), (&false.into(), &(1 << 20).into()));
        let marks = child(domain, "metadata").unwrap().children().filter(|n| n.tag_name().name() == STARTING);
        assert_eq!(marks.filter_map(|n| n.attribute("template")).collect::<Vec<_>>(), ["/t/web"]);
        // what is a clone can't be a template, while it starts and when it runs
        let of_web = Err(Unfit::Clone { template: "/t/web".to_owned() });
        assert_eq!(check(&xml), of_web);
        assert_eq!(check(&xml.replace(STARTING, CLONE)), of_web);
        let without = xml.replace(TEMPLATE_NAMESPACE, "https://example.org");
        assert_eq!(check(&without), Err(Unfit::Arguments));
    }

    #[test]
    fn what_a_clone_would_share_or_lose_is_refused() {
        let with = |from: &str, to: &str| check(&MACHINE.replace(from, to)).unwrap_err().to_string();
        let disk = |inner: &str| with("</devices>", &format!("<disk>{inner}<target dev='vda'/></disk></devices>"));
        assert!(disk("<source file='/x'/>").contains("`vda` is writable"));
        assert!(disk("<source file='/x'/><transient/>").contains("`vda` is writable"));
        assert!(
            check(&MACHINE.replace("</devices>", "<disk><source/><shareable/><target dev='vda'/></disk></devices>"))
                .is_ok()
        );
        let user = "<disk type='vhostuser'><source path='/s'/><target dev='vda'/></disk></devices>";
        assert!(with("</devices>", user).contains("vhost-user"));
        assert!(with("</devices>", "<hostdev/></devices>").contains("device of the host"));
        assert!(with("</devices>", "<memory model='virtio-mem'/></devices>").contains("memory device"));
        assert!(with("<os>", "<cpu><numa/></cpu><os>").contains("NUMA"));
        assert!(with("<source type='memfd'/>", "<hugepages/>").contains("huge pages"));
        assert!(with("</os>", "<nvram>/x</nvram></os>").contains("UEFI"));
        assert!(with("type='kvm'", "type='lxc'").contains("lxc"));
        assert!(check("<domain").is_err());
    }
}
