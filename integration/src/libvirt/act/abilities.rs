//! What of a running VM can be changed, from its definition and what its guest said last.

use std::fmt;
use std::time::Duration;

use roxmltree::Node;

use crate::libvirt::stats::{GuestMemory, period_of};
use crate::libvirt::xml::{child, child_attribute, child_text, is, parse};

/// Whether something can be done, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ability {
    Yes,
    /// The reason, in words for an operator.
    No(String),
}

impl Ability {
    pub fn is_yes(&self) -> bool {
        matches!(self, Self::Yes)
    }

    /// Why not.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Yes => None,
            Self::No(reason) => Some(reason),
        }
    }

    fn no(reason: &str) -> Self {
        Self::No(reason.to_owned())
    }
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Yes => f.write_str("yes"),
            Self::No(reason) => write!(f, "no: {reason}"),
        }
    }
}

/// What of a running VM can be changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Abilities {
    /// The balloon can move: there is one, and the guest's driver answers.
    pub balloon: Ability,
    /// Memory can be taken by the balloon safely: the guest's figures are fresh, so that what it needs is known.
    pub shrink: Ability,
    /// The balloon gives memory back by itself when the guest runs out. Without it a balloon that is too large kills programs
    /// of the guest. It can't be changed while the VM runs.
    pub autodeflate: bool,
    /// The guest tells which pages it does not use, and the host takes them back without any balloon.
    pub free_page_reporting: bool,
    /// How often the guest is asked for its figures; `None`: never.
    pub period: Option<Duration>,
    pub guest: Option<GuestMemory>,
    pub devices: Vec<MemoryDevice>,
    /// The guest agent answers.
    pub agent: Ability,
    pub vcpus: VcpuAbility,
    pub disks: Vec<DiskAbility>,
    pub nics: Vec<Nic>,
    /// What makes changes less than they seem, in words.
    pub notes: Vec<String>,
}

/// A virtio-mem device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDevice {
    pub alias: String,
    /// The most it can hold.
    pub size_bytes: u64,
    pub block_bytes: u64,
    pub requested_bytes: u64,
    /// What it holds now.
    pub current_bytes: u64,
}

/// Virtual processors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuAbility {
    pub current: u32,
    pub maximum: u32,
    /// More can be added.
    pub add: Ability,
    /// Some can be removed.
    pub remove: Ability,
    /// The fewest that removing can reach.
    pub fewest: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskAbility {
    pub target: String,
    /// QEMU can limit it.
    pub limits: Ability,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Its device on the host.
    pub device: String,
    /// The host can limit it.
    pub limits: Ability,
}

impl Abilities {
    /// Reads the definition of the running VM.
    ///
    /// # Errors
    /// In words, where the definition cannot be read.
    pub(super) fn read(xml: &str, guest: Option<GuestMemory>) -> Result<Self, String> {
        let document = parse(xml).map_err(|e| e.to_string())?;
        let domain = document.root_element();
        let devices = child(domain, "devices").ok_or("the definition has no devices")?;
        let all = |name: &'static str| devices.children().filter(move |n| is(*n, name));
        let balloon = child(devices, "memballoon").filter(|b| b.attribute("model") != Some("none"));
        let period = balloon.and_then(period_of);
        let on = |name| balloon.is_some_and(|b| b.attribute(name) == Some("on"));
        let moves = balloon_moves(devices, balloon.is_some(), guest.is_some(), period);
        let autodeflate = on("autodeflate");
        let mut notes = Vec::new();
        if moves.is_yes() && !autodeflate {
            notes.push(
                "the balloon has no autodeflate: the guest kills programs if it needs memory that was taken".to_owned(),
            );
        }
        if child(domain, "memoryBacking").is_some_and(|m| child(m, "hugepages").is_some()) {
            notes.push("the memory is in huge pages: what a balloon takes hardly ever frees a whole one".to_owned());
        }
        Ok(Self {
            shrink: shrinks(&moves, guest, period),
            balloon: moves,
            autodeflate,
            free_page_reporting: on("freePageReporting"),
            period,
            guest,
            devices: all("memory").filter_map(memory_device).collect(),
            agent: agent(devices),
            vcpus: vcpus(domain),
            disks: all("disk").filter_map(disk).collect(),
            nics: all("interface").filter_map(nic).collect(),
            notes,
        })
    }
}

fn balloon_moves(devices: Node<'_, '_>, present: bool, said: bool, period: Option<Duration>) -> Ability {
    let is_passed = |n: &Node<'_, '_>| {
        is(*n, "hostdev") && n.attribute("type").is_some_and(|t| t == "pci" || t == "mdev")
            || is(*n, "interface") && n.attribute("type") == Some("hostdev")
    };
    if !present {
        return Ability::no("it has no balloon device; add <memballoon model='virtio'/> and start it anew");
    }
    if devices.children().any(|n| is_passed(&n)) {
        return Ability::no("a device of the host is passed through to it (VFIO), which pins all of its memory");
    }
    match (said, period) {
        (true, _) => Ability::Yes,
        (false, Some(_)) => Ability::no("its guest does not answer: the balloon's driver is not loaded (yet)"),
        (false, None) => Ability::no("its guest was never asked: set a period with `virsh dommemstat --period`"),
    }
}

fn shrinks(balloon: &Ability, guest: Option<GuestMemory>, period: Option<Duration>) -> Ability {
    if !balloon.is_yes() {
        return balloon.clone();
    }
    let Some(guest) = guest else { return Ability::no("its guest has said nothing of its memory") };
    // Nobody asks the guest regularly: what it said is as old as it is.
    let period = period.unwrap_or(Duration::from_secs(1));
    if guest.is_fresh(period) {
        return Ability::Yes;
    }
    let age = guest.age.as_secs();
    Ability::No(format!("what its guest said of its memory is {age} s old, so what it needs now is not known"))
}

fn bytes(node: Node<'_, '_>, name: &str) -> Option<u64> {
    let node = child(node, name)?;
    let number: u64 = node.text()?.trim().parse().ok()?;
    let factor = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KiB" | "k" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        _ => return None, // libvirt writes KiB
    };
    number.checked_mul(factor)
}

fn memory_device(memory: Node<'_, '_>) -> Option<MemoryDevice> {
    if memory.attribute("model") != Some("virtio-mem") {
        return None;
    }
    let target = child(memory, "target")?;
    Some(MemoryDevice {
        alias: child_attribute(memory, "alias", "name")?.to_owned(),
        size_bytes: bytes(target, "size")?,
        block_bytes: bytes(target, "block")?.max(1),
        requested_bytes: bytes(target, "requested")?,
        current_bytes: bytes(target, "current").unwrap_or(0),
    })
}

fn agent(devices: Node<'_, '_>) -> Ability {
    let targets = devices.children().filter(|n| is(*n, "channel")).filter_map(|n| child(n, "target"));
    let mut agents = targets.filter(|t| t.attribute("name") == Some("org.qemu.guest_agent.0"));
    match agents.next() {
        None => Ability::no("it has no channel for the guest agent (org.qemu.guest_agent.0)"),
        Some(target) if target.attribute("state") == Some("connected") => Ability::Yes,
        Some(_) => Ability::no("the guest agent does not answer: it is not installed in the guest, or not running"),
    }
}

fn vcpus(domain: Node<'_, '_>) -> VcpuAbility {
    let maximum = child_text(domain, "vcpu").and_then(|t| t.parse().ok()).unwrap_or(1);
    let current = child_attribute(domain, "vcpu", "current").and_then(|t| t.parse().ok()).unwrap_or(maximum);
    let listed = || child(domain, "vcpus").into_iter().flat_map(|v| v.children().filter(|n| is(*n, "vcpu")));
    let fixed =
        listed().filter(|v| v.attribute("enabled") == Some("yes") && v.attribute("hotpluggable") != Some("yes"));
    // Without a list all that it started with are fixed.
    let fewest = match listed().next() {
        Some(_) => u32::try_from(fixed.count()).unwrap_or(u32::MAX).clamp(1, current.max(1)),
        None => current,
    };
    VcpuAbility {
        current,
        maximum,
        add: match current < maximum {
            true => Ability::Yes,
            false => Ability::no(
                "it has all of its vCPUs; raise the maximum (`virsh setvcpus --maximum --config`) and start it anew",
            ),
        },
        remove: match current > fewest {
            true => Ability::Yes,
            false => Ability::no(
                "it has none that can be removed: those it started with stay, unless they are marked <vcpu hotpluggable='yes'>",
            ),
        },
        fewest,
    }
}

fn disk(disk: Node<'_, '_>) -> Option<DiskAbility> {
    let limits = match disk.attribute("type") {
        Some("vhostuser" | "vhostvdpa") => {
            Ability::no("it is a vhost-user disk: its requests don't pass QEMU, so its server must limit it")
        }
        _ => Ability::Yes,
    };
    Some(DiskAbility { target: child_attribute(disk, "target", "dev")?.to_owned(), limits })
}

fn nic(interface: Node<'_, '_>) -> Option<Nic> {
    let device = child_attribute(interface, "target", "dev")?.to_owned();
    let limits = match interface.attribute("type") {
        Some(kind @ ("vhostuser" | "hostdev" | "vdpa" | "user")) => {
            Ability::No(format!("it is of the type {kind}, which the host's kernel does not forward"))
        }
        _ => Ability::Yes,
    };
    Some(Nic { device, limits })
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm'><name>a</name><vcpu placement='static' current='2'>4</vcpu>
        <vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/><vcpu id='1' enabled='yes' hotpluggable='yes'/>
        <vcpu id='2' enabled='no' hotpluggable='yes'/></vcpus>
        <devices><disk type='file'><target dev='vda'/></disk><disk type='vhostuser'><target dev='vdb'/></disk>
        <interface type='bridge'><target dev='vnet0'/></interface><interface type='vhostuser'><target dev='v1'/></interface>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
        <memory model='virtio-mem'><target><size unit='KiB'>1048576</size><node>0</node><block unit='KiB'>2048</block>
        <requested unit='KiB'>524288</requested><current unit='KiB'>262144</current></target><alias name='virtiomem0'/></memory>
        <memballoon model='virtio' autodeflate='on' freePageReporting='on'><stats period='5'/></memballoon></devices></domain>";

    fn guest(age: u64) -> Option<GuestMemory> {
        Some(GuestMemory {
            total_bytes: 1000,
            free_bytes: 100,
            available_bytes: None,
            cache_bytes: None,
            swap_in_bps: None,
            swap_out_bps: None,
            major_faults: None,
            age: Duration::from_secs(age),
        })
    }

    #[test]
    fn a_definition_tells_what_can_be_changed() {
        let found = Abilities::read(XML, guest(15)).unwrap();
        assert!(found.balloon.is_yes() && found.shrink.is_yes() && found.agent.is_yes());
        assert!(found.autodeflate && found.free_page_reporting && found.notes.is_empty());
        assert_eq!(found.period, Some(Duration::from_secs(5)));
        let device = &found.devices[0];
        assert_eq!((device.alias.as_str(), device.size_bytes, device.block_bytes), ("virtiomem0", 1 << 30, 2 << 20));
        assert_eq!((device.requested_bytes, device.current_bytes), (512 << 20, 256 << 20));
        let vcpus = &found.vcpus;
        assert_eq!((vcpus.current, vcpus.maximum, vcpus.fewest), (2, 4, 1));
        assert!(vcpus.add.is_yes() && vcpus.remove.is_yes());
        assert!(found.disks[0].limits.is_yes() && !found.disks[1].limits.is_yes());
        assert!(found.nics[0].limits.is_yes() && !found.nics[1].limits.is_yes());
        let stale = Abilities::read(XML, guest(16)).unwrap();
        assert!(stale.balloon.is_yes());
        assert!(stale.shrink.reason().unwrap().contains("16 s old"));
    }

    #[test]
    fn every_no_has_its_reason() {
        let read = |xml: &str, guest| Abilities::read(xml, guest).unwrap();
        let never = read(&XML.replace("<stats period='5'/>", ""), None);
        assert!(never.balloon.reason().unwrap().contains("never asked"));
        let silent = read(XML, None);
        assert!(silent.balloon.reason().unwrap().contains("driver is not loaded"));
        let passed = read(&XML.replace("</devices>", "<hostdev type='pci'/></devices>"), guest(1));
        assert!(passed.balloon.reason().unwrap().contains("VFIO"));
        let none = read("<domain><devices><memballoon model='none'/></devices></domain>", None);
        assert!(none.balloon.reason().unwrap().contains("no balloon device"));
        assert!(
            none.shrink.reason().is_some() && none.vcpus.add.reason().is_some() && none.vcpus.remove.reason().is_some()
        );
        assert!(none.agent.reason().unwrap().contains("no channel"));
        let away = read(&XML.replace("state='connected'", "state='disconnected'"), guest(1));
        assert!(away.agent.reason().unwrap().contains("does not answer"));
        let plain = read(&XML.replace("autodeflate='on' ", ""), guest(1));
        assert!(plain.notes[0].contains("autodeflate"));
        let all = read("<domain><vcpu>2</vcpu><devices/></domain>", None);
        assert_eq!((all.vcpus.current, all.vcpus.fewest), (2, 2));
        assert!(Abilities::read("<domain", None).is_err());
        assert!(Abilities::read("<domain/>", None).is_err());
    }
}
