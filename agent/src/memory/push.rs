//! Pushing idle pages out: what the controller (`idle`) wants, done by the helper.

use super::IdleSettings;
use super::hands::{Hands, states};
use super::host::Host;
use super::idle::Limits;
use super::keeper::Keeper;
use super::machine::Machine;
use prestage_integration::memory::helper::protocol::Moved;
use prestage_integration::memory::{MemoryError, Push};

impl Keeper {
    /// What became of an order to push out.
    pub(super) fn pushed(&mut self, ticket: u64, moved: &Result<Moved, MemoryError>, now_us: u64) {
        let mut machines = self.machines.iter_mut();
        let owner = machines.find_map(|(id, machine)| machine.idle.moved(ticket, moved, now_us).then_some(*id));
        // Where it cannot be pushed it can still be watched.
        if let (
            Some(id),
            Err(error @ (MemoryError::Gone { .. } | MemoryError::Reused { .. } | MemoryError::NoSuchMemory { .. })),
        ) = (owner, moved)
        {
            self.check::<()>(id, Err(error.clone()), now_us);
        }
    }
}

/// What is due of pushing idle pages out.
pub(super) fn push_out(
    id: u32,
    machine: &mut Machine,
    due: &[u32],
    hands: &mut dyn Hands,
    host: &mut dyn Host,
    settings: &IdleSettings,
    now_us: u64,
) -> Result<(), MemoryError> {
    let Machine { idle, mind, group, .. } = machine;
    if let Some(spans) = idle.check() {
        let states = states(hands, id, &spans)?;
        idle.checked(&states, now_us);
    }
    if idle.wants_count(settings, now_us) {
        idle.counted(hands.residency(id)?, now_us);
    }
    if let Some(spans) = idle.look(now_us) {
        let states = states(hands, id, &spans).inspect_err(|_| idle.interrupt())?;
        let limits = Limits { pressure: host.own_pressure(group), swap: host.swap_room(group) };
        idle.step(&states, limits, settings, |span| mind.needs(span, due), now_us);
    }
    // What is to come in goes first: the helper does one thing after the other.
    if mind.stage.is_waiting() && mind.stage.hold().is_none() {
        return Ok(());
    }
    let Some((how, spans)) = idle.next() else { return Ok(()) };
    if how == Push::PageOut {
        spans.iter().for_each(|span| mind.predictor.evicted(span.frame, span.pages));
    }
    match hands.push_out(id, how, spans) {
        Ok(ticket) => idle.sent(ticket),
        Err(MemoryError::Busy) => idle.not_sent(),
        Err(error) => {
            idle.failed(&error, now_us);
            return Err(error);
        }
    }
    Ok(())
}
