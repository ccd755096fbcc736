//! An HTTP server with scripted responses and scripted faults of the connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use crate::test_bed::TestError;

/// The longest request head. containerd sends 400 bytes, or 2 KiB with a token.
const MAX_HEAD: u64 = 64 * 1024;

/// The request that a script receives.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// The path without its query.
    pub(crate) path: String,
    /// Header lines, converted to lower case.
    pub(crate) headers: Vec<String>,
    /// Requests of this method and path so far, this request included.
    pub(crate) count: usize,
}

impl Request {
    /// Whether the client presents a bearer token.
    pub(crate) fn has_token(&self) -> bool {
        self.headers.iter().any(|line| line.starts_with("authorization: bearer "))
    }
}

/// A script's reaction to a request.
#[derive(Debug)]
pub(crate) enum Reply {
    Response(Response),
    /// Bytes instead of HTTP, then the end of the connection.
    Raw(&'static [u8]),
    /// No bytes until the client closes the connection.
    Silence,
}

/// An HTTP response, and how the body is sent.
#[derive(Debug)]
pub(crate) struct Response {
    /// Code and reason phrase.
    pub(crate) status: String,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Vec<u8>,
    pub(crate) delivery: Delivery,
}

/// How a body is sent. `Content-Length` is always the length of the whole body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    /// The connection ends after this number of bytes.
    Cut(usize),
    /// No byte follows this number of bytes, and the connection stays open until the client closes
    /// it.
    Stall(usize),
    /// Chunks of this number of bytes, with a pause of 50 ms after each.
    Trickle(usize),
    /// No byte for this time, then the whole body.
    Late(Duration),
}

/// The pause after each chunk of a trickle.
const PAUSE: Duration = Duration::from_millis(50);

/// The number of chunks in a trickle of this duration.
pub(crate) fn chunks_in(time: Duration) -> usize {
    (time.as_millis() / PAUSE.as_millis()) as usize
}

impl Response {
    pub(crate) fn new(status: &str, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let headers = vec![format!("Content-Type: {content_type}")];
        Self { status: status.to_owned(), headers, body: body.into(), delivery: Delivery::Whole }
    }

    pub(crate) fn with_header(mut self, header: String) -> Self {
        self.headers.push(header);
        self
    }
}

/// Serves a script at an address, on threads that live as long as the tests.
pub(crate) fn serve(address: &str, script: impl Fn(Request) -> Reply + Send + Sync + 'static) -> Result<(), TestError> {
    let listener = TcpListener::bind(address).map_err(|error| format!("{address}: {error}"))?;
    let script = std::sync::Arc::new(script);
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let script = script.clone();
            // A client may disconnect at any time. No test depends on an unread response.
            std::thread::spawn(move || drop(respond(&connection, &*script)));
        }
    });
    Ok(())
}

/// Reads one request, sends the reply, and closes the connection.
fn respond(connection: &TcpStream, script: &dyn Fn(Request) -> Reply) -> io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut first = [0];
    connection.peek(&mut first)?;
    // A TLS handshake record begins with this byte. Go's servers answer in plain HTTP too.
    if first == [0x16] {
        return (&*connection).write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request.\n");
    }
    let mut lines = BufReader::new(connection.take(MAX_HEAD)).lines();
    let first = lines.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))?;
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let mut headers = Vec::new();
    for line in lines {
        match line?.to_ascii_lowercase() {
            line if line.is_empty() => break,
            line => headers.push(line),
        }
    }
    let request = Request { method: method.to_owned(), path: path.to_owned(), headers, count: 0 };
    match script(request) {
        Reply::Raw(bytes) => (&*connection).write_all(bytes),
        Reply::Silence => wait_for_end(connection),
        Reply::Response(response) => send(connection, &response, method == "HEAD"),
    }
}

fn wait_for_end(mut connection: &TcpStream) -> io::Result<()> {
    connection.set_read_timeout(None)?;
    io::copy(&mut connection, &mut io::sink()).map(drop)
}

fn send(mut connection: &TcpStream, response: &Response, is_head: bool) -> io::Result<()> {
    let Response { status, headers, body, delivery } = response;
    let (headers, length) = (headers.join("\r\n"), body.len());
    write!(connection, "HTTP/1.1 {status}\r\n{headers}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
    if is_head {
        return Ok(());
    }
    let first = |bytes: &usize| &body[..(*bytes).min(length)];
    match delivery {
        Delivery::Whole => connection.write_all(body),
        Delivery::Cut(bytes) => {
            connection.write_all(first(bytes))?;
            connection.shutdown(Shutdown::Both)
        }
        Delivery::Stall(bytes) => {
            connection.write_all(first(bytes))?;
            wait_for_end(connection)
        }
        Delivery::Trickle(bytes) => body.chunks((*bytes).max(1)).try_for_each(|piece| {
            connection.write_all(piece)?;
            std::thread::sleep(PAUSE);
            Ok(())
        }),
        Delivery::Late(time) => {
            std::thread::sleep(*time);
            connection.write_all(body)
        }
    }
}
