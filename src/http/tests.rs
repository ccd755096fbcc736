pub(crate) mod server;

use std::io::Write;

use tokio::time::timeout;

use super::*;
use server::{HttpTestServer, Reply, reply};

fn url(scheme: &str, server: &HttpTestServer) -> Url {
    Url::parse(&format!("{scheme}://{}/path?query", server.host_port())).unwrap()
}

fn client_trusting(pem: &str) -> Client {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(pem.as_bytes()).unwrap();
    Client::new(Some(file.path())).unwrap()
}

async fn get(client: &Client, url: &Url, certificates: Certificates) -> Result<HttpResponse, HttpError> {
    client.send(Request::new(Method::GET, url, certificates)).await
}

fn outage_kind(answer: Result<HttpResponse, HttpError>) -> Option<OutageKind> {
    match answer {
        Err(HttpError::Unreachable { kind, .. }) => Some(kind),
        _ => None,
    }
}

#[tokio::test]
async fn a_request_names_host_and_user_agent_and_omits_the_urls_password() {
    let server = HttpTestServer::start(|_| reply(204, &[], b"")).await;
    let url = Url::parse(&format!("http://user:secret@{}/path?query#part", server.host_port())).unwrap();
    let answer = get(&Client::new(None).unwrap(), &url, Certificates::Verified).await.unwrap();
    assert_eq!(answer.status, 204);
    let request = server.requests().remove(0);
    assert_eq!(request.request_line, "GET /path?query");
    assert_eq!(request.header("host"), Some(server.host_port().as_str()));
    assert_eq!(request.header("user-agent"), Some(USER_AGENT_VALUE));
    assert_eq!(request.header("authorization"), None);
}

#[tokio::test]
async fn a_certificate_is_verified_unless_any_is_accepted() {
    let (server, pem) = HttpTestServer::start_tls(|_| reply(200, &[], b"here")).await;
    let (url, untrusting_client) = (url("https", &server), Client::new(None).unwrap());
    assert_eq!(outage_kind(get(&untrusting_client, &url, Certificates::Verified).await), Some(OutageKind::Tls));
    assert_eq!(server.request_lines().len(), 0, "no request was sent to an unverified server");
    assert!(get(&untrusting_client, &url, Certificates::Any).await.is_ok());
    let body = get(&client_trusting(&pem), &url, Certificates::Verified).await.unwrap().read(4).await.unwrap();
    assert_eq!(body, "here");
    let (_, another) = HttpTestServer::start_tls(|_| reply(200, &[], b"")).await;
    assert_eq!(outage_kind(get(&client_trusting(&another), &url, Certificates::Verified).await), Some(OutageKind::Tls));
}

#[tokio::test]
async fn the_outage_kinds_of_an_unreachable_server_are_distinguished() {
    let client = Client::new(None).unwrap();
    let plain = HttpTestServer::start(|_| reply(200, &[], b"")).await;
    assert_eq!(outage_kind(get(&client, &url("https", &plain), Certificates::Any).await), Some(OutageKind::Tls));

    let hangs_up = HttpTestServer::start(|_| Reply::Bytes(Vec::new())).await;
    assert_eq!(outage_kind(get(&client, &url("http", &hangs_up), Certificates::Any).await), Some(OutageKind::Refused));

    let closed_url = url("http", &plain);
    drop(plain);
    while client.probe(&closed_url, Certificates::Any).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(outage_kind(get(&client, &closed_url, Certificates::Any).await), Some(OutageKind::Refused));

    // A name that never exists (RFC 2606).
    let unresolvable = Url::parse("http://registry.invalid/").unwrap();
    assert_eq!(outage_kind(get(&client, &unresolvable, Certificates::Any).await), Some(OutageKind::NoSuchHost));
}

#[tokio::test]
async fn a_server_that_requires_a_client_certificate_is_reachable() {
    let server = HttpTestServer::start_requiring_client_certificate().await;
    let answer = get(&Client::new(None).unwrap(), &url("https", &server), Certificates::Any).await;
    assert_eq!(answer.err(), Some(HttpError::ClientCertificateRequired));
}

#[tokio::test]
async fn the_size_of_a_response_is_bounded() {
    let client = Client::new(None).unwrap();
    let response_to = async |bytes: Vec<u8>| {
        let server = HttpTestServer::start(move |_| Reply::Bytes(bytes.clone())).await;
        get(&client, &url("http", &server), Certificates::Any).await
    };
    let long_head = format!("HTTP/1.1 200 x\r\na: {}\r\n\r\n", "b".repeat(2 * MAX_HEAD));
    let many_headers = format!("HTTP/1.1 200 x\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
    for (what, bytes) in [("long", long_head), ("many", many_headers), ("no HTTP", "SSH-2.0-x\r\n".into())] {
        assert!(matches!(response_to(bytes.into_bytes()).await, Err(HttpError::NotHttp(_))), "{what}");
    }
    let body = |chunk: &str| format!("HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n{chunk}\r\n0\r\n\r\n");
    let answer = response_to(body("5\r\nfives").into_bytes()).await.unwrap();
    assert_eq!(answer.read(5).await.unwrap(), "fives");
    let answer = response_to(body("6\r\nsixsix").into_bytes()).await.unwrap();
    assert_eq!(answer.read(5).await, Err(HttpError::BodyTooLong(5)));
    let answer = response_to(b"HTTP/1.1 200 x\r\ncontent-length: 9\r\n\r\nshort".to_vec()).await.unwrap();
    assert!(matches!(answer.read(9).await, Err(HttpError::Unreachable { .. })), "cut off");
}

#[test]
fn a_file_without_a_usable_certificate_is_rejected() {
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
fn address_families_are_interleaved() {
    let addresses = |text: &str| text.split(' ').map(|address| address.parse().unwrap()).collect::<Vec<SocketAddr>>();
    let found = addresses("[::1]:1 [::2]:1 [::3]:1 1.0.0.1:1");
    assert_eq!(interleave_families(found), addresses("[::1]:1 1.0.0.1:1 [::2]:1 [::3]:1"));
    assert_eq!(interleave_families(addresses("1.0.0.1:1 1.0.0.2:1")), addresses("1.0.0.1:1 1.0.0.2:1"));
}

#[tokio::test]
async fn a_silent_address_delays_the_next_address_by_one_attempt_delay() {
    // Linux drops connection attempts while the queue of the listener is full.
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    silent.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
    silent.listen(0).unwrap();
    let silent_address = silent.local_addr().unwrap().as_socket().unwrap();
    let _queued = std::net::TcpStream::connect(silent_address).unwrap();
    let server = HttpTestServer::start(|_| reply(200, &[], b"")).await;
    let answering = server.host_port().parse().unwrap();
    let connected = timeout(Duration::from_secs(20), connect_first(vec![silent_address, answering])).await;
    assert_eq!(connected.expect("the second attempt").unwrap().peer_addr().unwrap(), answering);
}
