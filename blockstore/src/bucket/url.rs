//! From the text of a bucket's URL to its stores. The one place that knows which kinds of bucket there are.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use object_store::{
    ClientOptions, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
};

use super::{
    Bucket, ProbeError, check_key,
    fs_cas::{FsCas, FsOpenError},
};

/// Timeout of one request for a record: a third of a lease's TTL of 10 s, so that a lost request leaves time for two more.
const RECORD_TIMEOUT: Duration = Duration::from_millis(3_300);
/// Timeout of one request for data: 64 MiB at 2 MB/s.
const DATA_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Region where the URL names none: what stores that have no regions expect.
const REGION_DEFAULT: &str = "us-east-1";

/// The text is not the URL of a bucket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadBucketUrl {
    #[error("{0:?} is neither dir:/absolute/path nor s3://bucket/prefix?endpoint=…&region=…")]
    Scheme(String),
    #[error("the directory of a bucket must be an absolute path, not {0:?}")]
    RelativePath(String),
    #[error("s3 URL without a bucket name")]
    NoBucket,
    #[error("bucket name or prefix {0:?}: {1}")]
    Prefix(String, &'static str),
    #[error("s3 URL: unknown option {0:?}; known are endpoint, region and allow_http")]
    Option(String),
    #[error(
        "s3 endpoint {0:?} uses http: add &allow_http if traffic and credentials may cross that network unencrypted"
    )]
    PlainHttp(String),
    #[error("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the s3 bucket")]
    NoCredentials,
}

/// The bucket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Url(#[from] BadBucketUrl),
    #[error(transparent)]
    Directory(#[from] FsOpenError),
    #[error("cannot set up an s3 client for {url}")]
    Client {
        url: String,
        #[source]
        source: Box<object_store::Error>,
    },
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// What the text of a URL says, checked.
#[derive(Debug, PartialEq, Eq)]
enum Location {
    Dir(String),
    S3 { bucket: String, prefix: String, endpoint: Option<String>, region: String, allow_http: bool },
}

impl Location {
    fn parse(url: &str) -> Result<Self, BadBucketUrl> {
        if let Some(path) = url.strip_prefix("dir:") {
            return if path.starts_with('/') {
                Ok(Self::Dir(path.to_owned()))
            } else {
                Err(BadBucketUrl::RelativePath(path.to_owned()))
            };
        }
        match url.strip_prefix("s3://") {
            Some(rest) => Self::parse_s3(rest),
            None => Err(BadBucketUrl::Scheme(url.to_owned())),
        }
    }

    fn parse_s3(rest: &str) -> Result<Self, BadBucketUrl> {
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() {
            return Err(BadBucketUrl::NoBucket);
        }
        check_key(bucket).map_err(|reason| BadBucketUrl::Prefix(bucket.to_owned(), reason))?;
        let prefix = prefix.trim_end_matches('/');
        if !prefix.is_empty() {
            check_key(prefix).map_err(|reason| BadBucketUrl::Prefix(prefix.to_owned(), reason))?;
        }
        let (mut endpoint, mut region, mut allow_http) = (None, REGION_DEFAULT.to_owned(), false);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, "true"));
            match name {
                "endpoint" => endpoint = Some(value.trim_end_matches('/').to_owned()),
                "region" => value.clone_into(&mut region),
                "allow_http" => allow_http = value == "true" || value == "1",
                _ => return Err(BadBucketUrl::Option(name.to_owned())),
            }
        }
        match &endpoint {
            Some(endpoint) if endpoint.starts_with("http://") && !allow_http && !is_loopback(endpoint) => {
                return Err(BadBucketUrl::PlainHttp(endpoint.clone()));
            }
            _ => {}
        }
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Self::S3 { bucket: bucket.to_owned(), prefix, endpoint, region, allow_http })
    }
}

/// Whether traffic to the endpoint stays on this host, so that plain http shows nothing to anybody.
fn is_loopback(endpoint: &str) -> bool {
    match host_and_port(endpoint) {
        Some(("localhost", _)) => true,
        Some((host, _)) => host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()),
        None => false,
    }
}

/// Host and port of `http://host:port/…`; `None` if it is something else, or names a user.
fn host_and_port(endpoint: &str) -> Option<(&str, u16)> {
    let (rest, default) = match endpoint.strip_prefix("http://") {
        Some(rest) => (rest, 80),
        None => (endpoint.strip_prefix("https://")?, 443),
    };
    let authority = rest.split('/').next()?;
    if authority.contains('@') {
        return None;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => v6.split_once(']')?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().ok()?,
        None => default,
    };
    Some((host, port))
}

/// Where the S3 server of a bucket's URL is: host name or address, and port. `None` for a directory, and for a URL without `endpoint`, whose server is a
/// public one.
///
/// # Errors
///
/// As [`Bucket::open`] refuses the URL.
pub fn endpoint_of(url: &str) -> Result<Option<(String, u16)>, BadBucketUrl> {
    let Location::S3 { endpoint: Some(endpoint), .. } = Location::parse(url)? else { return Ok(None) };
    Ok(host_and_port(&endpoint).map(|(host, port)| (host.to_owned(), port)))
}

/// Opens the stores behind `url` without talking to S3 yet. `None`: credentials of S3 come from the environment.
pub(super) async fn connect(url: &str, credentials: Option<Credentials>) -> Result<Bucket, OpenError> {
    match Location::parse(url)? {
        Location::Dir(path) => {
            let opened = tokio::task::spawn_blocking(move || FsCas::open(Path::new(&path))).await;
            let store = opened.expect("opening a directory does not panic")?;
            Ok(Bucket::from_store(Arc::new(store)))
        }
        Location::S3 { bucket, prefix, endpoint, region, .. } => {
            let at = endpoint.as_deref().map_or(String::new(), |endpoint| format!(" at {endpoint}"));
            let description = format!("s3://{bucket}/{prefix}{at} (region {region})");
            let credentials = match credentials {
                Some(credentials) => credentials,
                None => Credentials::from_env()?,
            };
            let client = |timeout, retry| {
                let built = s3_client(&bucket, endpoint.as_deref(), &region, &credentials, (timeout, retry));
                built.map_err(|source| OpenError::Client { url: description.clone(), source: Box::new(source) })
            };
            // One attempt: a second one inside the client would turn "won, answer lost" into "somebody else won".
            let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
            let records = client(RECORD_TIMEOUT, once)?;
            let data = client(DATA_TIMEOUT, RetryConfig::default())?;
            Ok(Bucket::from_parts(Arc::new(records), Arc::new(data), prefix, description))
        }
    }
}

/// Keys of an S3 store.
#[derive(Clone)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

impl Credentials {
    /// From `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`.
    pub fn from_env() -> Result<Self, BadBucketUrl> {
        let var = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        match (var("AWS_ACCESS_KEY_ID"), var("AWS_SECRET_ACCESS_KEY")) {
            (Some(access_key_id), Some(secret_access_key)) => {
                Ok(Self { access_key_id, secret_access_key, session_token: var("AWS_SESSION_TOKEN") })
            }
            _ => Err(BadBucketUrl::NoCredentials),
        }
    }
}

fn s3_client(
    bucket: &str,
    endpoint: Option<&str>,
    region: &str,
    credentials: &Credentials,
    (timeout, retry): (Duration, RetryConfig),
) -> object_store::Result<AmazonS3> {
    // `Location` has refused an http endpoint that the operator did not allow.
    let options = ClientOptions::new()
        .with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
        .with_timeout(timeout)
        .with_connect_timeout(CONNECT_TIMEOUT);
    let mut builder = AmazonS3Builder::new()
        .with_client_options(options)
        .with_retry(retry)
        .with_bucket_name(bucket)
        .with_region(region)
        .with_access_key_id(&credentials.access_key_id)
        .with_secret_access_key(&credentials.secret_access_key);
    if let Some(token) = &credentials.session_token {
        builder = builder.with_token(token);
    }
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    builder.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_parsed_or_refused_with_advice() {
        assert_eq!(Location::parse("dir:/var/lib/x"), Ok(Location::Dir("/var/lib/x".into())));
        let full = Location::parse("s3://b/p/q/?endpoint=http://10.0.0.1:9000/&region=eu&allow_http").unwrap();
        let (prefix, endpoint) = ("p/q/".to_owned(), Some("http://10.0.0.1:9000".to_owned()));
        let expected = Location::S3 { bucket: "b".into(), prefix, endpoint, region: "eu".into(), allow_http: true };
        assert_eq!(full, expected);
        for bad in
            ["", "dir:x", "s3://", "http://x", "s3://b/../c", "s3://b?color=red", "s3://b?endpoint=http://10.0.0.1"]
        {
            assert!(Location::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(Location::parse("s3://b?endpoint=http://127.0.0.1:9").is_ok());
        assert!(Location::parse("s3://b?endpoint=http://127.0.0.1@evil.example").is_err());
        assert!(Location::parse("s3://b?endpoint=http://[::1]:9").is_ok());
    }

    #[test]
    fn the_server_of_a_bucket_is_known_so_that_guests_can_be_kept_from_it() {
        let endpoint = |url: &str| endpoint_of(url).unwrap();
        let server = |host: &str, port| Some((host.to_owned(), port));
        assert_eq!(endpoint("s3://b?endpoint=https://store.example/x"), server("store.example", 443));
        assert_eq!(endpoint("s3://b?endpoint=http://10.1.2.3:9000&allow_http"), server("10.1.2.3", 9000));
        assert_eq!(endpoint("s3://b?endpoint=http://[fd00::1]:9000&allow_http"), server("fd00::1", 9000));
        assert_eq!(endpoint("s3://b?region=eu"), None);
        assert_eq!(endpoint("dir:/var/lib/b"), None);
        assert!(endpoint_of("ftp://b").is_err());
    }
}
