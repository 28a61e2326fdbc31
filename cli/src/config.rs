//! What is kept between commands: who the user is at which API (`~/.sprites/sprites.json`), and a folder's sprite (`.sprite`).
//!
//! Keys that other versions have put into the files are kept.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::failure::Failure;

const VERSION: &str = "1";
const FOLDER_FILE: &str = ".sprite";
/// Nobody writes such a file by hand; whatever is larger is something else.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// `sprites.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current_selection: Option<Selection>,
    #[serde(default)]
    urls: BTreeMap<String, Site>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Selection {
    pub(crate) url: String,
    pub(crate) org: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Site {
    url: String,
    #[serde(default)]
    orgs: BTreeMap<String, Org>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Org {
    name: String,
    #[serde(default)]
    use_keyring: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_token: Option<String>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl Default for Config {
    fn default() -> Self {
        Self { version: VERSION.to_owned(), current_selection: None, urls: BTreeMap::new(), other: Map::new() }
    }
}

impl Config {
    pub(crate) fn path() -> Result<PathBuf, Failure> {
        let home = env::var_os("HOME").filter(|home| !home.is_empty());
        let home =
            home.ok_or_else(|| Failure::new("HOME is not set, so there is no place for ~/.sprites/sprites.json"))?;
        Ok(Path::new(&home).join(".sprites/sprites.json"))
    }

    /// Empty if there is no file.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let Some(text) = read(path)? else { return Ok(Self::default()) };
        serde_json::from_slice(&text).map_err(|error| {
            Failure::new(format!("{} is damaged: {error}", path.display()))
                .advise("repair or delete it, then `sprite login`")
        })
    }

    /// Whole or not at all, and for nobody else to read.
    pub(crate) fn save(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Failure::new(format!("the configuration has no JSON form: {error}")))?;
        let failed = |error: io::Error| Failure::new(format!("cannot write {}: {error}", path.display()));
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        }
        replace(path, &text, 0o600).map_err(failed)
    }

    /// Remembers a token and makes it the one in use.
    pub(crate) fn sign_in(&mut self, url: &str, org: &str, token: &str) {
        let site = self.urls.entry(url.to_owned()).or_default();
        url.clone_into(&mut site.url);
        let known = site.orgs.entry(org.to_owned()).or_default();
        org.clone_into(&mut known.name);
        known.use_keyring = false;
        known.api_token = Some(token.to_owned());
        self.current_selection = Some(Selection { url: url.to_owned(), org: org.to_owned() });
    }

    /// Forgets the tokens of `url`, or all. Returns how many.
    pub(crate) fn sign_out(&mut self, url: Option<&str>) -> usize {
        let leaves = |known: &str| url.is_none_or(|url| url == known);
        let tokens = |site: &Site| site.orgs.values().filter(|org| org.api_token.is_some()).count();
        let forgotten = self.urls.iter().filter(|(known, _)| leaves(known)).map(|(_, site)| tokens(site)).sum();
        self.urls.retain(|known, _| !leaves(known));
        if self.current_selection.as_ref().is_some_and(|selection| leaves(&selection.url)) {
            self.current_selection = None;
        }
        forgotten
    }

    /// The token for `org` at `url`; without an organisation the selected one, or the only one.
    pub(crate) fn token(&self, url: &str, org: Option<&str>) -> Option<&str> {
        let orgs = &self.urls.get(url)?.orgs;
        let selected = self
            .current_selection
            .as_ref()
            .filter(|selection| selection.url == url)
            .map(|selection| selection.org.as_str());
        let org = match org.or(selected) {
            Some(org) => orgs.get(org)?,
            None if orgs.len() == 1 => orgs.values().next()?,
            None => return None,
        };
        org.api_token.as_deref()
    }

    /// Every organisation: URL, slug, in use or not.
    pub(crate) fn orgs(&self) -> impl Iterator<Item = (&str, &str, bool)> {
        let is_current =
            |url: &str, org: &str| self.current_selection.as_ref().is_some_and(|now| now.url == url && now.org == org);
        self.urls.iter().flat_map(move |(url, site)| {
            site.orgs.keys().map(move |org| (url.as_str(), org.as_str(), is_current(url, org)))
        })
    }
}

/// The organisation's slug is the first of a token's four parts.
pub(crate) fn org_of_token(token: &str) -> Option<&str> {
    let (org, rest) = token.split_once('/')?;
    (!org.is_empty() && rest.split('/').count() == 3).then_some(org)
}

/// `.sprite`: what `sprite use` chose for a folder and those below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Folder {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) organization: Option<String>,
    pub(crate) sprite: String,
}

impl Folder {
    /// The nearest one, from `start` upwards.
    pub(crate) fn find(start: &Path) -> Result<Option<Self>, Failure> {
        for folder in start.ancestors() {
            let path = folder.join(FOLDER_FILE);
            // Some people have a folder of that name.
            if !path.is_file() {
                continue;
            }
            let Some(text) = read(&path)? else { continue };
            let parsed = serde_json::from_slice(&text);
            return parsed.map(Some).map_err(|error| {
                Failure::new(format!("{} is damaged: {error}", path.display()))
                    .advise("`sprite use --unset` in that folder removes it")
            });
        }
        Ok(None)
    }

    pub(crate) fn save(&self, folder: &Path) -> Result<PathBuf, Failure> {
        let path = folder.join(FOLDER_FILE);
        let mut text =
            serde_json::to_vec(self).map_err(|error| Failure::new(format!("the choice has no JSON form: {error}")))?;
        text.push(b'\n');
        replace(&path, &text, 0o644)
            .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))?;
        Ok(path)
    }

    /// Says whether there was one.
    pub(crate) fn unset(folder: &Path) -> Result<bool, Failure> {
        let path = folder.join(FOLDER_FILE);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Failure::new(format!("cannot remove {}: {error}", path.display()))),
        }
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Failure> {
    let failed = |error: io::Error| Failure::new(format!("cannot read {}: {error}", path.display()));
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > FILE_BYTES_MAX => {
            Err(Failure::new(format!("{} has {} bytes and is not a file of ours", path.display(), metadata.len())))
        }
        Ok(_) => fs::read(path).map(Some).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn replace(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    // Of an earlier process with our pid; its mode may be another one.
    drop(fs::remove_file(&temporary));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    let done = file.write_all(text).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        drop(fs::remove_file(&temporary));
    }
    done
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_token_is_kept_for_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/sprites.json");
        let mut config = Config::load(&path).unwrap();
        assert_eq!(config, Config::default());
        config.sign_in("https://one", "acme", "acme/1/2/3");
        config.sign_in("https://two", "solo", "solo/1/2/3");
        config.save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);

        let mut config = Config::load(&path).unwrap();
        assert_eq!(config.token("https://two", None), Some("solo/1/2/3"));
        assert_eq!(config.token("https://one", None), Some("acme/1/2/3"), "the only one there");
        assert_eq!(config.token("https://one", Some("other")), None);
        config.sign_in("https://one", "other", "other/1/2/3");
        assert_eq!(config.token("https://one", None), Some("other/1/2/3"), "the last one");
        assert_eq!(config.orgs().filter(|(_, _, current)| *current).count(), 1);
        assert_eq!(config.sign_out(Some("https://one")), 2);
        assert_eq!((config.token("https://one", None), config.current_selection.is_none()), (None, true));
        assert_eq!(config.sign_out(None), 1);
    }

    #[test]
    fn what_others_wrote_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sprites.json");
        let theirs = r#"{"version":"1","user":{"id":7},"urls":{"https://x":{"url":"https://x","alias":"x","orgs":{"o":{"name":"o","keyring_key":"k","use_keyring":true,"sprites":{}}}}}}"#;
        fs::write(&path, theirs).unwrap();
        let mut config = Config::load(&path).unwrap();
        config.sign_in("https://y", "p", "t");
        config.save(&path).unwrap();
        let saved: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(saved["user"]["id"], 7);
        assert_eq!(saved["urls"]["https://x"]["alias"], "x");
        assert_eq!(saved["urls"]["https://x"]["orgs"]["o"]["keyring_key"], "k");
    }

    #[test]
    fn a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sprites.json");
        fs::write(&path, "{").unwrap();
        let failure = Config::load(&path).unwrap_err();
        assert!(failure.message.contains("sprites.json") && failure.advice.is_some(), "{failure}");
    }

    #[test]
    fn the_nearest_folder_with_a_choice_counts() {
        let root = tempfile::tempdir().unwrap();
        let below = root.path().join("a/b");
        fs::create_dir_all(&below).unwrap();
        Folder { organization: None, sprite: "outer".into() }.save(root.path()).unwrap();
        assert_eq!(Folder::find(&below).unwrap().unwrap().sprite, "outer");
        Folder { organization: Some("o".into()), sprite: "inner".into() }.save(&below).unwrap();
        assert_eq!(Folder::find(&below).unwrap().unwrap().sprite, "inner");
        assert!(Folder::unset(&below).unwrap() && !Folder::unset(&below).unwrap());
        assert_eq!(Folder::find(&below).unwrap().unwrap().sprite, "outer");
    }

    #[test]
    fn tokens_say_their_organisation() {
        assert_eq!(org_of_token("acme/org-1/tok-1/secret"), Some("acme"));
        for other in ["secret", "a/b", "/b/c/d", "a/b/c/d/e"] {
            assert_eq!(org_of_token(other), None, "{other}");
        }
    }
}
