//! `sprite api`

use std::{
    fs,
    io::{self, Read as _},
};

use super::Done;
use crate::{
    api::{Call, LONG_LIMIT, next_piece},
    context::Context,
    failure::Failure,
    output,
    target::Target,
};
use bytes::Bytes;
use clap::{Args, Parser};
use http::{HeaderName, HeaderValue, Method};

/// The API takes no larger JSON; files have their own calls.
const BODY_BYTES_MAX: u64 = 64 << 20;

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite api /v1/sprites
  sprite api -s demo checkpoints                             the same as /v1/sprites/demo/checkpoints
  sprite api -s demo wake-timers -d '{\"every\":\"1h\"}'        a body makes it a POST
  sprite api -X PUT /v1/sprites/demo -d @settings.json -- -i

The answer goes to stdout as it is. Exit code 1 if its status is 400 or more.")]
pub(crate) struct Arguments {
    /// Path of the call; with -s and without a leading / it is relative to the sprite
    path: String,
    #[command(flatten)]
    options: Options,
    /// The same options, as curl's
    #[arg(last = true, value_name = "CURL OPTIONS", allow_hyphen_values = true)]
    curl: Vec<String>,
}

#[derive(Clone, Debug, Default, Args)]
struct Options {
    /// The method [default: GET, or POST with a body]
    #[arg(short = 'X', long = "request", value_name = "METHOD")]
    method: Option<String>,
    /// The body; @FILE reads it, @- is stdin
    #[arg(short = 'd', long, value_name = "BODY")]
    data: Option<String>,
    /// A header, `Name: value`; may be repeated
    #[arg(short = 'H', long = "header", value_name = "HEADER")]
    headers: Vec<String>,
    /// Print status and headers first
    #[arg(short = 'i', long)]
    include: bool,
}

/// For what comes after `--`.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Curl {
    #[command(flatten)]
    options: Options,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let more = Curl::try_parse_from(&arguments.curl)
        .map_err(|error| Failure::usage(error.to_string().trim().to_owned()))?
        .options;
    let options = Options {
        method: more.method.or(arguments.options.method),
        data: more.data.or(arguments.options.data),
        headers: arguments.options.headers.into_iter().chain(more.headers).collect(),
        include: arguments.options.include || more.include,
    };
    let target = if arguments.path.starts_with('/') {
        Target::verbatim(&arguments.path)
    } else {
        Target::verbatim(&format!("{}/{}", Target::sprite(&context.sprite(None)?).as_str(), arguments.path))
    };
    let call = call(target, &options)?;
    let api = context.api()?;
    let answer = api.send(&call).await?;
    let status = answer.status();
    if options.include {
        output::answer(format!("{:?} {status}", answer.version()))?;
        for (name, value) in answer.headers() {
            output::answer(format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))?;
        }
        output::answer("")?;
    }
    let mut body = answer.into_body();
    let mut last = b'\n';
    while let Some(data) = next_piece(&mut body).await? {
        last = data.last().copied().unwrap_or(last);
        output::raw(&data)?;
    }
    if last != b'\n' && output::is_interactive() {
        output::answer("")?;
    }
    if status.as_u16() >= 400 {
        output::note(format!("✗ {status}"));
        return Ok(1);
    }
    Ok(0)
}

fn call(target: Target, options: &Options) -> Result<Call, Failure> {
    let body = options.data.as_deref().map(read_body).transpose()?;
    let method = match (&options.method, &body) {
        (Some(method), _) => Method::from_bytes(method.to_ascii_uppercase().as_bytes())
            .map_err(|error| Failure::usage(format!("-X {method:?}: {error}")))?,
        (None, Some(_)) => Method::POST,
        (None, None) => Method::GET,
    };
    let mut call = Call::new(method, target).within(LONG_LIMIT);
    if let Some(body) = body {
        call = call.header(http::header::CONTENT_TYPE, "application/json");
        call.body = body;
    }
    for header in &options.headers {
        let bad = || Failure::usage(format!("-H {header:?} is not `Name: value`"));
        let (name, value) = header.split_once(':').ok_or_else(bad)?;
        let name: HeaderName = name.trim().parse().map_err(|_not_a_name| bad())?;
        let value: HeaderValue = value.trim().parse().map_err(|_not_a_value| bad())?;
        call.headers.insert(name, value);
    }
    Ok(call)
}

fn read_body(text: &str) -> Result<Bytes, Failure> {
    let failed = |error: io::Error| Failure::new(format!("-d {text}: {error}"));
    let mut bytes = Vec::new();
    match text.strip_prefix('@') {
        None => return Ok(Bytes::from(text.to_owned())),
        Some("-") => io::stdin().lock().take(BODY_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?,
        Some(path) => fs::File::open(path)
            .and_then(|file| file.take(BODY_BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(failed)?,
    };
    if u64::try_from(bytes.len()).is_ok_and(|len| len > BODY_BYTES_MAX) {
        return Err(Failure::usage(format!("-d {text}: more than {BODY_BYTES_MAX} bytes")));
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_curls() {
        let options = Curl::try_parse_from(["-d", "{}", "-H", "X-A: b: c"]).unwrap().options;
        let made = call(Target::sprites(), &options).unwrap();
        assert_eq!((made.method, made.body.as_ref()), (Method::POST, &b"{}"[..]));
        assert_eq!(
            (made.headers["x-a"].as_bytes(), made.headers["content-type"].as_bytes()),
            (&b"b: c"[..], &b"application/json"[..])
        );
        let options = Curl::try_parse_from(["-X", "put", "-d", "@/no/such/file"]).unwrap().options;
        assert!(call(Target::sprites(), &options).unwrap_err().message.contains("/no/such/file"));
        for bad in [["-H", "novalue"], ["-X", "A B"]] {
            assert_eq!(
                call(Target::sprites(), &Curl::try_parse_from(bad).unwrap().options).unwrap_err().code,
                2,
                "{bad:?}"
            );
        }
    }
}
