//! Imports a base image that is as good as full, for benchmarks: `filled_base BUCKET-URL IMAGE DIGEST BYTES < FREE`.
//!
//! FREE has lines of two numbers, begin and end in bytes: parts of the image that its file system does not use. They are filled up to BYTES in all, with
//! content that costs the bucket some 20 MiB. A cluster that is started on this bucket, with an image of this digest, creates its sprites from it.

use std::path::Path;

use blockstore::{
    bucket::Bucket,
    store::{Limits, Store, StoreConfig},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [url, image, digest, bytes] = args.as_slice() else {
        return Err("usage: filled_base BUCKET-URL IMAGE DIGEST BYTES < FREE".into());
    };
    let mut left: u64 = bytes.parse()?;
    let mut filled = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let (from, to) = line.split_once(' ').ok_or("a line of FREE is not two numbers")?;
        let (from, to): (u64, u64) = (from.parse()?, to.parse()?);
        let to = to.min(from.saturating_add(left));
        left -= to.saturating_sub(from);
        filled.push(from..to);
    }
    if left > 0 {
        return Err(format!("the image has not that much free space: {left} bytes are missing").into());
    }
    let folder = tempfile::tempdir()?;
    let bucket = Bucket::open(url).await?;
    let limits = Limits::default();
    let store =
        Store::open(StoreConfig { bucket, dir: folder.path().to_owned(), node: "bench".to_owned(), limits }).await?;
    let begun = std::time::Instant::now();
    let base = store.ensure_filled_base(Path::new(image), digest, &filled, |_, _| {}).await?;
    println!("{} in {:?}", base.digest, begun.elapsed());
    Ok(())
}
