//! Statistics of all domains in one call, for which `virt` has a wrapper that leaks, and QEMU's monitor with files passed along,
//! for which it has none. Unsafe code with a safe owner around it, like `link`.
//!
//! Statistics come as *typed parameters*: arrays of a name, a type and a value.

use std::ffi::{CStr, CString, c_int};
use std::os::fd::{AsRawFd, BorrowedFd};

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::link::{Link, domain_id};
use super::vm::VmId;

/// The value of a parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    Int(i32),
    Uint(u32),
    Long(i64),
    Ulong(u64),
    Double(f64),
    Bool(bool),
    Text(&'a str),
}

impl Value<'_> {
    /// The value as a count; nothing for what is negative, fractional or text.
    pub(super) fn count(self) -> Option<u64> {
        match self {
            Self::Int(v) => v.try_into().ok(),
            Self::Uint(v) => Some(v.into()),
            Self::Long(v) => v.try_into().ok(),
            Self::Ulong(v) => Some(v),
            Self::Bool(v) => Some(v.into()),
            Self::Double(_) | Self::Text(_) => None,
        }
    }
}

/// The statistics of all running domains, in one call.
pub(super) struct Records {
    list: *mut sys::virDomainStatsRecordPtr,
    count: usize,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Records {
    /// Asks for `groups` (`VIR_DOMAIN_STATS_…`). A domain whose hypervisor is busy is not waited for: what needs its monitor
    /// is missing then.
    pub(super) fn of_running(link: &Link, groups: u32) -> Result<Self, Error> {
        let flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
        match Self::ask(link, groups, flags) {
            // Drivers other than QEMU's don't know the flag, and have nobody to wait for.
            Err(e) if e.code() == virt::error::ErrorNumber::InvalidArg => {
                Self::ask(link, groups, sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE)
            }
            other => other,
        }
    }

    fn ask(link: &Link, groups: u32, flags: u32) -> Result<Self, Error> {
        let mut list = std::ptr::null_mut();
        // SAFETY: the connection is open, `list` is a valid place for the result.
        let count = unsafe { sys::virConnectGetAllDomainStats(link.connect().as_ptr(), groups, &raw mut list, flags) };
        match usize::try_from(count) {
            Ok(count) => Ok(Self { list, count }),
            Err(_) => Err(Error::last_error()),
        }
    }

    /// Each domain with its number of the running instance and its parameters.
    pub(super) fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        (0..self.count).filter_map(|i| {
            // SAFETY: the list has `count` entries.
            let slot = unsafe { self.list.add(i) };
            // SAFETY: as above, and nobody writes to it.
            let record = unsafe { *slot };
            // SAFETY: entries are valid as long as the list, or null at its end.
            unsafe { record.as_ref() }.map(|record| Record { record })
        })
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        if !self.list.is_null() {
            // SAFETY: the list came from virConnectGetAllDomainStats and is freed once.
            unsafe { sys::virDomainStatsRecordListFree(self.list) };
        }
    }
}

/// The statistics of one domain.
pub(super) struct Record<'a> {
    record: &'a sys::virDomainStatsRecord,
}

impl Record<'_> {
    pub(super) fn vm(&self) -> Option<VmId> {
        // SAFETY: the record's domain is valid as long as the record.
        unsafe { domain_id(self.record.dom) }
    }

    /// libvirt's number of the running instance. Reads the object alone.
    pub(super) fn instance(&self) -> Option<u32> {
        // SAFETY: as above.
        match unsafe { sys::virDomainGetID(self.record.dom) } {
            u32::MAX => None,
            id => Some(id),
        }
    }

    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        // SAFETY: libvirt fills `nparams` parameters, which live as long as the record.
        unsafe { parameters(self.record.params, self.record.nparams) }
    }
}

/// The named values of an array of parameters. Names and texts that are no UTF-8 are left out.
///
/// # Safety
/// `params` is null or has `count` initialised parameters that live and stay unchanged for `'a`.
pub(super) unsafe fn parameters<'a>(
    params: sys::virTypedParameterPtr,
    count: c_int,
) -> impl Iterator<Item = (&'a str, Value<'a>)> {
    let count = if params.is_null() { 0 } else { usize::try_from(count).unwrap_or(0) };
    (0..count).filter_map(move |i| {
        // SAFETY: by this function's contract.
        let param = unsafe { params.add(i) };
        // SAFETY: by this function's contract.
        let param: &'a sys::virTypedParameter = unsafe { &*param };
        // SAFETY: libvirt ends names with a NUL within their array.
        let name = unsafe { CStr::from_ptr(param.field.as_ptr()) }.to_str().ok()?;
        // SAFETY: the type says which member of the union is set; texts live as long as their parameter.
        Some((name, unsafe { value(param) }?))
    })
}

/// # Safety
/// `param` is initialised by libvirt; a text lives as long as it.
#[allow(clippy::multiple_unsafe_ops_per_block)] // one match, one union
unsafe fn value(param: &sys::virTypedParameter) -> Option<Value<'_>> {
    let held = &param.value;
    // SAFETY: by this function's contract each arm reads the member that its type says.
    unsafe {
        Some(match u32::try_from(param.type_).ok()? {
            sys::VIR_TYPED_PARAM_INT => Value::Int(held.i),
            sys::VIR_TYPED_PARAM_UINT => Value::Uint(held.ui),
            sys::VIR_TYPED_PARAM_LLONG => Value::Long(held.l),
            sys::VIR_TYPED_PARAM_ULLONG => Value::Ulong(held.ul),
            sys::VIR_TYPED_PARAM_DOUBLE => Value::Double(held.d),
            sys::VIR_TYPED_PARAM_BOOLEAN => Value::Bool(held.b != 0),
            sys::VIR_TYPED_PARAM_STRING if !held.s.is_null() => Value::Text(CStr::from_ptr(held.s).to_str().ok()?),
            _ => return None,
        })
    }
}

/// Sends a command to the monitor of a domain's QEMU, with a file that QEMU gets a descriptor of, and returns its answer.
/// `Ok(None)` where the command can't be sent: it has a NUL character.
pub(super) fn monitor(domain: &Domain, command: &str, file: Option<BorrowedFd<'_>>) -> Result<Option<String>, Error> {
    let Ok(command) = CString::new(command) else { return Ok(None) };
    let mut files = [file.map_or(-1, |file| file.as_raw_fd())];
    let mut answer = std::ptr::null_mut();
    // SAFETY: the domain is open, the command and the one file given live until the call returns, `answer` is a valid place
    // for the result, and no files are wanted back.
    let sent = unsafe {
        sys::virDomainQemuMonitorCommandWithFiles(
            domain.as_ptr(),
            command.as_ptr(),
            u32::from(file.is_some()),
            files.as_mut_ptr(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &raw mut answer,
            sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT,
        )
    };
    if sent != 0 || answer.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: libvirt gives a text that ends with a NUL.
    let text = unsafe { CStr::from_ptr(answer) }.to_string_lossy().into_owned();
    // SAFETY: libvirt allocates the text with malloc and leaves it to the caller; nothing refers to it any more.
    unsafe { libc::free(answer.cast()) };
    Ok(Some(text))
}
