//! Compiles the `.proto` files with the pure-Rust `protox`, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["agent.proto", "sprites.proto", "node.proto", "control.proto"];
    for file in files {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".sprites.agent.v1.ExecInput")
        .bytes(".sprites.agent.v1.ExecOutput")
        .bytes(".sprites.agent.v1.TunnelInput")
        .bytes(".sprites.agent.v1.TunnelOutput")
        .compile_fds(descriptors)?;
    Ok(())
}
