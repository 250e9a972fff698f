//! A client's way from the greeting to an export.

use super::wire::Inbound;
use prestage_integration::export::nbd::{Agreement, Exports, Handshake, Security, Step, TlsServer};
use std::sync::Arc;
use std::time::Duration;

/// From the greeting to the choice of an export, with a TLS handshake in between.
const LIMIT: Duration = Duration::from_secs(10);

/// Negotiates. Requests that have come already stay with the connection.
///
/// # Errors
/// Why the client did not enter, in words for the log.
pub(super) async fn negotiate(
    inbound: Inbound,
    exports: Arc<dyn Exports + Send + Sync>,
    security: Security,
    tls: Option<TlsServer>,
) -> Result<(Agreement, Inbound), String> {
    let shard = inbound.wire.shard.clone();
    let wire = std::rc::Rc::downgrade(&inbound.wire);
    let talk = talk(inbound, exports, security, tls);
    let ended = shard.timeout(LIMIT, talk).await;
    let result = ended.unwrap_or_else(|_| Err(format!("it did not choose an export within {LIMIT:?}")));
    if result.is_err()
        && let Some(wire) = wire.upgrade()
    {
        wire.kill();
    }
    result
}

async fn talk(
    mut inbound: Inbound,
    exports: Arc<dyn Exports + Send + Sync>,
    security: Security,
    tls: Option<TlsServer>,
) -> Result<(Agreement, Inbound), String> {
    let mut handshake = Handshake::new(security);
    let mut answers = Vec::new();
    handshake.greet(&mut answers);
    loop {
        let (taken, step) = handshake.receive(inbound.peek(), &*exports, &mut answers);
        inbound.consume(taken);
        inbound.wire.answer(answers.len(), |out| out.append(&mut answers));
        let words = |error: std::io::Error| error.to_string();
        inbound.wire.send().await.map_err(words)?;
        match step {
            Step::Enter(agreement) => return Ok((agreement, inbound)),
            Step::Close => {
                inbound.wire.say_goodbye();
                inbound.wire.send().await.map_err(words)?;
                return Err("it gave up, or broke the protocol".to_owned());
            }
            Step::StartTls => {
                let Some(server) = &tls else { return Err("there is no TLS here".to_owned()) };
                if !inbound.peek().is_empty() {
                    return Err("it sent more before TLS had begun".to_owned());
                }
                inbound.start_tls(server.session().map_err(|error| error.to_string())?);
                handshake.tls_started();
            }
            Step::More => {}
        }
        let filled = inbound.fill(false).await;
        if filled.is_err() {
            // TLS says why before it ends.
            let _ = inbound.wire.send().await;
        }
        if !filled.map_err(words)? {
            return Err("it closed before it had chosen an export".to_owned());
        }
    }
}
