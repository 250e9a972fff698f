//! One connection to libvirt with its callbacks. Unsafe code, with `raw` the only one of this folder.
//!
//! `virt` wraps most calls, but neither domain events nor the close callback; those come from `virt-sys`. Two of its
//! wrappers are avoided: `event_add_handle` frees the wrong pointer when it fails, `get_all_domain_stats` leaks. It also
//! panics on a NUL inside a string argument ([`no_nul`] stands before those), and its `Connect` does not close itself.
//!
//! Lifetimes: every event callback gets a boxed strong reference to the sink, which libvirt gives back through the free
//! function when the callback is removed. The close callback gets a weak one: drivers without such a callback (test:///)
//! accept it and then neither call nor free it. libvirt holds a reference to the connection for each
//! callback, so [`Link`] removes them all before it closes.

use std::ffi::{CStr, c_char, c_int, c_ulonglong, c_void};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, SystemTime};

use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

use super::vm::{StopCause, VmEvent, VmEventKind, VmId};

/// Where events go. Called on libvirt's event thread: must not block and must not call libvirt.
pub(super) trait Sink: Send + Sync + 'static {
    fn vm_event(&self, event: VmEvent);
    fn closed(&self, reason: &str);
}

/// The type-erased sink that libvirt carries for us.
type Opaque = Arc<dyn Sink>;

/// Keep-alive probes: the connection counts as dead after `count` unanswered ones. This also ends calls that hang.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeepAlive {
    pub(super) interval_secs: u16,
    pub(super) count: u16,
}

/// An open connection.
pub(super) struct Link {
    connect: Connect,
    callbacks: Vec<c_int>,
    has_close_callback: bool,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("callbacks", &self.callbacks.len()).finish_non_exhaustive()
    }
}

/// Whether `text` can be passed to libvirt.
pub(super) fn no_nul(text: &str) -> bool {
    !text.bytes().any(|b| b == 0)
}

/// Registers libvirt's event loop and runs it on a thread of its own, once in a process. libvirt wants this before the
/// first connection is opened; without the loop there are no events and no keep-alive.
///
/// # Errors
/// The reason, if the loop or its thread could not be set up.
pub(super) fn start_event_loop() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let start = || {
        // By default libvirt prints every error to stderr, besides returning it.
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|e| e.message().to_owned())?;
        let run = || {
            loop {
                if let Err(e) = virt::event::event_run_default_impl() {
                    tracing::error!(error = e.message(), "libvirt's event loop failed");
                    thread::sleep(Duration::from_secs(1)); // it will fail again at once
                }
            }
        };
        thread::Builder::new().name("libvirt-events".into()).spawn(run).map(drop).map_err(|e| e.to_string())
    };
    STARTED.get_or_init(start).clone()
}

impl Link {
    /// Opens a connection, and registers for its events and its end.
    pub(super) fn open(uri: &str, keep_alive: KeepAlive, sink: Opaque) -> Result<Self, Error> {
        let connect = Connect::open(Some(uri))?;
        let mut link = Self { connect, callbacks: Vec::new(), has_close_callback: false };
        // In-process drivers (test:///) have neither keep-alive nor an end: not an error there.
        if let Err(e) = link.connect.set_keep_alive(keep_alive.interval_secs.into(), keep_alive.count.into()) {
            tracing::debug!(uri, error = e.message(), "no keep-alive on this connection");
        }
        link.has_close_callback = link.register_close(&sink);
        for (id, callback) in event_callbacks() {
            match link.register(id, callback, sink.clone()) {
                Ok(id) => link.callbacks.push(id),
                // Lifecycle events are what everything stands on; others may be unknown to a driver.
                Err(e) if id == sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE => return Err(e),
                Err(e) => tracing::debug!(uri, event = id, error = e.message(), "event not available"),
            }
        }
        Ok(link)
    }

    pub(super) fn connect(&self) -> &Connect {
        &self.connect
    }

    /// Whether the connection still stands. Asks nobody.
    pub(super) fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    fn register_close(&self, sink: &Opaque) -> bool {
        let opaque = Box::into_raw(Box::new(Arc::downgrade(sink))).cast();
        // SAFETY: the connection is open; `opaque` is what `on_close` and `free_weak_sink` expect.
        let code = unsafe {
            sys::virConnectRegisterCloseCallback(self.connect.as_ptr(), Some(on_close), opaque, Some(free_weak_sink))
        };
        if code != 0 {
            // SAFETY: after a failure libvirt keeps nothing, so the box is still ours.
            unsafe { free_weak_sink(opaque) };
        }
        code == 0
    }

    fn register(&self, id: sys::virDomainEventID, callback: GenericCallback, sink: Opaque) -> Result<c_int, Error> {
        let opaque = into_opaque(sink);
        // Event identifiers are small.
        let id = id as c_int;
        // SAFETY: the connection is open, a null domain means all, `callback` has the signature of event `id` and expects
        // this opaque.
        let code = unsafe {
            sys::virConnectDomainEventRegisterAny(
                self.connect.as_ptr(),
                std::ptr::null_mut(),
                id,
                Some(callback),
                opaque,
                Some(free_sink),
            )
        };
        if code >= 0 {
            return Ok(code);
        }
        let error = Error::last_error();
        // SAFETY: as above, libvirt keeps nothing after a failure.
        unsafe { free_sink(opaque) };
        Err(error)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // On a dead connection these fail towards the daemon but still forget the callbacks on this side.
        for id in self.callbacks.drain(..) {
            // SAFETY: the connection is open and `id` came from it.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), id) };
        }
        if self.has_close_callback {
            // SAFETY: the connection is open and has this callback.
            unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
        }
        if let Err(e) = self.connect.close() {
            tracing::debug!(error = e.message(), "closing the libvirt connection");
        }
    }
}

/// A callback as libvirt takes it, whatever its event's real signature is.
type GenericCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type LifecycleCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type DeviceCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
type AgentCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void);

type BalloonCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_ulonglong, *mut c_void);
type MemoryDeviceCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, c_ulonglong, *mut c_void);

fn event_callbacks() -> [(sys::virDomainEventID, GenericCallback); 7] {
    // SAFETY: what the macro VIR_DOMAIN_EVENT_CALLBACK does in C: libvirt casts back to the signature of the event
    // identifier that the callback is registered with.
    let lifecycle = unsafe { std::mem::transmute::<LifecycleCallback, GenericCallback>(on_lifecycle) };
    // SAFETY: as above.
    let added = unsafe { std::mem::transmute::<DeviceCallback, GenericCallback>(on_device_added) };
    // SAFETY: as above.
    let removed = unsafe { std::mem::transmute::<DeviceCallback, GenericCallback>(on_device_removed) };
    // SAFETY: as above.
    let agent = unsafe { std::mem::transmute::<AgentCallback, GenericCallback>(on_agent) };
    // SAFETY: as above.
    let balloon = unsafe { std::mem::transmute::<BalloonCallback, GenericCallback>(on_balloon) };
    // SAFETY: as above.
    let memory = unsafe { std::mem::transmute::<MemoryDeviceCallback, GenericCallback>(on_memory_device) };
    [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, added),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, removed),
        (sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, agent),
        (sys::VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, balloon),
        (sys::VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE, memory),
    ]
}

/// A pointer that carries one strong reference to the sink. Boxed, since a trait object's pointer is two words.
fn into_opaque(sink: Opaque) -> *mut c_void {
    Box::into_raw(Box::new(sink)).cast()
}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: libvirt calls this once, with what `into_opaque` made.
    drop(unsafe { Box::from_raw(opaque.cast::<Opaque>()) });
}

unsafe extern "C" fn free_weak_sink(opaque: *mut c_void) {
    // SAFETY: called once, with the box that `register_close` made.
    drop(unsafe { Box::from_raw(opaque.cast::<Weak<dyn Sink>>()) });
}

/// Gives an event to the sink behind `opaque`.
///
/// # Safety
/// `opaque` comes from [`into_opaque`] and is not freed yet; `domain` is valid for the call.
unsafe fn deliver(domain: sys::virDomainPtr, kind: VmEventKind, opaque: *mut c_void) {
    // SAFETY: by this function's contract.
    let sink = unsafe { &*opaque.cast::<Opaque>() };
    // SAFETY: by this function's contract.
    if let Some(vm) = unsafe { domain_id(domain) } {
        sink.vm_event(VmEvent { vm, kind, at: SystemTime::now() });
    }
}

/// The identity of a domain object. Reads the object alone, no call to the daemon.
///
/// # Safety
/// `domain` is null or valid.
pub(super) unsafe fn domain_id(domain: sys::virDomainPtr) -> Option<VmId> {
    if domain.is_null() {
        return None;
    }
    let mut uuid = [0u8; 16];
    // SAFETY: the domain is valid and the buffer has VIR_UUID_BUFLEN = 16 bytes.
    if unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the domain is valid; the name lives as long as it does.
    let name = unsafe { sys::virDomainGetName(domain) };
    if name.is_null() {
        return None;
    }
    // SAFETY: a C string of a valid domain, copied at once.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    Some(VmId { uuid: Uuid::from_bytes(uuid), name })
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the box that `register_close` made, not freed yet.
    let sink = unsafe { &*opaque.cast::<Weak<dyn Sink>>() };
    let Some(sink) = sink.upgrade() else { return };
    sink.closed(match u32::try_from(reason) {
        Ok(sys::VIR_CONNECT_CLOSE_REASON_EOF) => "libvirtd closed the connection",
        Ok(sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE) => "libvirtd no longer answers keep-alive probes",
        Ok(sys::VIR_CONNECT_CLOSE_REASON_CLIENT) => "the connection was closed by this side",
        _ => "the connection failed",
    });
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, lifecycle(event, detail), opaque) };
    0
}

unsafe extern "C" fn on_reboot(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, VmEventKind::Rebooted, opaque) };
}

unsafe extern "C" fn on_device_added(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a C string.
    let alias = unsafe { alias_text(alias) };
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, VmEventKind::DeviceAdded { alias }, opaque) };
}

unsafe extern "C" fn on_device_removed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a C string.
    let alias = unsafe { alias_text(alias) };
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, VmEventKind::DeviceRemoved { alias }, opaque) };
}

unsafe extern "C" fn on_agent(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    let kind = match u32::try_from(state) {
        Ok(sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED) => VmEventKind::AgentConnected,
        _ => VmEventKind::AgentDisconnected,
    };
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, kind, opaque) };
}

unsafe extern "C" fn on_balloon(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    kib: c_ulonglong,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, VmEventKind::BalloonChanged { bytes: kib.saturating_mul(1024) }, opaque) };
}

unsafe extern "C" fn on_memory_device(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    kib: c_ulonglong,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a C string.
    let alias = unsafe { alias_text(alias) };
    // SAFETY: libvirt passes a valid domain and our opaque.
    unsafe { deliver(domain, VmEventKind::MemoryDeviceResized { alias, bytes: kib.saturating_mul(1024) }, opaque) };
}

/// # Safety
/// `alias` is null or a C string.
unsafe fn alias_text(alias: *const c_char) -> String {
    if alias.is_null() {
        return String::new();
    }
    // SAFETY: not null, by contract a C string, copied at once.
    unsafe { CStr::from_ptr(alias) }.to_string_lossy().into_owned()
}

fn lifecycle(event: c_int, detail: c_int) -> VmEventKind {
    let other = VmEventKind::Other { event, detail };
    match u32::try_from(event) {
        Ok(sys::VIR_DOMAIN_EVENT_DEFINED) => VmEventKind::Defined,
        Ok(sys::VIR_DOMAIN_EVENT_UNDEFINED) => VmEventKind::Undefined,
        Ok(sys::VIR_DOMAIN_EVENT_STARTED) => VmEventKind::Started,
        Ok(sys::VIR_DOMAIN_EVENT_SUSPENDED) => VmEventKind::Suspended,
        Ok(sys::VIR_DOMAIN_EVENT_RESUMED) => VmEventKind::Resumed,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED) => VmEventKind::Stopped(stop_cause(detail)),
        Ok(sys::VIR_DOMAIN_EVENT_SHUTDOWN) => VmEventKind::Shutdown,
        Ok(sys::VIR_DOMAIN_EVENT_PMSUSPENDED) => VmEventKind::PmSuspended,
        Ok(sys::VIR_DOMAIN_EVENT_CRASHED) => VmEventKind::Crashed,
        _ => other,
    }
}

fn stop_cause(detail: c_int) -> StopCause {
    match u32::try_from(detail) {
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN) => StopCause::Shutdown,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED) => StopCause::Destroyed,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED) => StopCause::Crashed,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED) => StopCause::Migrated,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_SAVED) => StopCause::Saved,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_FAILED) => StopCause::Failed,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT) => StopCause::FromSnapshot,
        _ => StopCause::Other(detail),
    }
}
