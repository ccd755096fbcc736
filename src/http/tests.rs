use std::io::Write;

use super::server::{Reply, Server, reply};
use super::*;

fn url(scheme: &str, server: &Server) -> Url {
    Url::parse(&format!("{scheme}://{}/path?query", server.name())).unwrap()
}

fn trusting(pem: &str) -> Client {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(pem.as_bytes()).unwrap();
    Client::new(Some(file.path())).unwrap()
}

async fn get(client: &Client, url: &Url, certificates: Certificates) -> Result<Answer, Failure> {
    client.send(Request::new(Method::GET, url, certificates)).await
}

fn kind(answer: Result<Answer, Failure>) -> Option<OutageKind> {
    match answer {
        Err(Failure::Unreachable { kind, .. }) => Some(kind),
        _ => None,
    }
}

#[tokio::test]
async fn a_request_says_who_asks_whom_and_keeps_the_urls_password_to_itself() {
    let server = Server::start(|_| reply(204, &[], b"")).await;
    let url = Url::parse(&format!("http://user:secret@{}/path?query#part", server.name())).unwrap();
    let answer = get(&Client::new(None).unwrap(), &url, Certificates::Verified).await.unwrap();
    assert_eq!(answer.status, 204);
    let seen = server.seen().remove(0);
    assert_eq!(seen.asked, "GET /path?query");
    assert_eq!(seen.header("host"), Some(server.name().as_str()));
    assert_eq!(seen.header("user-agent"), Some(AGENT));
    assert_eq!(seen.header("authorization"), None);
}

#[tokio::test]
async fn a_certificate_is_checked_unless_any_will_do() {
    let (server, pem) = Server::start_tls(|_| reply(200, &[], b"here")).await;
    let (url, stranger) = (url("https", &server), Client::new(None).unwrap());
    assert_eq!(kind(get(&stranger, &url, Certificates::Verified).await), Some(OutageKind::Tls));
    assert_eq!(server.asked().len(), 0, "nothing was said to an unknown server");
    assert!(get(&stranger, &url, Certificates::Any).await.is_ok());
    let body = get(&trusting(&pem), &url, Certificates::Verified).await.unwrap().read(4).await.unwrap();
    assert_eq!(body, "here");
    let (_, another) = Server::start_tls(|_| reply(200, &[], b"")).await;
    assert_eq!(kind(get(&trusting(&another), &url, Certificates::Verified).await), Some(OutageKind::Tls));
}

#[tokio::test]
async fn ways_not_to_reach_a_server_are_told_apart() {
    let client = Client::new(None).unwrap();
    let plain = Server::start(|_| reply(200, &[], b"")).await;
    assert_eq!(kind(get(&client, &url("https", &plain), Certificates::Any).await), Some(OutageKind::Tls));

    let hangs_up = Server::start(|_| Reply::Bytes(Vec::new())).await;
    assert_eq!(kind(get(&client, &url("http", &hangs_up), Certificates::Any).await), Some(OutageKind::Refused));

    let gone = url("http", &plain);
    drop(plain);
    while client.greet(&gone, Certificates::Any).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(kind(get(&client, &gone, Certificates::Any).await), Some(OutageKind::Refused));

    // Reserved to never exist (RFC 2606).
    let nowhere = Url::parse("http://registry.invalid/").unwrap();
    assert_eq!(kind(get(&client, &nowhere, Certificates::Any).await), Some(OutageKind::NoSuchHost));
}

#[tokio::test]
async fn a_server_that_wants_our_certificate_is_there() {
    let server = Server::start_for_known_clients().await;
    let answer = get(&Client::new(None).unwrap(), &url("https", &server), Certificates::Any).await;
    assert_eq!(answer.err(), Some(Failure::WantsCertificate));
}

#[tokio::test]
async fn what_comes_back_is_bounded() {
    let client = Client::new(None).unwrap();
    let asks = async |bytes: Vec<u8>| {
        let server = Server::start(move |_| Reply::Bytes(bytes.clone())).await;
        get(&client, &url("http", &server), Certificates::Any).await
    };
    let long_head = format!("HTTP/1.1 200 x\r\na: {}\r\n\r\n", "b".repeat(2 * MAX_HEAD));
    let many_headers = format!("HTTP/1.1 200 x\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
    for (what, bytes) in [("long", long_head), ("many", many_headers), ("no HTTP", "SSH-2.0-x\r\n".into())] {
        assert!(matches!(asks(bytes.into_bytes()).await, Err(Failure::NotHttp(_))), "{what}");
    }
    let body = |chunk: &str| format!("HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n{chunk}\r\n0\r\n\r\n");
    let answer = asks(body("5\r\nfives").into_bytes()).await.unwrap();
    assert_eq!(answer.read(5).await.unwrap(), "fives");
    let answer = asks(body("6\r\nsixsix").into_bytes()).await.unwrap();
    assert_eq!(answer.read(5).await, Err(Failure::TooLong(5)));
    let answer = asks(b"HTTP/1.1 200 x\r\ncontent-length: 9\r\n\r\nshort".to_vec()).await.unwrap();
    assert!(matches!(answer.read(9).await, Err(Failure::Unreachable { .. })), "cut off");
}

#[test]
fn a_file_without_a_usable_certificate_is_refused() {
    let with = |text: &str| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Client::new(Some(file.path())).map(drop)
    };
    assert!(matches!(with("no certificate"), Err(TrustError::Empty(_))));
    let no_certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(with(no_certificate), Err(TrustError::Certificate { .. })));
    assert!(matches!(Client::new(Some(Path::new("/nothing/is/here"))).map(drop), Err(TrustError::Pem { .. })));
}

#[test]
fn address_families_take_turns() {
    let addresses = |text: &str| text.split(' ').map(|address| address.parse().unwrap()).collect::<Vec<SocketAddr>>();
    let found = addresses("[::1]:1 [::2]:1 [::3]:1 1.0.0.1:1");
    assert_eq!(alternate(found), addresses("[::1]:1 1.0.0.1:1 [::2]:1 [::3]:1"));
    assert_eq!(alternate(addresses("1.0.0.1:1 1.0.0.2:1")), addresses("1.0.0.1:1 1.0.0.2:1"));
}
