//! Web: OpenMetrics and the status page over HTTP, on this machine unless told otherwise.
//!
//! Read-only. On a loopback address only requests that name this machine are answered: a page from
//! elsewhere, open in somebody's browser, could otherwise read the answers through a name of its own.

use std::io::Cursor;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use serde::Serialize;
use serde_json::json;
use tiny_http::{Header, Method, Request, Response};

use super::metrics;
use super::watch::Watch;
use super::{Failure, exit};

/// The status page: everything is in it.
const PAGE: &str = include_str!("page.html");
/// Entries of the ledger that the page gets.
const ERRORS_SHOWN: usize = 200;
/// An address that is ours, and that nobody is answered at yet.
pub(super) struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

/// A server at work.
pub(super) struct Running(Arc<tiny_http::Server>);

impl Server {
    /// Takes the address. Starts no thread: the daemon is still to be forked.
    pub(super) fn bind(address: SocketAddr) -> Result<Server, Failure> {
        let fail = |e| Failure::new(exit::FAILURE, format!("--metrics {address}: bind: {e}"));
        let listener = TcpListener::bind(address).map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        Ok(Server { listener, address })
    }

    /// Answers on threads of its own. What fails is told in the log.
    pub(super) fn run(self, watch: &Arc<Watch>) -> Option<Running> {
        let fail = |e: &dyn std::fmt::Display| tracing::warn!("--metrics: {e}");
        let server = tiny_http::Server::from_listener(self.listener, None);
        let server = Arc::new(server.inspect_err(|e| fail(e)).ok()?);
        let (serving, watch) = (Arc::clone(&server), Arc::clone(watch));
        let address = self.address;
        let serve = move || {
            for request in serving.incoming_requests() {
                let response = respond(&request, address, &watch);
                if let Err(e) = request.respond(response) {
                    tracing::debug!("web: {e}"); // The client has gone.
                }
            }
        };
        let thread = std::thread::Builder::new().name("web".into());
        thread.spawn(serve).inspect_err(|e| fail(e)).ok()?;
        tracing::info!("metrics and status page: http://{address}/");
        Some(Running(server))
    }
}

impl Running {
    /// Answers nobody any more.
    pub(super) fn stop(&self) {
        self.0.unblock();
    }
}

type Answer = Response<Cursor<Vec<u8>>>;

fn respond(request: &Request, address: SocketAddr, watch: &Arc<Watch>) -> Answer {
    if address.ip().is_loopback() && !names_this_machine(request) {
        return plain(
            403,
            "this address answers only to the names of this machine\n",
        );
    }
    if !matches!(request.method(), Method::Get | Method::Head) {
        return plain(405, "read-only\n");
    }
    match request.url().split('?').next().unwrap_or_default() {
        "/" => typed(PAGE.as_bytes().to_vec(), "text/html; charset=utf-8"),
        "/metrics" => typed(
            metrics::text(watch).into_bytes(),
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        "/status.json" => as_json(&watch.report()),
        "/history.json" => as_json(&watch.history()),
        "/errors.json" => {
            let all = watch.ledger();
            let shown = &all[..all.len().min(ERRORS_SHOWN)];
            as_json(&json!({ "entries": shown, "count": all.len() }))
        }
        _ => plain(
            404,
            "/, /metrics, /status.json, /history.json, /errors.json\n",
        ),
    }
}

fn names_this_machine(request: &Request) -> bool {
    let mut hosts = request.headers().iter().filter(|h| h.field.equiv("Host"));
    hosts.next().is_none_or(|h| is_local(h.value.as_str()))
}

/// `localhost:9469`, `127.0.0.1:9469`, `[::1]:9469`, or without the port.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn as_json(value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(text) => {
            typed(text, "application/json").with_header(header("Cache-Control", "no-store"))
        }
        Err(e) => plain(500, &format!("json: {e}\n")),
    }
}

fn plain(status: u16, text: &str) -> Answer {
    typed(text.as_bytes().to_vec(), "text/plain").with_status_code(status)
}

fn typed(body: Vec<u8>, content_type: &str) -> Answer {
    Response::from_data(body)
        .with_header(header("Content-Type", content_type))
        .with_header(header("X-Content-Type-Options", "nosniff"))
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).expect("constants that are ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_names_of_this_machine_are_local() {
        for host in [
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:9469",
            "127.1.2.3",
            "[::1]:1",
            "[::1]",
        ] {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example:1",
            "10.0.0.1:1",
            "",
            "[::2]:1",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }
}
