//! Which of our hosts a request is for. Pure: text in, [`HostKind`] out.
//!
//! ```text
//!  api.localhost                          Api
//!  demo-a1b2c3.sprites.localhost          Sprite { label: "demo-a1b2c3", port: None }
//!  3000--demo-a1b2c3.sprites.localhost    Sprite { label: "demo-a1b2c3", port: Some(3000) }
//!  anything else                          Foreign
//! ```
//!
//! A sprite's name has no `--` (ruling 24), so the first one can only end a port.

use std::num::NonZeroU16;

use http::{HeaderMap, Uri, header};
use proto::id::SpriteName;

/// Characters of an organisation's short id, the last part of a label.
const OID_LEN: usize = 6;

/// The host names one edge answers for.
#[derive(Clone, Debug)]
pub(crate) struct Hosts {
    api: Vec<String>,
    sprite_domain: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    Api,
    Sprite(SpriteHost),
    /// Below the sprite domain (or the domain itself), but no sprite can have that name.
    NoSprite,
    Foreign,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpriteHost {
    /// `<name>-<oid>`, as the registry knows it.
    pub(crate) label: String,
    /// `None`: the sprite's own HTTP port.
    pub(crate) port: Option<NonZeroU16>,
}

/// The request does not say clearly which host it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadHost {
    #[error("the request names no host")]
    Missing,
    #[error("the request has more than one Host header")]
    Twice,
    #[error("the Host header is not a host name")]
    Malformed,
    #[error("the host in the request line differs from the Host header")]
    Mismatch,
}

impl Hosts {
    pub(crate) fn new(api: &[String], sprite_domain: &str) -> Self {
        Self {
            api: api.iter().map(|host| host.to_ascii_lowercase()).collect(),
            sprite_domain: sprite_domain.to_ascii_lowercase(),
        }
    }

    /// `name` is a bare, lower-case host name, as [`requested_host`] returns it.
    pub(crate) fn classify(&self, name: &str) -> HostKind {
        if self.api.iter().any(|host| host == name) {
            return HostKind::Api;
        }
        if name == self.sprite_domain {
            return HostKind::NoSprite;
        }
        match name.strip_suffix(&self.sprite_domain).and_then(|rest| rest.strip_suffix('.')) {
            Some(label) => parse_label(label).map_or(HostKind::NoSprite, HostKind::Sprite),
            None => HostKind::Foreign,
        }
    }

    /// Whether a connection opened for `sni` may carry requests for `kind`. Browsers reuse one for all names of its certificate; the API and
    /// the sprites' pages are kept on connections of their own (ruling 25).
    pub(crate) fn may_share(&self, sni: &str, kind: &HostKind) -> bool {
        match (self.classify(&sni.to_ascii_lowercase()), kind) {
            (HostKind::Foreign, _) | (_, HostKind::Foreign) => true,
            (HostKind::Api, kind) => *kind == HostKind::Api,
            (HostKind::Sprite(_) | HostKind::NoSprite, kind) => *kind != HostKind::Api,
        }
    }
}

fn parse_label(label: &str) -> Option<SpriteHost> {
    let (port, label) = match label.split_once("--") {
        Some((port, label)) => (Some(parse_port(port)?), label),
        None => (None, label),
    };
    let (name, oid) = label.rsplit_once('-')?;
    let oid_is_right = oid.len() == OID_LEN && oid.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (oid_is_right && name.parse::<SpriteName>().is_ok()).then(|| SpriteHost { label: label.to_owned(), port })
}

/// Digits only, no leading zero: each port has one host name.
fn parse_port(text: &str) -> Option<NonZeroU16> {
    let canonical = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if canonical { text.parse().ok() } else { None }
}

/// The host a request is for, lower case, without port and final dot. An HTTP/2 authority or an absolute request line must agree with `Host`.
pub(crate) fn requested_host(uri: &Uri, headers: &HeaderMap) -> Result<String, BadHost> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let from_header = hosts.next();
    if hosts.next().is_some() {
        return Err(BadHost::Twice);
    }
    let from_header = match from_header {
        Some(value) => Some(bare(value.to_str().map_err(|_not_ascii| BadHost::Malformed)?)?),
        None => None,
    };
    let from_line = match uri.authority() {
        Some(authority) if authority.as_str().contains('@') => return Err(BadHost::Malformed),
        Some(authority) => Some(bare(authority.as_str())?),
        None => None,
    };
    match (from_line, from_header) {
        (Some(line), Some(header)) if line != header => Err(BadHost::Mismatch),
        (Some(host), _) | (None, Some(host)) => Ok(host),
        (None, None) => Err(BadHost::Missing),
    }
}

fn bare(authority: &str) -> Result<String, BadHost> {
    let (host, port) = match authority.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((v6, "" | ":"))) => (v6, None),
        Some(Some((v6, rest))) => (v6, Some(rest.strip_prefix(':').ok_or(BadHost::Malformed)?)),
        Some(None) => return Err(BadHost::Malformed),
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    if port.is_some_and(|port| !port.bytes().all(|b| b.is_ascii_digit())) {
        return Err(BadHost::Malformed);
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':');
    if host.is_empty() || !host.bytes().all(allowed) {
        return Err(BadHost::Malformed);
    }
    Ok(host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> Hosts {
        Hosts::new(&["api.localhost".to_owned(), "127.0.0.1".to_owned()], "Sprites.localhost")
    }

    fn sprite(label: &str, port: Option<u16>) -> HostKind {
        HostKind::Sprite(SpriteHost { label: label.to_owned(), port: port.and_then(NonZeroU16::new) })
    }

    #[test]
    fn each_host_has_one_meaning() {
        let check = |name: &str, expected: HostKind| assert_eq!(hosts().classify(name), expected, "{name:?}");
        check("api.localhost", HostKind::Api);
        check("127.0.0.1", HostKind::Api);
        check("demo-a1b2c3.sprites.localhost", sprite("demo-a1b2c3", None));
        check("a-b-c-a1b2c3.sprites.localhost", sprite("a-b-c-a1b2c3", None));
        check("3000--demo-a1b2c3.sprites.localhost", sprite("demo-a1b2c3", Some(3000)));
        check("65535--demo-a1b2c3.sprites.localhost", sprite("demo-a1b2c3", Some(65535)));
        for name in [
            "sprites.localhost",
            "demo.sprites.localhost",
            "demo-a1b2.sprites.localhost",
            "-a1b2c3.sprites.localhost",
            "demo-a1b2c_.sprites.localhost",
            "0--demo-a1b2c3.sprites.localhost",
            "080--demo-a1b2c3.sprites.localhost",
            "65536--demo-a1b2c3.sprites.localhost",
            "+80--demo-a1b2c3.sprites.localhost",
            "x--demo-a1b2c3.sprites.localhost",
            "80--90--demo-a1b2c3.sprites.localhost",
            "a.demo-a1b2c3.sprites.localhost",
            ".sprites.localhost",
        ] {
            check(name, HostKind::NoSprite);
        }
        check("localhost", HostKind::Foreign);
        check("xsprites.localhost", HostKind::Foreign);
        check("demo-a1b2c3.sprites.localhost.evil.org", HostKind::Foreign);
        check("xapi.localhost", HostKind::Foreign);
    }

    fn check_request(uri: &str, host_headers: &[&str], expected: Result<&str, BadHost>) {
        let mut headers = HeaderMap::new();
        for host in host_headers {
            headers.append(header::HOST, host.parse().unwrap());
        }
        let host = requested_host(&uri.parse().unwrap(), &headers);
        assert_eq!(host.as_deref(), expected.as_ref().copied(), "{uri} {host_headers:?}");
    }

    #[test]
    fn the_host_is_read_from_one_clear_place() {
        check_request("/x", &["Api.LocalHost:8443"], Ok("api.localhost"));
        check_request("/x", &["api.localhost."], Ok("api.localhost"));
        check_request("/x", &["[::1]:8443"], Ok("::1"));
        check_request("/x", &["[::1]"], Ok("::1"));
        check_request("https://api.localhost:8443/x", &[], Ok("api.localhost"));
        check_request("https://api.localhost:8443/x", &["api.localhost"], Ok("api.localhost"));
        check_request("/x", &[], Err(BadHost::Missing));
        check_request("/x", &["a", "a"], Err(BadHost::Twice));
        check_request("http://evil.org/x", &["api.localhost"], Err(BadHost::Mismatch));
        check_request("http://user@api.localhost/x", &["api.localhost"], Err(BadHost::Malformed));
        for bad in ["", "a b", "a/b", "api.localhost:80:90", "api.localhost:x", "[::1", "[::1]x", "é", "a\u{7f}"] {
            if let Ok(value) = http::HeaderValue::from_bytes(bad.as_bytes()) {
                let mut headers = HeaderMap::new();
                headers.append(header::HOST, value);
                assert_eq!(requested_host(&Uri::from_static("/"), &headers), Err(BadHost::Malformed), "{bad:?}");
            }
        }
    }

    #[test]
    fn the_api_shares_no_connection_with_sprites() {
        let hosts = hosts();
        let (page, other) = ("a-a1b2c3.sprites.localhost", sprite("b-a1b2c3", None));
        assert!(hosts.may_share(page, &other));
        assert!(hosts.may_share("API.localhost", &HostKind::Api));
        assert!(!hosts.may_share(page, &HostKind::Api));
        assert!(!hosts.may_share("api.localhost", &other));
        assert!(hosts.may_share("localhost", &HostKind::Api));
    }
}
