//! Journals of volumes that another host took: unpushed writes, kept for salvage, but not for ever.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::core::now_unix_ms;

/// Nobody salvages what is older.
const AGE_MAX: Duration = Duration::from_secs(14 * 24 * 3600);
/// Each may be as large as a journal.
const JOURNALS_MAX: usize = 16;

/// Moves a volume's local folder to `lost/<name>-<now>`, beside others. Blocking, as everything here.
pub(super) fn set_aside(folder: &Path, lost: &Path, name: &str) -> io::Result<()> {
    fs::create_dir_all(lost)?;
    fs::rename(folder, lost.join(format!("{name}-{}", now_unix_ms())))?;
    clean(lost)
}

/// Removes what is too old or too much, the oldest first.
pub(super) fn clean(lost: &Path) -> io::Result<()> {
    let mut journals: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(lost)? {
        let path = entry?.path();
        let since = path.file_name().and_then(|name| name.to_str()?.rsplit_once('-')?.1.parse().ok());
        // What somebody else put there is left alone.
        journals.extend(since.map(|since: u64| (since, path)));
    }
    journals.sort_unstable_by(|a, b| b.cmp(a));
    let oldest = now_unix_ms().saturating_sub(u64::try_from(AGE_MAX.as_millis()).unwrap_or(u64::MAX));
    for (index, (since, path)) in journals.into_iter().enumerate() {
        if index >= JOURNALS_MAX || since < oldest {
            tracing::warn!(journal = %path.display(), since_unix_ms = since, "nobody salvaged this journal; it is removed");
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_old_or_too_much_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (lost, folder) = (dir.path().join("lost"), dir.path().join("volume"));
        let days_ago = |days: u64| now_unix_ms() - days * 24 * 3600 * 1000;
        let old = [(13, "young"), (15, "old"), (400, "older")];
        for (days, name) in old {
            fs::create_dir_all(lost.join(format!("{name}-1-{}", days_ago(days))).join("journal")).unwrap();
        }
        fs::create_dir_all(lost.join("notes")).unwrap();
        let names = || -> Vec<String> {
            let mut names: Vec<_> =
                fs::read_dir(&lost).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        clean(&lost).unwrap();
        let left = names();
        assert!(left.len() == 2 && left[0] == "notes" && left[1].starts_with("young"), "{left:?}");
        for number in 0..JOURNALS_MAX {
            fs::create_dir_all(folder.join("journal")).unwrap();
            set_aside(&folder, &lost, &format!("new{number}")).unwrap();
            assert!(!folder.exists());
        }
        let left = names();
        assert_eq!(left.len(), JOURNALS_MAX + 1, "{left:?}");
        assert!(!left.iter().any(|name| name.starts_with("young")), "the oldest went: {left:?}");
    }
}
