//! Every setting, declared once: type, default, check, what it takes to change it, and its description. From this list come the types,
//! the reader, the commented reference file and the comparison on reload.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::filter::LevelFilter;

use super::reader::{Problems, Section};
use super::value::{Bytes, Count, Engine, HugePages, Mode, RamSize, RateLimit, SandboxMode, Setting};
use super::{Change, reference};

/// Any value of the type is fine.
fn any<T>(_: &T) -> Result<(), String> {
    Ok(())
}

fn at_least(min: Bytes) -> impl Fn(&Bytes) -> Result<(), String> {
    move |size| match *size >= min {
        true => Ok(()),
        false => Err(format!("{} is too small; at least {} is needed", shown(size), shown(&min))),
    }
}

fn between(min: u32, max: u32) -> impl Fn(&u32) -> Result<(), String> {
    move |number| match (min..=max).contains(number) {
        true => Ok(()),
        false => Err(format!("{number} is out of range; it is {min} to {max}")),
    }
}

/// Text of so many characters, none of them a control character.
pub(super) fn between_texts(min: usize, max: usize) -> impl Fn(&String) -> Result<(), String> {
    move |text| match (min..=max).contains(&text.chars().count()) && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(format!("it is {min} to {max} characters on one line")),
    }
}

fn lasts(min: Duration, max: Duration) -> impl Fn(&Duration) -> Result<(), String> {
    move |duration| match (min..=max).contains(duration) {
        true => Ok(()),
        false => Err(format!("{} is out of range; it is {} to {}", shown(duration), shown(&min), shown(&max))),
    }
}

fn shown<T: Setting>(value: &T) -> String {
    value.show().unwrap_or_default()
}

fn log_filter(filter: &String) -> Result<(), String> {
    // The parser takes any word for the name of a part, of which alone it logs then.
    let word = filter.split(',').map(str::trim).find(|part| {
        !part.is_empty() && !part.contains(['=', ':', '[', ']', '{', '}']) && part.parse::<LevelFilter>().is_err()
    });
    if let Some(word) = word {
        return Err(format!(
            "`{word}` is not a level; use error, warn, info, debug, trace or off, or a level for one part, such as prestage_cache=debug"
        ));
    }
    match tracing_subscriber::EnvFilter::builder().parse(filter) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("`{filter}` is not a log filter ({error}); use error, warn, info, debug or trace")),
    }
}

fn ram_size(size: &RamSize) -> Result<(), String> {
    match size {
        RamSize::Bytes(bytes) => at_least(Bytes::mib(16))(&Bytes(*bytes)),
        RamSize::Percent(_) => Ok(()),
    }
}

fn probability(value: &f64) -> Result<(), String> {
    match (0.0..=1.0).contains(value) {
        true => Ok(()),
        false => Err(format!("{value} is not a probability; it is 0 to 1")),
    }
}

fn bits(value: &f64) -> Result<(), String> {
    within(*value, 0.0, 8.0)
}

fn within(value: f64, least: f64, most: f64) -> Result<(), String> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{value} is out of range; it is {least} to {most}")),
    }
}

fn risk(value: &f64) -> Result<(), String> {
    within(*value, 1e-4, 0.5)
}

fn overcommit(value: &f64) -> Result<(), String> {
    within(*value, 0.1, 64.0)
}

fn reserve(value: &f64) -> Result<(), String> {
    within(*value, 0.0, 0.9)
}

fn shards(count: &Count) -> Result<(), String> {
    match count {
        Count::Auto => Ok(()),
        Count::Fixed(number) => between(1, 64)(number),
    }
}

fn rate(limit: &RateLimit) -> Result<(), String> {
    match limit {
        RateLimit::Unlimited => Ok(()),
        RateLimit::BytesPerSecond(bytes) => at_least(Bytes::mib(1))(&Bytes(*bytes)),
    }
}

fn power_of_two(number: &u32) -> Result<(), String> {
    match number.is_power_of_two() && (16..=1024).contains(number) {
        true => Ok(()),
        false => Err(format!("{number} is not allowed; it is a power of two, 16 to 1024")),
    }
}

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

macro_rules! sections {
    ($($(#[doc = $about:literal])* $name:ident: $Type:ident {
        $($(#[doc = $doc:literal])* $field:ident: $ty:ty = $default:expr, $check:expr, $effect:ident;)*
    })*) => {
        $(
            $(#[doc = $about])*
            #[derive(Debug, Clone, PartialEq)]
            pub struct $Type { $($(#[doc = $doc])* pub $field: $ty,)* }

            impl Default for $Type {
                fn default() -> Self {
                    Self { $($field: $default,)* }
                }
            }

            impl $Type {
                fn read(mut section: Section, problems: &mut Problems) -> Self {
                    let read = Self { $($field: section.get(stringify!($field), $default, $check, problems),)* };
                    section.finish(problems, section_of);
                    read
                }
            }
        )*

        /// Names of the sections.
        pub(super) const SECTIONS: &[&str] = &[$(stringify!($name)),*];

        fn section_of(key: &str) -> Option<&'static str> {
            $($(if key == stringify!($field) { return Some(stringify!($name)); })*)*
            None
        }

        /// All sections.
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct Sections { $($(#[doc = $about])* pub $name: $Type,)* }

        impl Sections {
            pub(super) fn read(mut take: impl FnMut(&'static str, &mut Problems) -> Section, problems: &mut Problems) -> Self {
                Self { $($name: { let section = take(stringify!($name), problems); $Type::read(section, problems) },)* }
            }

            pub(super) fn reference(&self, out: &mut reference::Writer) {
                $(
                    out.section(stringify!($name), &[$($about),*]);
                    $(out.key(stringify!($field), &[$($doc),*], self.$name.$field.show());)*
                )*
            }

            /// These settings, with those of `new` that take effect without a restart.
            pub(super) fn reloaded(&self, new: &Self) -> Self {
                Self { $($name: $Type { $($field: sections!(@of $effect, self.$name.$field, new.$name.$field).clone(),)* },)* }
            }

            pub(super) fn diff(&self, new: &Self, out: &mut Vec<Change>) {
                $($(
                    if self.$name.$field != new.$name.$field {
                        out.push(Change {
                            key: concat!(stringify!($name), ".", stringify!($field)).to_owned(),
                            needs_restart: sections!(@restart $effect),
                            old: self.$name.$field.show(),
                            new: new.$name.$field.show(),
                        });
                    }
                )*)*
            }
        }
    };
    (@of restart, $running:expr, $new:expr) => { $running };
    (@of reload, $running:expr, $new:expr) => { $new };
    (@restart restart) => { true };
    (@restart reload) => { false };
}

sections! {
    /// The daemon itself.
    daemon: Daemon {
        /// Folder of the database. An absolute path; made if missing.
        state_dir: PathBuf = PathBuf::from("/var/lib/prestage"), any, restart;
        /// Folder of the sockets. An absolute path; made if missing. Keep it short: a socket path holds 107 bytes.
        run_dir: PathBuf = PathBuf::from("/run/prestage"), any, restart;
        /// What is logged: error, warn, info, debug, trace, or filters such as "info,prestage_cache=debug".
        log: String = "info".to_owned(), log_filter, reload;
        /// "full": what parses guests' data runs without capabilities and under seccomp, and writes to its own folders only, as far as the kernel can confine it. "off": for debugging.
        sandbox: SandboxMode = SandboxMode::Full, any, restart;
        /// Whom prestaged becomes when it is started as root. Without such a user it stays root without capabilities.
        user: String = "prestage".to_owned(), between_texts(1, 32), restart;
        /// Folders beside `templates` in `state_dir` in which templates may be saved and started from; prestaged's user must be able to write there. Example: template_dirs = ["/srv/templates"]
        template_dirs: Vec<PathBuf> = Vec::new(), any, restart;
    }

    /// The cache: write-through, it never holds the only copy of anything.
    cache: Cache {
        /// Size of the RAM tier: a size of at least 16MiB, or a share of the host's memory above 0% and at most 90%.
        ram_size: RamSize = RamSize::Percent(10.0), ram_size, reload;
        /// Huge pages for the RAM tier: "try", "no" or "require" (then the daemon does not start without them).
        huge_pages: HugePages = HugePages::Try, any, restart;
        /// File or block device of the SSD tier. Unset: no SSD tier. Example: ssd_path = "/var/cache/prestage/cache.ssd"
        ssd_path: Option<PathBuf> = None, any, restart;
        /// Size of the SSD tier, at least 64MiB. Of a block device, at most the device is used.
        ssd_size: Bytes = Bytes::gib(16), at_least(Bytes::mib(64)), reload;
        /// Event-loop threads: "auto" (one for each four CPUs, 1 to 8) or 1 to 64.
        shards: Count = Count::Auto, shards, restart;
        /// What carries out I/O: "auto" (io_uring where allowed, else threads), "io_uring" or "thread_pool".
        engine: Engine = Engine::Auto, any, restart;
    }

    /// Reading ahead of the guest.
    prefetch: Prefetch {
        /// Off: guests are served and learned from, nothing is read ahead.
        enabled: bool = true, any, reload;
        /// Lowest probability, 0 to 1, at which a predicted block is read ahead.
        threshold: f64 = 0.125, probability, reload;
        /// Most bytes being read ahead at once, for each store; at least 1MiB.
        max_bytes_in_flight: Bytes = Bytes::mib(16), at_least(Bytes::mib(1)), reload;
        /// Most bytes a second read ahead, for each store: "unlimited" or at least "1MiB/s". Guests' own reads are never limited.
        rate_per_store: RateLimit = RateLimit::Unlimited, rate, reload;
    }

    /// Backing stores.
    store: StoreSettings {
        /// Connections to one NBD server that allows several, 1 to 16.
        nbd_connections: u32 = 4, between(1, 16), restart;
        /// How long requests wait for a lost store to come back before the guest gets an error; 1s to 24h.
        retry_for: Duration = Duration::from_secs(60), lasts(SECOND, HOUR * 24), restart;
        /// How long one request may take before its connection counts as dead; 1s to 1h.
        request_timeout: Duration = Duration::from_secs(30), lasts(SECOND, HOUR), restart;
        /// Folder below which the backing files that qcow2 images name are opened. Unset: none; name the whole chain with ?backing=. Example: image_folder = "/var/lib/libvirt/images"
        image_folder: Option<PathBuf> = None, any, reload;
        /// Folder with the passphrases of encrypted images: NAME.key for the disk NAME. Unset: none. Example: key_folder = "/etc/prestage/keys"
        key_folder: Option<PathBuf> = None, any, reload;
        /// Folders of files, devices and NBD servers' sockets, or single ones, that may be served when somebody who may use the API, or a machine's definition, names them. What a `[[disk]]` names is allowed anyway.
        allowed: Vec<PathBuf> = ["/var/lib/libvirt/images", "/dev/mapper", "/dev/rbd", "/dev/zvol"].map(PathBuf::from).to_vec(), any, reload;
    }

    /// Sockets through which hypervisors reach their disks.
    export: ExportSettings {
        /// Permission bits of the disks' sockets, in octal.
        socket_mode: Mode = Mode(0o660), any, restart;
        /// Group that owns them, such as the one QEMU runs in. Unset: the daemon's. Example: socket_group = "kvm"
        socket_group: Option<String> = None, any, restart;
        /// Folders beside `daemon.run_dir` in which disks' sockets may be made; prestaged's user must be able to write there.
        socket_dirs: Vec<PathBuf> = Vec::new(), any, restart;
        /// Most queues of a disk, 1 to 64. The guest uses as many as it likes of them, at most one per vCPU.
        max_queues: u32 = 8, between(1, 64), restart;
        /// Requests a queue holds: a power of two, 16 to 1024.
        queue_size: u32 = 256, power_of_two, restart;
    }

    /// Disks over NBD, for those that say `nbd = true`. Each has a unix socket in `run_dir`/nbd; TCP is for all of them, and with TLS only.
    nbd: Nbd {
        /// Address and port for TCP. Unset: unix sockets only. Needs the three files below. Example: listen = "192.0.2.1:10809"
        listen: Option<SocketAddr> = None, any, restart;
        /// The server's certificate and those that lead to its authority, in PEM. Example: tls_cert = "/etc/prestage/nbd.crt"
        tls_cert: Option<PathBuf> = None, any, restart;
        /// Its private key, in PEM. Example: tls_key = "/etc/prestage/nbd.key"
        tls_key: Option<PathBuf> = None, any, restart;
        /// Certificates of the authorities that vouch for clients, in PEM: who has a certificate of theirs has all these disks. Example: tls_client_ca = "/etc/prestage/nbd-clients.crt"
        tls_client_ca: Option<PathBuf> = None, any, restart;
        /// Connections to one disk at a time, 1 to 256. Each takes up to 36MiB while it is busy.
        max_clients: u32 = 16, between(1, 256), restart;
    }

    /// The connection to libvirt.
    libvirt: Libvirt {
        /// Off: disks are served, machines are neither watched nor changed.
        enabled: bool = true, any, restart;
        /// Which hypervisor.
        uri: String = "qemu:///system".to_owned(), any, restart;
        /// How long one call may take; 1s to 1h.
        timeout: Duration = Duration::from_secs(30), lasts(SECOND, HOUR), restart;
    }

    /// What machines use, what they are going to use, and what is done about it.
    demand: Demand {
        /// Off: nothing is measured, forecast or changed.
        enabled: bool = true, any, restart;
        /// Time between two measurements; 1s to 1m.
        every: Duration = SECOND, lasts(SECOND, SECOND * 60), restart;
        /// Probability, 0.0001 to 0.5, with which a machine may need more than it is given for what is foreseen.
        risk: f64 = 0.1, risk, reload;
        /// How long a machine must have used less before anything is taken from it; 10s to 24h.
        idle: Duration = SECOND * 1800, lasts(SECOND * 10, HOUR * 24), reload;
        /// How long after a change nothing is taken from a machine; 5s to 24h. Doubled each time that this proves too short.
        cool_down: Duration = SECOND * 300, lasts(SECOND * 5, HOUR * 24), reload;
        /// vCPUs that machines may have for each CPU of the host, 0.1 to 64.
        cpu_overcommit: f64 = 4.0, overcommit, reload;
        /// Share of the host's memory that is not for machines, 0 to 0.9.
        host_memory: f64 = 0.1, reserve, reload;
        /// Most bytes a second of the disks of all machines together: "unlimited" (then disks are not managed) or at least "1MiB/s".
        disk_rate: RateLimit = RateLimit::Unlimited, rate, reload;
        /// The same of their network interfaces.
        network_rate: RateLimit = RateLimit::Unlimited, rate, reload;
        /// Days that decisions are kept, 1 to 3650.
        decision_days: u32 = 90, between(1, 3650), reload;
        /// Most bytes of measurements, at least 1MiB; the finest go first.
        series_bytes: Bytes = Bytes::gib(1), at_least(Bytes::mib(1)), reload;
    }

    /// Guests' memory that the host has swapped out.
    memory: Memory {
        /// Off: guests' memory is neither watched nor moved.
        enabled: bool = true, any, restart;
        /// Bring in swapped pages before the guest touches them. Off: it is only learned which. A machine's policy comes before this.
        prestage: bool = true, any, reload;
        /// The program that may look into hypervisors. Unset: `prestage-memory` beside `prestaged`. Example: helper = "/usr/lib/prestage/prestage-memory"
        helper: Option<PathBuf> = None, any, restart;
        /// Share of the host's memory, 0 to 0.9, that bringing in leaves free.
        reserve: f64 = 0.05, reserve, reload;
        /// Most bytes a second brought in from compressed memory (zram): "unlimited" or at least "1MiB/s".
        zram_rate: RateLimit = RateLimit::Unlimited, rate, reload;
        /// The same where any swap is on a disk.
        disk_rate: RateLimit = RateLimit::BytesPerSecond(512 << 20), rate, reload;
        /// Share of time, 0 to 1, that tasks of the host or of the machine may wait for memory; above it nothing is brought in where memory is short.
        max_pressure: f64 = 0.1, probability, reload;
        /// Push out pages that look idle, of machines whose pages are brought in.
        push_out: bool = false, any, reload;
        /// Share of the memory that a machine uses, 0 to 1, that is never pushed out.
        push_floor: f64 = 0.5, probability, reload;
        /// Share of time, 0 to 1, that a machine's tasks may wait for memory (the host's, where it has no control group of its own); the nearer, the less is pushed out.
        push_pressure: f64 = 0.001, probability, reload;
        /// Time between two steps of it, 100ms to 1h: at most 1 % of what is in memory goes with each. Two pages of each 256 KiB go first, the others if these stay out for 25 steps.
        push_every: Duration = SECOND * 6, lasts(SECOND / 10, HOUR), reload;
    }

    /// What is learned and kept.
    learner: Learner {
        /// Keep a history of accesses, for analysis and training.
        history: bool = true, any, reload;
        /// Days the history is kept, 1 to 3650.
        retention_days: u32 = 30, between(1, 3650), reload;
        /// Most bytes of history, at least 1MiB; the oldest goes first.
        retention_bytes: Bytes = Bytes::gib(1), at_least(Bytes::mib(1)), reload;
        /// How often profiles are saved; what was learned since is lost when the daemon is killed. 1s to 24h.
        save_interval: Duration = Duration::from_secs(30), lasts(SECOND, HOUR * 24), reload;
    }

    /// Neural models, trained from the history in the background at idle priority.
    model: Model {
        /// Train by itself: first when there is enough history, then periodically and when predictions drift. Off: on request alone.
        training: bool = true, any, reload;
        /// Time between trainings of one model; 1h to 8760h.
        interval: Duration = HOUR * 24, lasts(HOUR, HOUR * 8760), reload;
        /// Most accesses one training learns from, 10000 to 100000000; they take 2 bytes each while it runs.
        max_accesses: u32 = 2_000_000, between(10_000, 100_000_000), reload;
        /// Bits an access, 0 to 8, that a new model must save on the guests' own accesses to replace the one in use.
        margin_bits: f64 = 0.05, bits, reload;
        /// Accesses after which a new model that is not known to be better is rejected, 10000 to 1000000000.
        trial_accesses: u32 = 1_000_000, between(10_000, 1_000_000_000), reload;
    }

    /// The control socket, which prestagectl uses.
    api: Api {
        /// Socket path. Unset: `prestaged.sock` in `daemon.run_dir`. Example: socket = "/run/prestage/prestaged.sock"
        socket: Option<PathBuf> = None, any, restart;
        /// Permission bits, in octal. Who may connect may change everything.
        mode: Mode = Mode(0o660), any, restart;
        /// Group that owns the socket. Unset: the daemon's. Example: group = "prestage"
        group: Option<String> = None, any, restart;
    }
}
