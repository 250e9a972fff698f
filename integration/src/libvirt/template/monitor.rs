//! QEMU's monitor (QMP) as templates need it: capabilities, files, and migrations to and from a file.

use std::fs::File;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt::domain::Domain;

use crate::libvirt::error::HypervisorError;
use crate::libvirt::hypervisor::failed;
use crate::libvirt::raw;

/// The set that our file is in; libvirt counts its own from zero.
const FILE_SET: u32 = 7_265_737;
/// Between two looks at a migration, which takes from 10 ms on.
const LOOK: Duration = Duration::from_millis(5);

/// The monitor of one machine.
#[derive(Clone, Copy)]
pub(super) struct Monitor<'a> {
    domain: &'a Domain,
    vm: &'a str,
}

impl<'a> Monitor<'a> {
    pub(super) fn new(domain: &'a Domain, vm: &'a str) -> Self {
        Self { domain, vm }
    }

    fn refused(&self, what: &'static str, reason: impl Into<String>) -> HypervisorError {
        HypervisorError::Qemu { vm: self.vm.to_owned(), what, reason: reason.into() }
    }

    fn send(
        &self,
        what: &'static str,
        command: &str,
        arguments: Value,
        file: Option<&File>,
    ) -> Result<Value, HypervisorError> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        let answer = raw::monitor(self.domain, &text, file.map(AsFd::as_fd)).map_err(|e| failed(what, &e))?;
        let answer: Value = answer
            .and_then(|answer| serde_json::from_str(&answer).ok())
            .ok_or_else(|| self.refused(what, format!("`{command}` has no answer that can be read")))?;
        match (answer.get("return"), answer.pointer("/error/desc").and_then(Value::as_str)) {
            (_, Some(reason)) => Err(self.refused(what, reason)),
            (Some(value), None) => Ok(value.clone()),
            (None, None) => Err(self.refused(what, format!("`{command}` is answered with {answer}"))),
        }
    }

    pub(super) fn ask(&self, what: &'static str, command: &str, arguments: Value) -> Result<Value, HypervisorError> {
        self.send(what, command, arguments, None)
    }

    /// Such as `10.0.2`.
    pub(super) fn version(&self) -> Result<String, HypervisorError> {
        let answer = self.ask("tell its version", "query-version", json!({}))?;
        let part = |name: &str| answer.pointer(&format!("/qemu/{name}")).and_then(Value::as_u64).unwrap_or(0);
        Ok(format!("{}.{}.{}", part("major"), part("minor"), part("micro")))
    }

    /// The name of the machine's one memory backend; empty where it has several.
    pub(super) fn memory(&self) -> Result<String, HypervisorError> {
        let property = json!({ "path": "/machine", "property": "memory-backend" });
        let answer = self.ask("name its memory", "qom-get", property)?;
        let path = answer.as_str().unwrap_or_default();
        Ok(path.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// Gives every page a fixed place in the file, or no longer.
    pub(super) fn set_mapped(&self, on: bool) -> Result<(), HypervisorError> {
        let what = "save pages at fixed places (mapped-ram; QEMU 9.0 or newer is needed)";
        let capability = json!({ "capabilities": [{ "capability": "mapped-ram", "state": on }] });
        self.ask(what, "migrate-set-capabilities", capability).map(drop)
    }

    /// Has migrations run at `bytes_per_sec`, and returns what was set before.
    pub(super) fn set_bandwidth(&self, bytes_per_sec: u64) -> Result<u64, HypervisorError> {
        let what = "set the speed of saving";
        let before = self.ask(what, "query-migrate-parameters", json!({}))?;
        self.ask(what, "migrate-set-parameters", json!({ "max-bandwidth": bytes_per_sec }))?;
        Ok(before.get("max-bandwidth").and_then(Value::as_u64).unwrap_or(bytes_per_sec))
    }

    /// Gives QEMU a file and returns the URI it then has. QEMU needs no right to open it itself.
    pub(super) fn give(&self, file: &File) -> Result<String, HypervisorError> {
        self.send("take the state's file", "add-fd", json!({ "fdset-id": FILE_SET }), Some(file))?;
        Ok(format!("file:/dev/fdset/{FILE_SET}"))
    }

    /// Has QEMU let go of the file.
    pub(super) fn take_back(&self) -> Result<(), HypervisorError> {
        self.ask("let go of the state's file", "remove-fd", json!({ "fdset-id": FILE_SET })).map(drop)
    }

    /// Waits for the end of a migration, whichever way.
    pub(super) fn finish(&self, what: &'static str, limit: Duration) -> Result<(), HypervisorError> {
        let until = Instant::now() + limit;
        loop {
            let state = self.ask(what, "query-migrate", json!({}))?;
            match state.get("status").and_then(Value::as_str).unwrap_or("none") {
                "completed" => return Ok(()),
                status @ ("failed" | "cancelled") => {
                    let reason = state.get("error-desc").and_then(Value::as_str).unwrap_or(status);
                    return Err(self.refused(what, reason));
                }
                _ if Instant::now() >= until => {
                    return Err(self.refused(what, format!("it has not finished after {} s", limit.as_secs())));
                }
                _ => thread::sleep(LOOK),
            }
        }
    }

    /// Breaks a migration off and waits until it is.
    pub(super) fn break_off(&self) -> Result<(), HypervisorError> {
        let what = "break off saving";
        self.ask(what, "migrate_cancel", json!({}))?;
        // `failed` is what cancelled ones end as
        let _ = self.finish(what, Duration::from_secs(10));
        Ok(())
    }

    /// Takes a network interface's cable out, or puts it in.
    pub(super) fn set_link(&self, device: &str, up: bool) -> Result<(), HypervisorError> {
        self.ask("set a network interface's link", "set_link", json!({ "name": device, "up": up })).map(drop)
    }
}
