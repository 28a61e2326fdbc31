//! Who answers a request for the API's host: the sprite's own node, or any coordinator. Pure: path in, [`ApiPath`] out.
//!
//! Only the calls that move a sprite's bytes go to its node (ruling 25). What is not listed here goes to the coordinator, which answers
//! unknown paths with 404.

use percent_encoding::percent_decode_str;

/// gRPC packages of our own processes. They trust their caller, so nobody outside may reach them.
const INTERNAL_PACKAGES: [&str; 3] = ["sprites.control.v1.", "sprites.node.v1.", "sprites.agent.v1."];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ApiPath {
    /// To the node of this sprite. The name is decoded but not yet checked.
    Data { name: String, call: DataCall },
    /// To a coordinator.
    Control,
    /// Answered with 404.
    Internal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataCall {
    /// `exec`, whose answer over plain HTTP is framed by chunks.
    Exec,
    /// All others.
    Other,
}

pub(crate) fn split(path: &str) -> ApiPath {
    if is_internal(path) {
        return ApiPath::Internal;
    }
    let Some((name, rest)) = path.strip_prefix("/v1/sprites/").and_then(|rest| rest.split_once('/')) else {
        return ApiPath::Control;
    };
    let call = match rest {
        "exec" => DataCall::Exec,
        "proxy" | "control" | "ports/watch" | "fs" => DataCall::Other,
        _ if rest.starts_with("exec/") || rest.starts_with("fs/") => DataCall::Other,
        _ => return ApiPath::Control,
    };
    match percent_decode_str(name).decode_utf8() {
        Ok(name) => ApiPath::Data { name: name.into_owned(), call },
        Err(_not_utf8) => ApiPath::Control,
    }
}

/// Sees through percent-encoding, case and doubled slashes, so that no spelling which a server might accept slips through.
fn is_internal(path: &str) -> bool {
    let decoded = percent_decode_str(path).decode_utf8_lossy();
    decoded
        .split(['/', '\\'])
        .any(|segment| INTERNAL_PACKAGES.iter().any(|package| segment.to_ascii_lowercase().starts_with(package)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_to_the_node_and_the_rest_to_a_coordinator() {
        let data = |name: &str, call| ApiPath::Data { name: name.to_owned(), call };
        let check = |path: &str, expected: ApiPath| assert_eq!(split(path), expected, "{path}");
        check("/v1/sprites/demo/exec", data("demo", DataCall::Exec));
        check("/v1/sprites/demo/exec/7", data("demo", DataCall::Other));
        check("/v1/sprites/demo/exec/7/kill", data("demo", DataCall::Other));
        check("/v1/sprites/demo/proxy", data("demo", DataCall::Other));
        check("/v1/sprites/demo/control", data("demo", DataCall::Other));
        check("/v1/sprites/demo/ports/watch", data("demo", DataCall::Other));
        check("/v1/sprites/demo/fs/read", data("demo", DataCall::Other));
        check("/v1/sprites/d%65mo/exec", data("demo", DataCall::Exec));
        check("/v1/sprites/a%2Fb/exec", data("a/b", DataCall::Exec));
        for path in [
            "/",
            "/v1/sprites",
            "/v1/sprites/",
            "/v1/sprites/demo",
            "/v1/sprites/exec",
            "/v1/sprites/demo/execute",
            "/v1/sprites/demo/ports",
            "/v1/sprites/demo/checkpoints/v1/restore",
            "/v1/sprites/demo/services/web/start",
            "/v1/sprites/%ff/exec",
            "//v1/sprites/demo/exec",
            "/v2/sprites/demo/exec",
            "/sprites.v1.Sprites/Exec",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            check(path, ApiPath::Control);
        }
        for path in [
            "/sprites.control.v1.Control/Authenticate",
            "/sprites.node.v1.Node/Destroy",
            "/sprites.agent.v1.Agent/Exec",
            "//sprites.node.v1.Node/Destroy",
            "/sprites%2Enode.v1.Node/Destroy",
            "/%2fsprites.node.v1.Node/Destroy",
            "/Sprites.Node.v1.Node/Destroy",
            "/x/../sprites.node.v1.Node/Destroy",
        ] {
            check(path, ApiPath::Internal);
        }
    }
}
