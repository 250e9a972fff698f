//! What a failed network limit leaves on the host's interface.
//!
//! libvirt limits an interface by queueing disciplines and has them made by `tc` one after the other. Where one is missing
//! in the kernel (sch_sfq, for one) it stops, and the first stay: every packet then goes through an empty `htb`.

use crate::privilege::{self, protocol::Qdisc, tc};

/// The disciplines of an interface that a limit makes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Qdiscs(Vec<Qdisc>);

fn show(device: &str) -> Result<String, String> {
    match privilege::broker() {
        Some(broker) => broker.qdiscs(device).map_err(|error| error.to_string()),
        None => tc::show(device).map_err(|refusal| refusal.to_string()),
    }
}

fn remove(device: &str, qdisc: Qdisc) -> Result<(), String> {
    match privilege::broker() {
        Some(broker) => broker.remove_qdisc(device, qdisc).map_err(|error| error.to_string()),
        None => tc::remove(device, qdisc).map_err(|refusal| refusal.to_string()),
    }
}

impl Qdiscs {
    /// Those of `device`; none if it can't be asked.
    pub(super) fn of(device: &str) -> Self {
        if !tc::is_name(device) {
            return Self::default();
        }
        Self::parse(&show(device).unwrap_or_default())
    }

    /// `qdisc htb 1: root refcnt 2 …`, `qdisc ingress ffff: parent ffff:fff1 …`
    fn parse(text: &str) -> Self {
        let kind = |line: &str| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            match words.as_slice() {
                ["qdisc", "htb", _, "root", ..] => Some(Qdisc::Root),
                ["qdisc", "ingress" | "clsact", ..] => Some(Qdisc::Ingress),
                _ => None,
            }
        };
        Self(text.lines().filter_map(kind).collect())
    }

    /// Removes from `device` what it has now and had not before; says what came of it, if there was anything.
    pub(super) fn remove_new(&self, device: &str) -> Option<String> {
        let new: Vec<_> = Self::of(device).0.into_iter().filter(|q| !self.0.contains(q)).collect();
        if new.is_empty() {
            return None;
        }
        let failed: Vec<_> = new.iter().filter_map(|q| remove(device, *q).err()).collect();
        Some(match failed.is_empty() {
            true => format!("the queueing disciplines it left on {device} were removed"),
            false => format!(
                "it left queueing disciplines on {device} that can't be removed ({}); remove them with `tc qdisc del dev {device} root`",
                failed.join(", ")
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limits_disciplines_are_told_from_the_kernels_own() {
        let text = "qdisc htb 1: root refcnt 2 r2q 10 default 0x1 direct_packets_stat 0\n\
                    qdisc sfq 2: parent 1:1 limit 127p\nqdisc ingress ffff: parent ffff:fff1 ----------------\n";
        assert_eq!(Qdiscs::parse(text).0, [Qdisc::Root, Qdisc::Ingress]);
        assert_eq!(Qdiscs::parse("qdisc noqueue 0: root refcnt 2\nqdisc fq_codel 0: root\n"), Qdiscs::default());
    }

    #[test]
    fn names_that_tc_would_misread_are_not_passed_on() {
        for name in ["", "-batch", "a b", "a;b", "../x", "sixteen_letters_"] {
            assert_eq!(Qdiscs::of(name), Qdiscs::default());
        }
    }
}
