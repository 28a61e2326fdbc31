//! Serves a disk in memory on a socket, to measure the server itself: `nbd_memory SOCKET [BYTES]`.

use std::path::Path;

use blockstore::nbd::{Export, ExportTable, MemoryDisk, NbdServer};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or("usage: nbd_memory SOCKET [BYTES]")?;
    let size_bytes = args.next().map_or(Ok(1 << 30), |bytes| bytes.parse())?;
    let exports = ExportTable::new();
    exports.insert("disk", Export::Memory(MemoryDisk::new(size_bytes)));
    let _server = NbdServer::bind(Path::new(&socket), exports)?;
    println!("nbd+unix:///disk?socket={socket}");
    tokio::signal::ctrl_c().await?;
    Ok(())
}
