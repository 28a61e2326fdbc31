//! Plain HTTP: every request is sent to HTTPS. Nothing else is served without TLS, and no body is read.

use std::{convert::Infallible, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    body::{self, Body},
    host,
    refuse::{Form, Refusal},
};

const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Of the whole connection: a redirect is quick.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(30);
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Answers everything on `stream` with a redirect to port `https_port`.
pub(crate) async fn serve(stream: TcpStream, https_port: u16) {
    let answer = service_fn(async |request: Request<Incoming>| Ok::<_, Infallible>(redirect(&request, https_port)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    if let Ok(Err(error)) = timeout(CONNECTION_DEADLINE, connection).await {
        tracing::debug!("a plain connection ended: {error}");
    }
}

fn redirect<B>(request: &Request<B>, https_port: u16) -> Response<Body> {
    let Ok(host) = host::requested_host(request.uri(), request.headers()) else {
        return Refusal::BadHost.answer(Form::Json);
    };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let port = if https_port == 443 { String::new() } else { format!(":{https_port}") };
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let Ok(location) = HeaderValue::from_str(&format!("https://{host}{port}{path}")) else {
        return Refusal::Malformed.answer(Form::Json);
    };
    let mut response = Response::new(body::empty());
    // 308 keeps the method: a POST must not become a GET on its way.
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    response.headers_mut().insert(header::LOCATION, location);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_kept_and_the_port_changed() {
        let check = |host: &str, path: &str, port, expected: &str| {
            let request = Request::builder().uri(path).header("host", host).body(()).unwrap();
            assert_eq!(redirect(&request, port).headers()["location"], expected);
        };
        check("demo-a1b2c3.sprites.localhost:8080", "/a?b=c", 8443, "https://demo-a1b2c3.sprites.localhost:8443/a?b=c");
        check("api.localhost", "/", 443, "https://api.localhost/");
        check("[::1]:80", "/", 8443, "https://[::1]:8443/");
        let nobody = Request::builder().uri("/").body(()).unwrap();
        assert_eq!(redirect(&nobody, 443).status(), StatusCode::BAD_REQUEST);
    }
}
