//! HTTP client of prestagectl over the daemon's unix socket: JSON, files, and rows of CSV as they come; one connection a request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use prestage_integration::api::Problem;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Largest answer taken: a host of a thousand disks answers with under a megabyte.
const ANSWER_MAX: usize = 64 << 20;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot reach prestaged at {socket}: {reason}{hint}", socket = socket.display(), hint = hint(reason.kind()))]
    Unreachable { socket: PathBuf, reason: io::Error },
    /// The daemon said no, and why.
    #[error("{}", .0.detail)]
    Refused(Problem),
    #[error("{socket} does not answer as prestaged does ({detail}); is it another program's socket, or another version's?", socket = socket.display())]
    Protocol { socket: PathBuf, detail: String },
}

fn hint(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::PermissionDenied => "; run it as root or as a member of the socket's group",
        io::ErrorKind::TimedOut => "; it is there but too busy, see `journalctl -u prestaged`",
        _ => {
            "; is prestaged running? See `systemctl status prestaged`. Another socket: --socket PATH or PRESTAGE_SOCKET"
        }
    }
}

/// Longest wait for the answer to a question. Those about machines wait for libvirt, which has 30 s.
const QUESTION: Duration = Duration::from_secs(40);

/// What is sent, and of what type it is.
#[derive(Debug)]
struct Content {
    kind: &'static str,
    bytes: Bytes,
}

/// Calls the daemon.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// Waits at most 150 s for an answer: the daemon itself gives up after 120 s and says so.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), timeout: Duration::from_secs(150) }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(self.json(body)?)).await
    }

    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::PUT, path, Some(self.json(body)?)).await
    }

    /// Deletes; the answer has no body.
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, path, None).await
    }

    /// Asks for a file.
    pub async fn get_file(&self, path: &str) -> Result<Bytes, ClientError> {
        let (status, bytes) = self.timed(Method::GET, path, None).await?;
        if status.is_success() {
            return Ok(bytes);
        }
        self.decode::<()>(status, &bytes)?;
        Err(self.protocol(format!("status {status} without an explanation")))
    }

    /// Sends a file.
    pub async fn post_file<T: DeserializeOwned>(&self, path: &str, file: Vec<u8>) -> Result<T, ClientError> {
        let body = Content { kind: "application/octet-stream", bytes: Bytes::from(file) };
        self.call(Method::POST, path, Some(body)).await
    }

    fn json(&self, body: &impl Serialize) -> Result<Content, ClientError> {
        let bytes = serde_json::to_vec(body).map_err(|error| self.protocol(error))?;
        Ok(Content { kind: "application/json", bytes: Bytes::from(bytes) })
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Content>,
    ) -> Result<T, ClientError> {
        let (status, bytes) = self.timed(method, path, body).await?;
        self.decode(status, &bytes)
    }

    async fn timed(
        &self,
        method: Method,
        path: &str,
        body: Option<Content>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        // Questions are answered from memory; orders may have to wait for a store or libvirt.
        let limit = if method == Method::GET { self.timeout.min(QUESTION) } else { self.timeout };
        match tokio::time::timeout(limit, self.exchange(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(self.unreachable(io::Error::from(io::ErrorKind::TimedOut))),
        }
    }

    fn decode<T: DeserializeOwned>(&self, status: StatusCode, bytes: &[u8]) -> Result<T, ClientError> {
        if status.is_success() {
            // An empty answer is JSON's null, which reads as `()`.
            let text: &[u8] = if bytes.is_empty() { b"null" } else { bytes };
            return serde_json::from_slice(text).map_err(|error| self.protocol(error));
        }
        match serde_json::from_slice::<Problem>(bytes) {
            Ok(problem) => Err(ClientError::Refused(problem)),
            Err(_) => Err(self.protocol(format!("status {status} without an explanation"))),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Content>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        Ok((status, self.body(response).await?))
    }

    /// Asks for rows; they may come for as long as both sides live.
    pub async fn rows(&self, path: &str) -> Result<RowStream, ClientError> {
        let response = match tokio::time::timeout(QUESTION, self.send(Method::GET, path, None)).await {
            Ok(response) => response?,
            Err(_) => return Err(self.unreachable(io::Error::from(io::ErrorKind::TimedOut))),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(RowStream { body: response.into_body(), begun: Vec::new(), lines: Vec::new().into_iter() });
        }
        let bytes = self.body(response).await?;
        match self.decode::<()>(status, &bytes) {
            Err(error) => Err(error),
            Ok(()) => Err(self.protocol(format!("status {status} without an explanation"))),
        }
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        Ok(body.map_err(|error| self.protocol(error))?.to_bytes())
    }

    async fn send(&self, method: Method, path: &str, body: Option<Content>) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(error))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.failed(&error))?;
        // Ends with the answer.
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "prestaged");
        let bytes = match body {
            None => Bytes::new(),
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, body.kind);
                body.bytes
            }
        };
        let request = request.body(Full::new(bytes)).map_err(|error| self.protocol(error))?;
        sender.send_request(request).await.map_err(|error| self.failed(&error))
    }

    fn unreachable(&self, reason: io::Error) -> ClientError {
        ClientError::Unreachable { socket: self.socket.clone(), reason }
    }

    fn protocol(&self, detail: impl ToString) -> ClientError {
        ClientError::Protocol { socket: self.socket.clone(), detail: detail.to_string() }
    }

    /// What is not HTTP is another program's; a connection that ends early is a daemon that went away.
    fn failed(&self, error: &hyper::Error) -> ClientError {
        if error.is_parse() {
            return self.protocol(error);
        }
        self.unreachable(io::Error::new(io::ErrorKind::ConnectionReset, "it closed the connection"))
    }
}

/// Rows of CSV as they come, line by line.
#[derive(Debug)]
pub struct RowStream {
    body: Incoming,
    /// A line whose end has not come yet.
    begun: Vec<u8>,
    lines: std::vec::IntoIter<String>,
}

impl RowStream {
    /// The next line, without its end; `None` when the daemon has nothing more to say. May be dropped while it waits: no
    /// line is lost.
    ///
    /// # Errors
    /// The connection broke off.
    pub async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(line) = self.lines.next() {
                return Ok(Some(line));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let Ok(data) = frame.map_err(io::Error::other)?.into_data() else { continue };
            self.begun.extend_from_slice(&data);
            let Some(end) = self.begun.iter().rposition(|byte| *byte == b'\n') else { continue };
            let rest = self.begun.split_off(end + 1);
            let whole = std::mem::replace(&mut self.begun, rest);
            self.lines = String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect::<Vec<_>>().into_iter();
        }
    }
}

/// Encodes one part of a path (RFC 3986: all but unreserved characters).
#[must_use]
pub fn encode(part: &str) -> String {
    let mut text = String::with_capacity(part.len());
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}
