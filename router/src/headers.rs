//! What the edge takes out of, and puts into, the headers of a request and of its answer. Pure.
//!
//! | direction | out | in |
//! |---|---|---|
//! | to a sprite or coordinator | hop-by-hop and what `Connection` names, `x-sprite-*`, `Early-Data`, `Forwarded`, `Expect` | `X-Forwarded-*`, `Sprite-Client-Ip`, `Via`, `X-Request-Id` |
//! | to the client | hop-by-hop and what `Connection` names, the two internal `x-sprite-*` | `Via`, `X-Request-Id` |
//!
//! `X-Forwarded-For` is appended to, as the Sprites dialect has it; a sprite that needs the truth reads `Sprite-Client-Ip`.

use std::net::IpAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Version,
    header::{self, AsHeaderName},
};
use proto::{
    paths::{SPRITE_ID_HEADER, SPRITE_PORT_HEADER},
    token,
};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CLIENT_IP: HeaderName = HeaderName::from_static("sprite-client-ip");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const EARLY_DATA: HeaderName = HeaderName::from_static("early-data");
/// `X-Sprite-*` headers are ours alone, also in the spelling that CGI-like servers cannot tell apart.
const INTERNAL_PREFIX: &str = "x-sprite-";
/// Our name in `Via`.
const PSEUDONYM: &str = "sprites";
/// A request id of the caller is kept when it is at most this long and harmless in a log line.
const REQUEST_ID_LEN_MAX: usize = 128;

/// Facts about a request that the other side is told.
pub(crate) struct Client<'a> {
    pub(crate) ip: IpAddr,
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) version: Version,
    pub(crate) request_id: &'a HeaderValue,
}

/// Prepares headers from outside for the next hop.
pub(crate) fn clean_request(headers: &mut HeaderMap, client: &Client<'_>) {
    let wants_trailers = tokens(headers, header::TE).any(|token| token == "trailers");
    drop_hop_by_hop(headers);
    if wants_trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    let internal: Vec<HeaderName> = headers.keys().filter(|name| is_internal(name)).cloned().collect();
    for name in internal {
        headers.remove(name);
    }
    // `100 Continue` is a matter of one hop: our server side sends it when the next hop begins to take the body.
    for name in [EARLY_DATA, header::FORWARDED, header::EXPECT] {
        headers.remove(name);
    }
    join_cookies(headers);
    let ip = text(&client.ip.to_canonical().to_string());
    append_to_list(headers, FORWARDED_FOR, &ip);
    headers.insert(CLIENT_IP, ip);
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("https"));
    headers.insert(FORWARDED_HOST, text(client.host));
    headers.insert(FORWARDED_PORT, client.port.into());
    headers.insert(REQUEST_ID, client.request_id.clone());
    append_to_list(headers, header::VIA, &via(client.version));
}

/// Prepares an answer for the client. `version` is that of the answer as we received it.
pub(crate) fn clean_response(headers: &mut HeaderMap, version: Version, request_id: &HeaderValue) {
    drop_hop_by_hop(headers);
    headers.remove(SPRITE_ID_HEADER);
    headers.remove(SPRITE_PORT_HEADER);
    append_to_list(headers, header::VIA, &via(version));
    headers.insert(REQUEST_ID, request_id.clone());
}

/// The protocol that an HTTP/1.1 client wants to switch to; `None` when it is an ordinary request.
pub(crate) fn upgrade(version: Version, method: &Method, headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = version == Version::HTTP_11
        && method == Method::GET
        && tokens(headers, header::CONNECTION).any(|token| token == "upgrade");
    if asked { headers.get(header::UPGRADE).cloned() } else { None }
}

/// The bearer token of a request.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    token::bearer(headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes))
}

/// Removes `Authorization` if a token of the platform stands in it, valid or not. A program's own credentials stay.
pub(crate) fn remove_platform_tokens(headers: &mut HeaderMap) {
    if headers.get_all(header::AUTHORIZATION).iter().any(|value| token::is_in(value.as_bytes())) {
        headers.remove(header::AUTHORIZATION);
    }
}

/// How large they are, names and values.
pub(crate) fn bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
}

/// The caller's request id if it is harmless.
pub(crate) fn given_request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let id = headers.get(REQUEST_ID)?;
    let harmless = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good = !id.is_empty() && id.len() <= REQUEST_ID_LEN_MAX && id.as_bytes().iter().all(harmless);
    good.then(|| id.clone())
}

pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.and_then(|kind| kind.strip_prefix("application/grpc"))
        .is_some_and(|rest| matches!(rest.as_bytes().first(), None | Some(b'+' | b';')))
}

/// A browser that shows what it gets to a person.
pub(crate) fn wants_html(headers: &HeaderMap) -> bool {
    tokens(headers, header::ACCEPT).any(|kind| kind.split(';').next() == Some("text/html"))
}

fn is_internal(name: &HeaderName) -> bool {
    name.as_str().replace('_', "-").starts_with(INTERNAL_PREFIX)
}

fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let nominated: Vec<String> = tokens(headers, header::CONNECTION).collect();
    for name in nominated {
        // Nobody may use `Connection` to remove what routing and framing stand on.
        if !matches!(name.as_str(), "host" | "content-length") {
            headers.remove(name.as_str());
        }
    }
    for name in [
        header::CONNECTION,
        header::UPGRADE,
        header::TE,
        header::TRANSFER_ENCODING,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
    ] {
        headers.remove(name);
    }
}

/// HTTP/2 may send one cookie per header; HTTP/1 servers expect a single one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

fn append_to_list(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue) {
    let mut list: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    list.push(value.as_bytes());
    let joined = HeaderValue::from_bytes(&list.join(&b", "[..])).unwrap_or_else(|_impossible| value.clone());
    headers.insert(name, joined);
}

fn via(version: Version) -> HeaderValue {
    let number = match version {
        Version::HTTP_2 => "2",
        Version::HTTP_10 => "1.0",
        _ => "1.1",
    };
    text(&format!("{number} {PSEUDONYM}"))
}

/// The lower-cased members of a comma-separated header.
fn tokens(headers: &HeaderMap, name: impl AsHeaderName) -> impl Iterator<Item = String> {
    let values: Vec<String> = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|token| token.trim().to_ascii_lowercase())
        .filter(|token| !token.is_empty())
        .collect();
    values.into_iter()
}

fn text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("addresses, checked host names and our own words are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        map
    }

    fn cleaned(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = headers(pairs);
        let request_id = HeaderValue::from_static("r1");
        let ip = "::ffff:192.0.2.7".parse().unwrap();
        let client = Client {
            ip,
            host: "demo-a1b2c3.sprites.localhost",
            port: 8443,
            version: Version::HTTP_2,
            request_id: &request_id,
        };
        clean_request(&mut map, &client);
        map
    }

    #[test]
    fn hop_by_hop_and_nominated_headers_stay_here() {
        let map = cleaned(&[
            ("connection", "close, X-Secret"),
            ("connection", "Host, content-length"),
            ("x-secret", "1"),
            ("host", "h"),
            ("content-length", "5"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, Trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("proxy-authorization", "x"),
            ("proxy-connection", "x"),
            ("expect", "100-continue"),
            ("x-kept", "1"),
        ]);
        for gone in [
            "connection",
            "x-secret",
            "keep-alive",
            "transfer-encoding",
            "upgrade",
            "proxy-authorization",
            "proxy-connection",
            "expect",
        ] {
            assert!(!map.contains_key(gone), "{gone}");
        }
        assert_eq!(map["te"], "trailers");
        assert_eq!(
            (&map["host"], &map["content-length"], &map["x-kept"]),
            (&"h".parse().unwrap(), &"5".parse().unwrap(), &"1".parse().unwrap())
        );
    }

    #[test]
    fn nobody_outside_can_pretend_to_be_the_edge() {
        let map = cleaned(&[
            ("x-sprite-id", "x"),
            ("X-Sprite-Port", "22"),
            ("x-sprite-anything", "x"),
            ("x_sprite_id", "x"),
            ("forwarded", "for=1.2.3.4"),
            ("early-data", "1"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-proto", "gopher"),
            ("x-forwarded-host", "evil"),
            ("x-forwarded-port", "1"),
            ("sprite-client-ip", "1.2.3.4"),
            ("via", "1.1 a"),
        ]);
        for gone in ["x-sprite-id", "x-sprite-port", "x-sprite-anything", "x_sprite_id", "forwarded", "early-data"] {
            assert!(!map.contains_key(gone), "{gone}");
        }
        assert_eq!(map["x-forwarded-for"], "1.2.3.4, 192.0.2.7");
        assert_eq!(map["sprite-client-ip"], "192.0.2.7");
        assert_eq!(map["x-forwarded-proto"], "https");
        assert_eq!(map["x-forwarded-host"], "demo-a1b2c3.sprites.localhost");
        assert_eq!(map["x-forwarded-port"], "8443");
        assert_eq!(map["via"], "1.1 a, 2 sprites");
        assert_eq!(map["x-request-id"], "r1");
    }

    #[test]
    fn cookies_arrive_as_one() {
        assert_eq!(cleaned(&[("cookie", "a=1"), ("cookie", "b=2")])["cookie"], "a=1; b=2");
    }

    #[test]
    fn answers_lose_what_is_between_us_and_the_node() {
        let mut map = headers(&[
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "chunked"),
            ("x-sprite-id", "x"),
            ("x-sprite-wake", "memory"),
            ("x-sprite-capabilities", "signal"),
            ("trailer", "x-sum"),
        ]);
        clean_response(&mut map, Version::HTTP_11, &HeaderValue::from_static("r1"));
        let mut names: Vec<&str> = map.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["trailer", "via", "x-request-id", "x-sprite-capabilities", "x-sprite-wake"]);
    }

    #[test]
    fn an_upgrade_is_asked_for_in_full() {
        let full = [("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        assert_eq!(upgrade(Version::HTTP_11, &Method::GET, &headers(&full)).unwrap(), "websocket");
        assert_eq!(upgrade(Version::HTTP_11, &Method::POST, &headers(&full)), None);
        assert_eq!(upgrade(Version::HTTP_10, &Method::GET, &headers(&full)), None);
        assert_eq!(upgrade(Version::HTTP_2, &Method::GET, &headers(&full)), None);
        assert_eq!(upgrade(Version::HTTP_11, &Method::GET, &headers(&full[1..])), None);
        assert_eq!(upgrade(Version::HTTP_11, &Method::GET, &headers(&full[..1])), None);
    }

    #[test]
    fn request_ids_cannot_forge_log_lines() {
        let check = |id: &str, kept: bool| {
            assert_eq!(given_request_id(&headers(&[("x-request-id", id)])).is_some(), kept, "{id:?}")
        };
        check("0190-abc_DEF.9", true);
        check("", false);
        check("a b", false);
        check("a=b", false);
        check(&"a".repeat(128), true);
        check(&"a".repeat(129), false);
    }

    #[test]
    fn kinds_of_clients_are_told_apart() {
        for (kind, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(&headers(&[("content-type", kind)])), grpc, "{kind}");
        }
        assert!(wants_html(&headers(&[("accept", "application/json;q=0.9, text/html;q=0.8")])));
        assert!(!wants_html(&headers(&[("accept", "*/*")])));
        assert!(!wants_html(&headers(&[])));
    }
}
