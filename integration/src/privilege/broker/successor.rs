//! The end of a prestaged that was to take over and failed with everything in its hands: no two may serve one disk.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{UnixAddr, getsockname, getsockopt, sockopt};

use crate::handover::Held;
use crate::privilege::protocol::Refusal;
use crate::privilege::rules::Rules;

/// Kills who has come to the door where successors come to: whoever else the daemon may have a connection to is not its to end.
pub(super) fn end(socket: &OwnedFd, rules: &Rules) -> Result<(), Refusal> {
    let os = |error: nix::Error| Refusal::os("see who is there", &error.into());
    let here: UnixAddr = getsockname(socket.as_raw_fd()).map_err(os)?;
    let peer = getsockopt(socket, sockopt::PeerCredentials).map_err(os)?;
    if here.path() != Some(&rules.door) || (peer.uid() != 0 && peer.uid() != rules.user) {
        return Err(Refusal::rule(format!("process {} has not come to take over", peer.pid())));
    }
    match Held::new(peer.pid()) {
        Ok(process) => process.kill(),
        // It has ended.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
        Err(error) => return Err(Refusal::os("hold the successor", &error)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn who_has_not_come_to_the_door_is_not_ended() {
        // The other end is this process's in each case, which would be gone.
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let user = nix::unistd::geteuid().as_raw();
        let rules = Rules { door: path("door"), user, ..Rules::default() };
        let refused = |socket: UnixStream, rules: &Rules| {
            let said = end(&socket.into(), rules).unwrap_err();
            assert!(said.errno == 0 && said.reason.contains("has not come to take over"), "{said:?}");
        };
        let (one, _other) = UnixStream::pair().unwrap();
        refused(one, &rules);
        let elsewhere = UnixListener::bind(path("elsewhere")).unwrap();
        let _visitor = UnixStream::connect(path("elsewhere")).unwrap();
        refused(elsewhere.accept().unwrap().0, &rules);
        // What it has connected to itself: the other end is who listens.
        let _door = UnixListener::bind(path("door")).unwrap();
        refused(UnixStream::connect(path("door")).unwrap(), &rules);
    }
}
