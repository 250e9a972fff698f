//! What can go wrong, and what to do about it.

use std::path::PathBuf;
use std::time::Duration;

use super::store::StoreSourceError;
use super::template::Unfit;

/// Why a disk can't be attached or detached, from the domain's definition alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("the domain XML cannot be read: {reason}")]
    BadXml { reason: String },
    #[error("the domain's type is `{kind}`: only `kvm` and `qemu` domains can use a vhost-user disk")]
    NotQemu { kind: String },
    #[error("there is no disk `{target}`; this VM's disks: {}", list(present))]
    NoSuchDisk { target: String, present: Vec<String> },
    #[error("disk `{target}` is already attached (socket {}); detach it first to change how it is attached", socket.display())]
    AlreadyAttached { target: String, socket: PathBuf },
    #[error("disk `{target}` is not attached; attached disks of this VM: {}", list(attached))]
    NotAttached { target: String, attached: Vec<String> },
    #[error("disk `{target}` is a {device}: only hard disks (device='disk') can be attached")]
    NotADisk { target: String, device: String },
    #[error(
        "disk `{target}` is on the {bus} bus: vhost-user needs virtio, which is another device to the guest. Install virtio \
         drivers in the guest, change the disk to <target dev='vda' bus='virtio'/> with `virsh edit`, boot once, then attach"
    )]
    NotVirtio { target: String, bus: String },
    #[error(
        "disk `{target}` has the format {format}: raw disks and qcow2 images in files are read directly. Serve the image as raw over NBD, for instance \
         `qemu-nbd --persistent --shared=8 --format={format} --socket=/run/{target}.nbd {image}`, \
         point the domain's disk at that socket (<disk type='network'>, protocol nbd), then attach"
    )]
    NotRaw { target: String, format: String, image: String },
    #[error(
        "disk `{target}` is raw and has a backing store, which a raw disk can't have: take <backingStore> out, or name the \
         disk's format in <driver type=…>"
    )]
    BackingStore { target: String },
    #[error(
        "disk `{target}` is encrypted by libvirt: serve it decrypted over NBD (qemu-nbd --object secret,…) and attach that"
    )]
    Encrypted { target: String },
    #[error(
        "disk `{target}` is marked <shareable/>: another host may write to it, and the cache would serve what it was \
         before. Remove <shareable/> if this VM alone writes to it, or mark it <readonly/>"
    )]
    Shareable { target: String },
    #[error(
        "disk `{target}` is marked <transient/>: its writes must not be kept, which an export can't do. Remove the mark"
    )]
    Transient { target: String },
    #[error("disk `{target}` uses a part of its source (<{element}>): attach whole files, devices or exports only")]
    PartialSource { target: String, element: String },
    #[error("disk `{target}` has no source to serve")]
    NoSource { target: String },
    #[error(
        "disk `{target}` is read over {protocol}: only NBD is supported. Bridge it, for instance \
         `nbdkit curl …`, `qemu-nbd --image-opts …`, or map it to a block device, and point the domain's disk there"
    )]
    Protocol { target: String, protocol: String },
    #[error("disk `{target}`: {reason}")]
    Source { target: String, reason: StoreSourceError },
    #[error("disk `{target}` has a source of type {kind}: only file, block, NBD and pool volumes can be attached")]
    SourceKind { target: String, kind: String },
    #[error("disk `{target}` is volume {volume} of pool {pool}, which can't be resolved: {reason}")]
    Volume { target: String, pool: String, volume: String, reason: String },
    #[error("disk `{target}` is already a vhost-user disk of another server (socket {socket})")]
    ForeignVhostUser { target: String, socket: String },
    #[error(
        "disk `{target}` shows {block_bytes}-byte sectors to the guest (<blockio logical_block_size>): exports have 512-byte \
         sectors, and the guest would misread its partition table. Leave this disk as it is"
    )]
    SectorSize { target: String, block_bytes: String },
    #[error(
        "disk `{target}` sits behind a virtual IOMMU (<driver iommu='on'>), which exports do not offer; set iommu='off' first"
    )]
    Iommu { target: String },
    #[error(
        "the domain's memory is not shared, so no other process can reach the guest's requests. Add \
         <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking> with `virsh edit`, or let it be added \
         with --enable-shared-memory"
    )]
    MemoryNotShared,
    #[error(
        "{element} is set to private access, which overrides shared memory: set it to 'shared' with `virsh edit` \
         (it can't be changed automatically)"
    )]
    PrivateMemory { element: String },
    #[error("socket path {} can't be used: {reason}", path.display())]
    SocketPath { path: PathBuf, reason: String },
    #[error("{queues} queues can't be given to a disk: choose 1 to 256")]
    Queues { queues: u16 },
    #[error(
        "the record of disk `{target}` in the domain's metadata is damaged ({reason}): put the disk's source back with \
         `virsh edit` and remove the <prestage:attach> element"
    )]
    Record { target: String, reason: String },
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Why a call to the hypervisor failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    #[error(
        "libvirt at {uri} can't be reached: {reason}. Is libvirtd (or virtqemud) running, and is its socket open to this user?"
    )]
    Unreachable { uri: String, reason: String },
    #[error(
        "libvirt did not finish `{what}` within {after:?}; it may still do so. Look with `virsh list --all`; if that hangs too, \
         restart libvirtd (running VMs are not affected)"
    )]
    Timeout { what: &'static str, after: Duration },
    #[error(
        "too many calls are waiting for libvirt: it is slow or hangs. Try again, and if this stays, restart libvirtd"
    )]
    Busy,
    #[error("the libvirt thread could not be started or has ended: {reason}")]
    Thread { reason: String },
    #[error("there is no VM `{vm}`; `virsh list --all` shows all")]
    NoSuchVm { vm: String },
    #[error("VM `{vm}`: {plan}")]
    Plan { vm: String, plan: PlanError },
    #[error(
        "VM `{vm}` is transient: it has no persistent definition to change. Make it persistent first: \
         `virsh dumpxml --security-info --inactive {vm} > vm.xml && virsh define vm.xml`"
    )]
    TransientVm { vm: String },
    #[error(
        "VM `{vm}` has a saved state, which holds its old disks and would be resumed with them. Start it and shut it down, or \
         drop the saved state with `virsh managedsave-remove {vm}`"
    )]
    ManagedSave { vm: String },
    #[error("libvirt refuses the changed definition of VM `{vm}`, nothing was changed: {reason}")]
    Refused { vm: String, reason: String },
    #[error("libvirt took the changed definition of VM `{vm}` but shows another one ({found}); {rollback}")]
    NotTaken { vm: String, found: String, rollback: String },
    #[error("VM `{vm}` can't be a template: {unfit}")]
    Unfit { vm: String, unfit: Box<Unfit> },
    #[error("QEMU of VM `{vm}` could not {what}: {reason}")]
    Qemu { vm: String, what: &'static str, reason: String },
    #[error("libvirt could not {what}: {reason}")]
    Libvirt { what: String, reason: String },
}
