//! The thread's loop: messages, what the helper says, and a turn.

use super::Message;
use super::keeper::Keeper;
use crate::learner::HeldProfile;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use prestage_integration::api::types::MemoryStatus;
use prestage_integration::libvirt::Uuid;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// Events taken between two turns: what was foreseen must not wait for all of a burst.
const EVENTS: usize = 16;

/// Runs until it is told to stop, or nobody can.
pub(super) fn run(
    mut keeper: Keeper,
    messages: &Receiver<Message>,
    bell: &UnixDatagram,
    moved: &UnboundedSender<Uuid>,
    status: &Mutex<MemoryStatus>,
) {
    loop {
        let mut rung = [0; 64];
        while bell.recv(&mut rung).is_ok() {}
        loop {
            match messages.try_recv() {
                Ok(Message::Stop) | Err(TryRecvError::Disconnected) => return stop(keeper),
                Ok(message) => handle(&mut keeper, message),
                Err(TryRecvError::Empty) => break,
            }
        }
        let more = hear(&mut keeper);
        let pause = keeper.turn(now_us());
        *status.lock() = keeper.status();
        for vm in keeper.take_moved() {
            let _ = moved.send(vm);
        }
        if !more {
            wait(&keeper, bell, pause);
        }
    }
}

/// Takes some of what the helper said. Whether there may be more.
fn hear(keeper: &mut Keeper) -> bool {
    for _ in 0..EVENTS {
        let Some(hands) = &mut keeper.hands else { return false };
        match hands.next_event(Duration::ZERO) {
            Ok(Some(event)) => keeper.hear(event, now_us()),
            Ok(None) => return false,
            Err(error) => {
                keeper.lost(&error, now_us());
                return false;
            }
        }
    }
    true
}

fn wait(keeper: &Keeper, bell: &UnixDatagram, pause: Duration) {
    let timeout = PollTimeout::try_from(pause.as_millis()).unwrap_or(PollTimeout::MAX);
    let mut fds = vec![PollFd::new(bell.as_fd(), PollFlags::POLLIN)];
    fds.extend(keeper.hands.as_ref().and_then(|hands| hands.fd()).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    if let Err(error) = poll(&mut fds, timeout)
        && error != nix::errno::Errno::EINTR
    {
        tracing::warn!(%error, "memory: cannot wait");
        std::thread::sleep(pause);
    }
}

fn handle(keeper: &mut Keeper, message: Message) {
    let now_us = now_us();
    match message {
        Message::Runs(vm, name, place) => keeper.runs(vm, name, place, now_us),
        Message::Stopped(vm) => keeper.stopped(vm),
        Message::Program(vm, execution, program) => keeper.program(vm, execution, program, now_us),
        Message::ProgramEnded(execution) => {
            // What the guest did before belongs to it.
            while hear(keeper) {}
            keeper.program_ended(execution, now_us);
        }
        Message::Due(vm, programs) => keeper.due(vm, programs),
        Message::Policy(vm, mode, floor) => {
            keeper.set_mode(vm, mode);
            keeper.set_floor(vm, floor);
        }
        Message::Settings(settings) => keeper.settings = settings,
        Message::Report(vm, reply) => drop(reply.send(keeper.report(vm, now_us))),
        Message::Profiles(reply) => {
            let held = keeper.machines.values().map(|machine| HeldProfile {
                storage: super::storage_of(machine.uuid),
                summary: machine.mind.summary(),
                refused: machine.mind.refused.clone(),
            });
            let _ = reply.send(held.collect());
        }
        Message::Forget(storage, reply) => {
            keeper.forget(&storage);
            let _ = reply.send(());
        }
        Message::Save(reply) => {
            save(keeper);
            let _ = reply.send(());
        }
        // Seen by the loop.
        Message::Stop => {}
    }
}

fn save(keeper: &mut Keeper) {
    for (_, pending) in keeper.save() {
        if let Err(error) = pending.wait() {
            tracing::warn!(%error, "profile of a machine's memory not saved");
        }
    }
}

fn stop(mut keeper: Keeper) {
    while hear(&mut keeper) {}
    save(&mut keeper);
}

/// The clock of faults: `CLOCK_MONOTONIC` in microseconds.
fn now_us() -> u64 {
    // The clock is there on every Linux.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
