//! What snapshots of earlier kernels, images and QEMUs leave behind, which nobody can start from any more.

use std::{collections::BTreeSet, fs, io, path::Path};

use crate::files;

/// Removes every snapshot whose key is not in `current` and every seed of another base image than `base`, half-made ones too, and returns how many folders
/// and memory files that were.
///
/// Only for the start of a node agent: later, a half-made one may be somebody's work.
pub(crate) fn sweep(folders: &Path, in_memory: &Path, current: &BTreeSet<String>, base: &str) -> io::Result<usize> {
    let of_base = format!("-{base}");
    let mut removed = 0;
    for name in names(folders)? {
        let folder = folders.join(&name);
        if !current.contains(&name) {
            fs::remove_dir_all(folder)?;
            removed += 1;
            continue;
        }
        for inner in names(&folder)? {
            // `seed-<id>-<base>`; half-made ones end in `.new`.
            if inner.starts_with("seed-") && !inner.ends_with(&of_base) {
                fs::remove_dir_all(folder.join(inner))?;
                removed += 1;
            }
        }
    }
    for name in names(in_memory)? {
        // `golden-<key>-<id>.mem`, `seed-<key>-…`, `making-<size>.mem`, `trial-<size>.mem`; a sprite's is `<id>.mem`.
        let Some((kind, rest)) = name.split_once('-') else { continue };
        let stale = match kind {
            "golden" | "seed" => {
                let of_current = rest.split_once('-').is_some_and(|(key, _)| current.contains(key));
                !of_current || kind == "seed" && !name.trim_end_matches(".mem").ends_with(&of_base)
            }
            "making" | "trial" => true,
            _ => false,
        };
        if stale {
            files::remove_if_there(&in_memory.join(name))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Of a folder that need not exist.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_of_another_key_go_and_sprites_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (folders, in_memory) = (dir.path().join("golden"), dir.path().join("memory"));
        for folder in ["new", "old", "fetching-new", "making-m"] {
            fs::create_dir_all(folders.join(folder)).unwrap();
        }
        for seed in ["seed-1-base", "seed-1-old", "seed-1-base.new"] {
            fs::create_dir(folders.join("new").join(seed)).unwrap();
        }
        fs::create_dir(&in_memory).unwrap();
        let sprite = "01a217e2-0a67-7681-a387-b7a3c245d6d3.mem";
        let kept = ["golden-new-1.mem", "seed-new-seed-1-base.mem", sprite];
        let gone =
            ["golden-old-1.mem", "seed-old-seed-1-base.mem", "seed-new-seed-1-old.mem", "making-m.mem", "trial-s.mem"];
        for name in kept.iter().chain(&gone) {
            fs::write(in_memory.join(name), "").unwrap();
        }

        let removed = sweep(&folders, &in_memory, &BTreeSet::from(["new".to_owned()]), "base").unwrap();

        let mut left = names(&in_memory).unwrap();
        left.sort();
        let mut expected: Vec<_> = kept.map(str::to_owned).into();
        expected.sort();
        assert_eq!((removed, left, names(&folders).unwrap()), (10, expected, vec!["new".to_owned()]));
        assert_eq!(names(&folders.join("new")).unwrap(), ["seed-1-base"]);
    }

    #[test]
    fn a_host_that_has_no_snapshot_yet_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(sweep(&dir.path().join("golden"), &dir.path().join("memory"), &BTreeSet::new(), "base").unwrap(), 0);
    }
}
