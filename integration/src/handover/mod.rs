//! From one process to the next without letting go: a predecessor hands what it serves to its successor, over a unix socket
//! that only the daemon's own user and root may use.
//!
//! ```text
//! successor                                   predecessor
//!   Hello { program, formats }        →
//!                                     ←   Welcome { format }, or Restart: no format in common
//!   Ready                             →       it serves until here; whatever fails before costs nothing
//!                                             its rings end, everything it has open is closed
//!                                     ←   Estate { … } with descriptors
//!   Serving                           →       it ends
//! ```
//!
//! After `Restart` the predecessor ends as on a stop and closes the socket; the successor then starts as if nobody had been
//! there, and front-ends connect again.
//!
//! - [`Parcel`]: bytes and descriptors that refer to each other; `wire`: how it crosses the socket
//! - [`Door`]: where a predecessor waits
//! - [`Peer`]: the other one

mod held;
mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) use held::Held;

/// The estate's format that this program writes, and the formats it reads. A change that an older reader cannot skip is a new
/// format.
pub const FORMAT: u32 = 1;
/// Oldest format that this program reads.
pub const OLDEST_FORMAT: u32 = 1;

/// Why a hand-over did not happen.
#[derive(Debug, Error)]
pub enum HandOverError {
    #[error("hand-over socket {}: {source}", path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("no prestaged to take over from at {}: {source}; start one without --take-over", path.display())]
    NobodyThere { path: PathBuf, source: io::Error },
    #[error("the other prestaged does not answer: {0}")]
    Silent(#[source] io::Error),
    #[error("user {uid} may not take over; only root and the daemon's own user may")]
    Stranger { uid: u32 },
    #[error("the other prestaged sent what makes no sense here: {0}")]
    Words(String),
}

/// A message of the successor.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromSuccessor {
    /// First words.
    Hello { program: String, oldest_format: u32, format: u32, pid: u32 },
    /// Everything that can be prepared beside a serving predecessor is.
    Ready,
    /// Guests are served again.
    Serving,
}

/// A message of the predecessor; `T` is the estate.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromPredecessor<T> {
    /// It will write that format.
    Welcome { program: String, format: u32 },
    /// No format in common: wait until this socket is closed, then start plainly.
    Restart { program: String },
    /// Everything is yours.
    Estate(T),
}

/// The format to speak with a successor that reads `oldest..=newest`: ours, or none.
#[must_use]
pub fn common_format(oldest: u32, newest: u32) -> Option<u32> {
    (oldest..=newest).contains(&FORMAT).then_some(FORMAT)
}

/// A descriptor's place in its parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place(u32);

/// Descriptors that a message refers to.
#[derive(Debug, Default)]
pub struct Parcel(Vec<Option<OwnedFd>>);

impl Parcel {
    /// Adds a descriptor.
    pub fn put(&mut self, fd: OwnedFd) -> Place {
        self.0.push(Some(fd));
        // Far fewer than a process can have open.
        Place(self.0.len() as u32 - 1)
    }

    /// Takes one out.
    ///
    /// # Errors
    /// There is none at that place, or not any more.
    pub fn take(&mut self, place: Place) -> Result<OwnedFd, HandOverError> {
        let fd = self.0.get_mut(place.0 as usize).and_then(Option::take);
        fd.ok_or_else(|| HandOverError::Words(format!("descriptor {} is missing", place.0)))
    }
}

/// The other process.
#[derive(Debug)]
pub struct Peer {
    stream: UnixStream,
    process: Held,
}

/// The user and the process at the other end, as of its `connect` or `listen`.
fn credentials(stream: &UnixStream) -> io::Result<(u32, i32)> {
    let credentials = getsockopt(stream, sockopt::PeerCredentials)?;
    Ok((credentials.uid(), credentials.pid()))
}

impl Peer {
    /// Reaches the predecessor behind a door.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn connect(path: &Path) -> Result<Self, HandOverError> {
        let stream = UnixStream::connect(path);
        let stream = stream.map_err(|source| HandOverError::NobodyThere { path: path.into(), source })?;
        let process = credentials(&stream).and_then(|(_, pid)| Held::new(pid)).map_err(HandOverError::Silent)?;
        Ok(Self { stream, process })
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Kills the other and waits for its end. False: it is still there.
    #[must_use]
    pub fn end(&self) -> bool {
        match crate::privilege::broker() {
            Some(broker) => {
                if let Err(error) = broker.end_successor(self.pid().unsigned_abs()) {
                    tracing::error!(%error, pid = self.pid(), "it is not ended");
                }
            }
            None => self.process.kill(),
        }
        self.process.ends()
    }

    /// How long a message of the other may take; `None`: for ever.
    ///
    /// # Errors
    /// The socket takes no limit.
    pub fn set_patience(&self, limit: Option<Duration>) -> Result<(), HandOverError> {
        let set = self.stream.set_read_timeout(limit).and_then(|()| self.stream.set_write_timeout(limit));
        set.map_err(HandOverError::Silent)
    }

    /// Sends a message with its descriptors.
    ///
    /// # Errors
    /// The other is gone or does not read.
    pub fn send(&self, message: &impl Serialize, parcel: &Parcel) -> Result<(), HandOverError> {
        let body = serde_json::to_vec(message).map_err(|error| HandOverError::Words(error.to_string()))?;
        wire::send(&self.stream, &body, &parcel.0.iter().flatten().collect::<Vec<_>>()).map_err(HandOverError::Silent)
    }

    /// Receives a message with its descriptors. Blocks, as long as [`set_patience`](Self::set_patience) says.
    ///
    /// # Errors
    /// The other is gone, says nothing, or nothing that makes sense.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Parcel), HandOverError> {
        let (body, fds) = wire::receive(&self.stream).map_err(HandOverError::Silent)?;
        let message = serde_json::from_slice(&body).map_err(|error| HandOverError::Words(error.to_string()))?;
        Ok((message, Parcel(fds.into_iter().map(Some).collect())))
    }

    /// Waits until the other has closed the socket, as its end does.
    pub fn wait_gone(&self) {
        // Whatever it is that comes: only the end counts.
        while wire::receive(&self.stream).is_ok() {}
    }
}

/// Where a predecessor waits for its successor: a socket in its folder. The file is removed on drop.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Opens the door. Whoever had it before has ended or handed over, which locks of the caller's say.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(path: &Path) -> Result<Self, HandOverError> {
        let socket_error = |source| HandOverError::Socket { path: path.into(), source };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(socket_error(error)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(socket_error)?;
        // Who connects in between is looked at all the same.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(socket_error)?;
        listener.set_nonblocking(true).map_err(socket_error)?;
        Ok(Self { listener, path: path.into() })
    }

    /// The listening descriptor, non-blocking, to wait on.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// Takes a connection of [`Door::listener`] as the successor's.
    ///
    /// # Errors
    /// It is somebody who may not take over.
    pub fn admit(stream: UnixStream) -> Result<Peer, HandOverError> {
        let (uid, pid) = credentials(&stream).map_err(HandOverError::Silent)?;
        if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
            return Err(HandOverError::Stranger { uid });
        }
        stream.set_nonblocking(false).map_err(HandOverError::Silent)?;
        // Connected as it is, it has this number still.
        Ok(Peer { process: Held::new(pid).map_err(HandOverError::Silent)?, stream })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    fn pair() -> (Peer, Peer) {
        let (one, other) = UnixStream::pair().unwrap();
        let peer = |stream| Peer { stream, process: Held::new(std::process::id() as i32).unwrap() };
        (peer(one), peer(other))
    }

    #[test]
    fn many_descriptors_and_bytes_arrive_in_order() {
        let (one, other) = pair();
        let mut parcel = Parcel::default();
        let files: Vec<_> = (0..700_u32)
            .map(|number| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&number.to_le_bytes()).unwrap();
                (number, parcel.put(file.into()))
            })
            .collect();
        let text = "x".repeat(1 << 20);
        let sender = std::thread::spawn(move || one.send(&(text, files), &parcel).unwrap());
        let ((text, files), mut parcel): ((String, Vec<(u32, Place)>), _) = other.receive().unwrap();
        sender.join().unwrap();
        assert_eq!(text.len(), 1 << 20);
        for (number, place) in files {
            let mut file = std::fs::File::from(parcel.take(place).unwrap());
            file.rewind().unwrap();
            let mut bytes = [0; 4];
            file.read_exact(&mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), number);
            assert!(parcel.take(place).is_err(), "taken once");
        }
        assert!(parcel.take(Place(700)).is_err());
    }

    #[test]
    fn nonsense_and_a_cut_connection_are_errors() {
        let (mut one, other) = pair();
        one.stream.write_all(&[0xff; 64]).unwrap();
        assert!(other.receive::<FromSuccessor>().is_err());
        let (one, other) = pair();
        one.send(&"no message of ours", &Parcel::default()).unwrap();
        assert!(matches!(other.receive::<FromSuccessor>(), Err(HandOverError::Words(_))));
        drop(one);
        assert!(matches!(other.receive::<FromSuccessor>(), Err(HandOverError::Silent(_))));
    }

    #[test]
    fn a_process_is_ended_and_its_end_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let held = Held::new(child.id() as i32).unwrap();
        held.kill();
        assert!(held.ends());
        assert!(!child.wait().unwrap().success());
        held.kill();
        assert!(held.ends(), "it had ended");
    }

    #[test]
    fn a_format_is_spoken_only_where_both_know_it() {
        assert_eq!(common_format(1, FORMAT + 5), Some(FORMAT));
        assert_eq!(common_format(FORMAT + 1, FORMAT + 5), None);
    }

    #[test]
    fn a_door_is_for_its_owner_and_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        assert!(matches!(Peer::connect(&path), Err(HandOverError::NobodyThere { .. })));
        let door = Door::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let visitor = Peer::connect(&path).unwrap();
        let (stream, _) = door.listener().unwrap().accept().unwrap();
        let host = Door::admit(stream).unwrap();
        visitor.send(&FromSuccessor::Ready, &Parcel::default()).unwrap();
        assert!(matches!(host.receive().unwrap().0, FromSuccessor::Ready));
        drop(door);
        assert!(!path.exists());
    }
}
