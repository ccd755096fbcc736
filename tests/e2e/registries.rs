//! Registries that are there and do not help: each on a port of its own, so that tests which need another kind of trouble run side by side.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::bed::Failure;

/// What is wrong with the registry that an image names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum World {
    /// Nobody listens.
    Refuses,
    /// 401, whoever asks.
    Unauthorized,
    /// 403, whoever asks.
    Forbids,
    /// 404: it has lost everything.
    Lost,
    /// 429, always.
    Limits,
    /// 500.
    Fails,
    /// 200 and a page for people, as gateways and captive portals send it.
    Html,
}

impl World {
    const ALL: [Self; 7] =
        [Self::Refuses, Self::Unauthorized, Self::Forbids, Self::Lost, Self::Limits, Self::Fails, Self::Html];

    /// Its registry, as images name it.
    pub(crate) fn registry(self) -> String {
        format!("{ADDRESS}:{}", self.port())
    }

    fn port(self) -> u16 {
        match self {
            Self::Refuses => 5001,
            Self::Unauthorized => 5401,
            Self::Forbids => 5403,
            Self::Lost => 5404,
            Self::Limits => 5429,
            Self::Fails => 5500,
            Self::Html => 5200,
        }
    }

    /// The answer to everything: status line, headers, body. `None` where nobody answers.
    fn answer(self) -> Option<(&'static str, &'static str, &'static str)> {
        let json = "Content-Type: application/json";
        match self {
            Self::Refuses => None,
            Self::Unauthorized => Some((
                "401 Unauthorized",
                "Content-Type: application/json\r\nWWW-Authenticate: Basic realm=\"test\"",
                r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#,
            )),
            Self::Forbids => Some((
                "403 Forbidden",
                json,
                r#"{"errors":[{"code":"DENIED","message":"requested access is denied"}]}"#,
            )),
            Self::Lost => Some((
                "404 Not Found",
                json,
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
            )),
            Self::Limits => Some((
                "429 Too Many Requests",
                json,
                r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#,
            )),
            Self::Fails => Some(("500 Internal Server Error", "Content-Type: text/plain", "out of order")),
            Self::Html => Some((
                "200 OK",
                "Content-Type: text/html",
                "<!DOCTYPE html><html><body>Please sign in to use this network.</body></html>",
            )),
        }
    }
}

/// The hub's address.
const ADDRESS: &str = "10.77.0.1";

/// Another port of the same host, where nobody listens either: its registry has nothing in common with the others but the address.
pub(crate) const INVENTED_PORT: u16 = 5099;

/// Every registry that images of the tests name, so that containerd can be told to speak plain HTTP with it.
pub(crate) fn names() -> Vec<String> {
    World::ALL.iter().map(|world| world.registry()).chain([format!("{ADDRESS}:{INVENTED_PORT}")]).collect()
}

/// Starts those that answer, on threads that live as long as the tests. The caller is in the hub's network.
pub(crate) fn serve() -> Result<(), Failure> {
    for world in World::ALL {
        let Some(answer) = world.answer() else { continue };
        let listener =
            TcpListener::bind((ADDRESS, world.port())).map_err(|error| format!("{}: {error}", world.registry()))?;
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                std::thread::spawn(move || respond(connection, answer));
            }
        });
    }
    Ok(())
}

/// One request and its answer; then the connection ends.
fn respond(connection: TcpStream, (status, headers, body): (&str, &str, &str)) -> Option<()> {
    connection.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let mut lines = BufReader::new(connection.try_clone().ok()?).lines();
    let request = lines.next()?.ok()?;
    while !lines.next()?.ok()?.is_empty() {}
    let body_sent = if request.starts_with("HEAD ") { "" } else { body };
    let length = body.len();
    write!(
        &connection,
        "HTTP/1.1 {status}\r\n{headers}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body_sent}"
    )
    .ok()
}
