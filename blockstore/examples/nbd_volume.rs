//! Serves a durable volume on a socket, for benchmarks and for trying it out: `nbd_volume SOCKET FOLDER BUCKET-URL [BYTES [BASE-IMAGE]]`.
//!
//! The first run creates the volume and notes its id in the folder; later runs go on with it, also after `kill -9`. Ctrl-C pushes and releases it.

use std::path::Path;

use blockstore::{
    bucket::Bucket,
    nbd::{Export, ExportTable, NbdServer},
    store::{Limits, Store, StoreConfig},
};
use proto::id::SpriteId;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, folder, url, rest @ ..] = args.as_slice() else {
        return Err("usage: nbd_volume SOCKET FOLDER BUCKET-URL [BYTES [BASE-IMAGE]]".into());
    };
    let size_bytes = rest.first().map_or(Ok(100 << 30), |bytes| bytes.parse())?;
    let folder = Path::new(folder);
    std::fs::create_dir_all(folder)?;
    let bucket = Bucket::open(url).await?;
    let config = StoreConfig { bucket, dir: folder.join("store"), node: "bench".to_owned(), limits: Limits::default() };
    let store = Store::open(config).await?;
    let note = folder.join("id");
    let begun = std::time::Instant::now();
    let volume = match std::fs::read_to_string(&note) {
        Ok(id) => store.acquire(id.trim().parse()?).await?,
        Err(_) => {
            let image = match rest.get(1) {
                Some(image) => image.into(),
                None => {
                    let zeros = folder.join("zeros");
                    std::fs::write(&zeros, [0; 4096])?;
                    zeros
                }
            };
            let base = store.ensure_base(&image, &image.display().to_string(), |_, _| {}).await?;
            println!("base image in {:?}", begun.elapsed());
            let id = SpriteId::generate();
            let volume = store.create(id, &base, size_bytes).await?;
            std::fs::write(&note, id.to_string())?;
            volume
        }
    };
    println!("open after {:?}: {:?}", begun.elapsed(), volume.status());
    let exports = ExportTable::new();
    exports.insert("disk", Export::Volume(volume.clone()));
    let server = NbdServer::bind(Path::new(socket), exports)?;
    println!("nbd+unix:///disk?socket={socket}");
    tokio::signal::ctrl_c().await?;
    drop(server);
    println!("{:?}", volume.status());
    let begun = std::time::Instant::now();
    volume.release().await?;
    println!("pushed and released in {:?}", begun.elapsed());
    Ok(())
}
