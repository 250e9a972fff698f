//! The guest's memory, by a virtio-mem device: what the device is asked to hold is changed, and the guest plugs and unplugs
//! blocks until it holds that. A block in use stays, so shrinking kills nothing and may stop short.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use roxmltree::Document;
use virt::domain::Domain;
use virt::sys;

use super::abilities::MemoryDevice;
use super::balloon::BROKEN_OFF;
use super::change::Outcome;
use super::pace::Pace;
use crate::libvirt::link::no_nul;
use crate::libvirt::xml::{child, child_attribute};

/// A device that has not moved for this long is done with what it can.
const STUCK: Duration = Duration::from_secs(5);

/// What a request came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resized {
    pub(super) got: u64,
    pub(super) outcome: Outcome,
    pub(super) why: String,
}

/// Requests `bytes` of the device and waits until it holds them, or no longer moves; while it shrinks, until it is broken off.
pub(super) fn resize(
    domain: &Domain,
    pace: &Pace,
    device: &MemoryDevice,
    bytes: u64,
    broken_off: &AtomicBool,
) -> Result<Resized, String> {
    let growing = bytes > device.current_bytes;
    let is_broken_off = || !growing && broken_off.load(Ordering::Relaxed);
    request(domain, &device.alias, bytes)?;
    let until = Instant::now() + if growing { pace.grow } else { pace.shrink };
    let (mut last, mut moved) = (current(domain, &device.alias)?, Instant::now());
    while last != bytes && Instant::now() < until && moved.elapsed() < STUCK && !is_broken_off() {
        std::thread::sleep(pace.look);
        let now = current(domain, &device.alias)?;
        if now != last {
            (last, moved) = (now, Instant::now());
        }
    }
    if last == bytes {
        return Ok(Resized { got: last, outcome: Outcome::Reached, why: String::new() });
    }
    let why = match growing {
        true => "the guest has not plugged all of it: is its virtio_mem driver loaded?",
        false if is_broken_off() => BROKEN_OFF,
        false => "the guest uses the rest, and keeps it",
    };
    // What the guest could not give up it must not lose later, when nobody looks.
    request(domain, &device.alias, last.next_multiple_of(device.block_bytes))?;
    let outcome = if last == device.current_bytes { Outcome::Unchanged } else { Outcome::Partial };
    Ok(Resized { got: last, outcome, why: why.to_owned() })
}

/// What the device holds now.
pub(super) fn current(domain: &Domain, alias: &str) -> Result<u64, String> {
    let xml = domain.get_xml_desc(0).map_err(|e| e.message().to_owned())?;
    let document = Document::parse(&xml).map_err(|e| e.to_string())?;
    let memory = find(&document, alias).ok_or_else(|| format!("the memory device `{alias}` has gone"))?;
    let kib =
        child(memory, "target").and_then(|t| child(t, "current")).and_then(|n| n.text()?.trim().parse::<u64>().ok());
    Ok(kib.unwrap_or(0).saturating_mul(1024))
}

fn request(domain: &Domain, alias: &str, bytes: u64) -> Result<(), String> {
    let xml = domain.get_xml_desc(0).map_err(|e| e.message().to_owned())?;
    let changed = requesting(&xml, alias, bytes)?;
    if !no_nul(&changed) {
        return Err("the device's definition has a NUL character".to_owned());
    }
    match domain.update_device_flags(&changed, sys::VIR_DOMAIN_DEVICE_MODIFY_LIVE) {
        Ok(_) => Ok(()),
        Err(e) => Err(e.message().to_owned()),
    }
}

fn find<'a, 'i>(document: &'a Document<'i>, alias: &str) -> Option<roxmltree::Node<'a, 'i>> {
    let mut memories =
        document.descendants().filter(|n| n.has_tag_name("memory") && n.attribute("model") == Some("virtio-mem"));
    memories.find(|m| child_attribute(*m, "alias", "name") == Some(alias))
}

/// The device's element as it is, but for what it is requested to hold.
fn requesting(xml: &str, alias: &str, bytes: u64) -> Result<String, String> {
    let document = Document::parse(xml).map_err(|e| e.to_string())?;
    let memory = find(&document, alias).ok_or_else(|| format!("it has no memory device `{alias}`"))?;
    let requested = child(memory, "target").and_then(|t| child(t, "requested"));
    let requested = requested.ok_or_else(|| format!("the memory device `{alias}` has no requested size"))?;
    let (outer, inner) = (memory.range(), requested.range());
    let new = format!("<requested unit='KiB'>{}</requested>", bytes / 1024);
    Ok(format!("{}{new}{}", &xml[outer.start..inner.start], &xml[inner.end..outer.end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_request_changes() {
        let device = |requested| {
            format!(
                "<memory model='virtio-mem'><target><size unit='KiB'>4096</size><requested unit='KiB'>{requested}</requested>\
                 <current unit='KiB'>0</current></target><alias name='ua-m'/></memory>"
            )
        };
        let other = "<memory model='virtio-mem'><target/><alias name='x'/></memory>";
        let xml = format!("<domain><memory unit='KiB'>1</memory><devices>{other}{}</devices></domain>", device(0));
        assert_eq!(requesting(&xml, "ua-m", 2 << 20).unwrap(), device(2048));
        assert!(requesting(&xml, "x", 0).unwrap_err().contains("no requested size"));
        assert!(requesting(&xml, "y", 0).unwrap_err().contains("no memory device"));
    }
}
