//! What can be tuned of a running domain, and the guest's own vCPUs: calls that `virt` lacks. Unsafe code with safe owners
//! around it, like `link`; no policy.

use std::ffi::{CStr, CString, c_int, c_uint};

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use crate::libvirt::raw::{Value, parameters};

/// A named number that a tunable has or is to have. The type is part of it: libvirt refuses others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tunable {
    pub(super) name: String,
    pub(super) number: Number,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Int(i32),
    Uint(u32),
    Long(i64),
    Ulong(u64),
}

impl Number {
    /// The number, whatever its type.
    pub(super) fn value(self) -> i128 {
        match self {
            Self::Int(v) => v.into(),
            Self::Uint(v) => v.into(),
            Self::Long(v) => v.into(),
            Self::Ulong(v) => v.into(),
        }
    }

    /// `value` in the type of this one; what does not fit is cut to the type's limit.
    pub(super) fn with(self, value: i128) -> Self {
        match self {
            Self::Int(_) => Self::Int(value.clamp(i32::MIN.into(), i32::MAX.into()) as i32),
            Self::Uint(_) => Self::Uint(value.clamp(0, u32::MAX.into()) as u32),
            Self::Long(_) => Self::Long(value.clamp(i64::MIN.into(), i64::MAX.into()) as i64),
            Self::Ulong(_) => Self::Ulong(value.clamp(0, u64::MAX.into()) as u64),
        }
    }
}

/// What [`tunables`] and [`set_tunables`] are about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind<'a> {
    /// CPU scheduling of the domain.
    Scheduler,
    /// Weights of the domain's block I/O.
    BlockWeights,
    /// Limits of the disk with this target.
    Disk(&'a CStr),
    /// Limits of the network interface with this device name.
    Interface(&'a CStr),
}

/// An empty parameter, for libvirt to fill.
fn blank() -> sys::virTypedParameter {
    sys::virTypedParameter { field: [0; 80], type_: 0, value: sys::_virTypedParameter__bindgen_ty_1 { ul: 0 } }
}

/// The tunables of a kind as they are on the running domain. Those that are no whole numbers are left out.
pub(super) fn tunables(domain: &Domain, kind: Kind<'_>) -> Result<Vec<Tunable>, Error> {
    let mut count = match kind {
        // This one alone does not say how many there are when asked for none.
        Kind::Scheduler => domain.get_scheduler_type()?.1,
        _ => {
            let mut count = 0;
            // SAFETY: no array and a count of none asks for the number of parameters.
            check(unsafe { get(domain, kind, std::ptr::null_mut(), &mut count) })?;
            count
        }
    };
    let mut params = vec![blank(); usize::try_from(count).unwrap_or(0)];
    // SAFETY: the array has room for `count` parameters.
    check(unsafe { get(domain, kind, params.as_mut_ptr(), &mut count) })?;
    // SAFETY: libvirt has filled the first `count`, and the array outlives the iterator.
    let all = unsafe { parameters(params.as_mut_ptr(), count) };
    let whole = all.filter_map(|(name, value)| {
        let number = match value {
            Value::Int(v) => Number::Int(v),
            Value::Uint(v) => Number::Uint(v),
            Value::Long(v) => Number::Long(v),
            Value::Ulong(v) => Number::Ulong(v),
            _ => return None,
        };
        Some(Tunable { name: name.to_owned(), number })
    });
    let tunables = whole.collect();
    // SAFETY: frees the texts that libvirt allocated within the array, not the array; nothing borrows them any more.
    unsafe { sys::virTypedParamsClear(params.as_mut_ptr(), count) };
    Ok(tunables)
}

/// Sets tunables of a running domain; others stay as they are.
pub(super) fn set_tunables(domain: &Domain, kind: Kind<'_>, tunables: &[Tunable]) -> Result<(), Error> {
    let mut params: Vec<_> = tunables.iter().map(parameter).collect();
    let count = c_int::try_from(params.len()).unwrap_or(c_int::MAX);
    let (pointer, live) = (params.as_mut_ptr(), sys::VIR_DOMAIN_AFFECT_LIVE);
    let domain = domain.as_ptr();
    let code = match kind {
        // SAFETY: the domain is valid and the array has `count` parameters.
        Kind::Scheduler => unsafe { sys::virDomainSetSchedulerParametersFlags(domain, pointer, count, live) },
        // SAFETY: as above.
        Kind::BlockWeights => unsafe { sys::virDomainSetBlkioParameters(domain, pointer, count, live) },
        // SAFETY: as above, with a C string.
        Kind::Disk(disk) => unsafe { sys::virDomainSetBlockIoTune(domain, disk.as_ptr(), pointer, count, live) },
        // SAFETY: as above.
        Kind::Interface(device) => unsafe {
            sys::virDomainSetInterfaceParameters(domain, device.as_ptr(), pointer, count, live)
        },
    };
    check(code)
}

/// # Safety
/// `params` is null, with a `count` of 0, or has room for `count` parameters.
unsafe fn get(domain: &Domain, kind: Kind<'_>, params: sys::virTypedParameterPtr, count: &mut c_int) -> c_int {
    let (domain, live) = (domain.as_ptr(), sys::VIR_DOMAIN_AFFECT_LIVE);
    match kind {
        // SAFETY: by this function's contract.
        Kind::Scheduler => unsafe { sys::virDomainGetSchedulerParametersFlags(domain, params, count, live) },
        // SAFETY: as above.
        Kind::BlockWeights => unsafe { sys::virDomainGetBlkioParameters(domain, params, count, live) },
        // SAFETY: as above, with a C string.
        Kind::Disk(disk) => unsafe { sys::virDomainGetBlockIoTune(domain, disk.as_ptr(), params, count, live) },
        // SAFETY: as above.
        Kind::Interface(device) => unsafe {
            sys::virDomainGetInterfaceParameters(domain, device.as_ptr(), params, count, live)
        },
    }
}

fn parameter(tunable: &Tunable) -> sys::virTypedParameter {
    let mut param = blank();
    // One byte stays for the NUL; no tunable of libvirt's has a name that long.
    for (slot, byte) in param.field[..79].iter_mut().zip(tunable.name.bytes()) {
        *slot = byte.cast_signed();
    }
    let (kind, value) = match tunable.number {
        Number::Int(v) => (sys::VIR_TYPED_PARAM_INT, sys::_virTypedParameter__bindgen_ty_1 { i: v }),
        Number::Uint(v) => (sys::VIR_TYPED_PARAM_UINT, sys::_virTypedParameter__bindgen_ty_1 { ui: v }),
        Number::Long(v) => (sys::VIR_TYPED_PARAM_LLONG, sys::_virTypedParameter__bindgen_ty_1 { l: v }),
        Number::Ulong(v) => (sys::VIR_TYPED_PARAM_ULLONG, sys::_virTypedParameter__bindgen_ty_1 { ul: v }),
    };
    // Types are small.
    param.type_ = kind as c_int;
    param.value = value;
    param
}

fn check(code: c_int) -> Result<(), Error> {
    if code < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// vCPUs as the guest's own system sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct GuestVcpus {
    /// Those it knows.
    pub(super) present: Vec<u32>,
    /// Those it uses.
    pub(super) online: Vec<u32>,
    /// Those it can take out of use.
    pub(super) offlinable: Vec<u32>,
}

/// Asks the guest agent which vCPUs the guest uses. Blocks for as long as the agent takes.
pub(super) fn guest_vcpus(domain: &Domain) -> Result<GuestVcpus, Error> {
    let mut params = std::ptr::null_mut();
    let mut count: c_uint = 0;
    // SAFETY: both places are valid; libvirt allocates the array.
    check(unsafe { sys::virDomainGetGuestVcpus(domain.as_ptr(), &raw mut params, &raw mut count, 0) })?;
    let owned = Owned { params, count: c_int::try_from(count).unwrap_or(0) };
    let mut found = GuestVcpus::default();
    // SAFETY: the array has `count` parameters and lives until `owned` is dropped.
    for (name, value) in unsafe { parameters(owned.params, owned.count) } {
        let Value::Text(list) = value else { continue };
        match name {
            "vcpus" => found.present = list_of(list),
            "online" => found.online = list_of(list),
            "offlinable" => found.offlinable = list_of(list),
            _ => {}
        }
    }
    Ok(found)
}

/// Has the guest agent take vCPUs into use or out of it. Blocks for as long as the agent takes.
pub(super) fn set_guest_vcpus(domain: &Domain, vcpus: &[u32], online: bool) -> Result<(), Error> {
    let list = vcpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    // Digits and commas have no NUL.
    let list = CString::new(list).unwrap_or_default();
    // SAFETY: the domain is valid, the list is a C string.
    check(unsafe { sys::virDomainSetGuestVcpus(domain.as_ptr(), list.as_ptr(), online.into(), 0) })
}

/// An array of parameters that libvirt allocated.
struct Owned {
    params: sys::virTypedParameterPtr,
    count: c_int,
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: libvirt allocated it, and it is freed once.
        unsafe { sys::virTypedParamsFree(self.params, self.count) };
    }
}

/// A list in the form `0-2,4`, as libvirt and the kernel write CPUs. What is no number is left out.
pub(super) fn list_of(text: &str) -> Vec<u32> {
    /// More CPUs than any guest can have: a damaged range must not fill memory.
    const MOST: u32 = 4096;
    let mut list = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            list.extend(first..=last.min(MOST));
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(list_of("0-2,4"), [0, 1, 2, 4]);
        assert_eq!(list_of("0"), [0]);
        assert_eq!(list_of(" 3 ,x,5-4,"), [3]);
        assert_eq!(list_of("").len(), 0);
        assert_eq!(list_of("0-4294967295").len(), 4097);
    }

    #[test]
    fn numbers_keep_their_type() {
        assert_eq!(Number::Uint(1).with(-5), Number::Uint(0));
        assert_eq!(Number::Int(1).with(1 << 40), Number::Int(i32::MAX));
        assert_eq!(Number::Ulong(1).with(7).value(), 7);
        let param = parameter(&Tunable { name: "cpu_shares".into(), number: Number::Ulong(9) });
        // SAFETY: the parameter outlives the iterator.
        let read: Vec<_> = unsafe { parameters((&raw const param).cast_mut(), 1) }.collect();
        assert_eq!(read, [("cpu_shares", Value::Ulong(9))]);
    }
}
