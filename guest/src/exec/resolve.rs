//! From what a client asks for to what the kernel is given: user, environment, program. Reads only `/etc/passwd` and `/etc/group`, through its caller.

use std::collections::BTreeMap;

use proto::agent::ExecStart;

use crate::{environment::SPRITE_DIR, spawn::Credentials};

/// Who commands run as when nobody is named.
pub(super) const USER_DEFAULT: &str = "sprite";
const SHELL_DEFAULT: &str = "/bin/bash";
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const TERM_DEFAULT: &str = "xterm-256color";
const LANG_DEFAULT: &str = "C.UTF-8";

/// An entry of `/etc/passwd`, with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub name: String,
    pub home: String,
    pub shell: String,
    pub credentials: Credentials,
}

impl User {
    /// The image's own user, for a sprite whose `/etc` is in ruins.
    fn sprite() -> Self {
        Self {
            name: USER_DEFAULT.into(),
            home: "/home/sprite".into(),
            shell: SHELL_DEFAULT.into(),
            credentials: Credentials { uid: 1000, gid: 1000, groups: vec![1000] },
        }
    }

    /// Finds a user by name. `None`: there is none.
    pub(super) fn find(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let name = if name.is_empty() { USER_DEFAULT } else { name };
        let found = passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [known, _, uid, gid, _, home, shell] = fields.as_slice() else { return None };
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
            (*known == name).then(|| Self {
                name: name.to_owned(),
                home: or(home, "/"),
                shell: or(shell, "/bin/sh"),
                credentials: Credentials { uid, gid, groups: groups(name, gid, group) },
            })
        });
        match (found, name) {
            (None, USER_DEFAULT) => Some(Self::sprite()),
            (None, "root") => Some(Self {
                name: "root".into(),
                home: "/root".into(),
                credentials: Credentials::root(),
                ..Self::sprite()
            }),
            (found, _) => found,
        }
    }
}

fn groups(name: &str, own: u32, group: &str) -> Vec<u32> {
    let mut groups = vec![own];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, gid, members] = fields.as_slice()
            && members.split(',').any(|member| member.trim() == name)
            && let Ok(gid) = gid.parse()
            && !groups.contains(&gid)
        {
            groups.push(gid);
        }
    }
    groups
}

/// A command in the kernel's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command {
    /// Files to try, in order.
    pub candidates: Vec<String>,
    pub argv: Vec<String>,
    pub env: Vec<String>,
    pub dir: String,
}

/// Lays a command out. `sprite_env` is what the sprite gives every command.
pub(super) fn command(start: &ExecStart, user: &User, sprite_env: &BTreeMap<String, String>) -> Command {
    let mut env: BTreeMap<String, String> = [
        ("PATH", format!("{SPRITE_DIR}/bin:{PATH_DEFAULT}")),
        ("HOME", user.home.clone()),
        ("USER", user.name.clone()),
        ("LOGNAME", user.name.clone()),
        ("SHELL", user.shell.clone()),
        ("TERM", TERM_DEFAULT.into()),
        ("LANG", LANG_DEFAULT.into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    env.extend(sprite_env.clone());
    env.extend(start.env.clone());
    let (program, argv) = match (start.path.as_str(), start.argv.as_slice()) {
        ("", []) => {
            let name = user.shell.rsplit('/').next().unwrap_or("sh");
            (user.shell.clone(), vec![format!("-{name}")])
        }
        ("", argv) => (argv[0].clone(), argv.to_vec()),
        (path, []) => (path.to_owned(), vec![path.to_owned()]),
        (path, argv) => (path.to_owned(), argv.to_vec()),
    };
    Command {
        candidates: candidates(&program, env.get("PATH").map_or(PATH_DEFAULT, String::as_str)),
        argv,
        env: env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        dir: if start.dir.is_empty() { user.home.clone() } else { start.dir.clone() },
    }
}

/// Where a shell would look for `program`.
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.contains('/') || program.is_empty() {
        return vec![program.to_owned()];
    }
    let folders = path.split(':').map(|folder| if folder.is_empty() { "." } else { folder.trim_end_matches('/') });
    folders.map(|folder| format!("{folder}/{program}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nsprite:x:1001:1002:,,,:/home/sprite:/bin/zsh\nodd:x:7:7::/:\nbroken\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:sprite,other\nsprite:x:1002:\ndocker:x:999:sprite\n";

    fn start(argv: &[&str]) -> ExecStart {
        ExecStart { argv: argv.iter().map(|word| (*word).to_owned()).collect(), ..ExecStart::default() }
    }

    #[test]
    fn users_are_found_with_their_groups() {
        let user = User::find("", PASSWD, GROUP).unwrap();
        assert_eq!((user.name.as_str(), user.shell.as_str()), ("sprite", "/bin/zsh"));
        assert_eq!(user.credentials, Credentials { uid: 1001, gid: 1002, groups: vec![1002, 27, 999] });
        assert_eq!(User::find("odd", PASSWD, GROUP).unwrap().shell, "/bin/sh");
        assert_eq!(User::find("nobody-knows", PASSWD, GROUP), None);
        assert_eq!(User::find("broken", PASSWD, GROUP), None);
    }

    #[test]
    fn a_sprite_without_etc_can_still_be_entered() {
        assert_eq!(User::find("", "", "").unwrap().credentials.uid, 1000);
        assert_eq!(User::find("root", "", "").unwrap().credentials.uid, 0);
    }

    #[test]
    fn nothing_to_run_is_a_login_shell() {
        let user = User::find("", PASSWD, GROUP).unwrap();
        let command = command(&start(&[]), &user, &BTreeMap::new());
        assert_eq!(
            (command.candidates.as_slice(), command.argv.as_slice()),
            (&["/bin/zsh".to_owned()][..], &["-zsh".to_owned()][..])
        );
        assert_eq!(command.dir, "/home/sprite");
    }

    #[test]
    fn environments_are_merged_and_decide_the_search() {
        let user = User::find("", PASSWD, GROUP).unwrap();
        let sprite: BTreeMap<_, _> =
            [("A", "sprite"), ("B", "sprite")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let mut wanted = start(&["ls", "-l"]);
        wanted.env = [("A", "client"), ("PATH", "/x/::/y")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let command = command(&wanted, &user, &sprite);
        assert_eq!(command.candidates, ["/x/ls", "./ls", "/y/ls"]);
        for pair in ["A=client", "B=sprite", "HOME=/home/sprite", "USER=sprite", "LANG=C.UTF-8"] {
            assert!(command.env.iter().any(|known| known == pair), "{pair} is missing in {:?}", command.env);
        }
    }

    #[test]
    fn the_program_may_differ_from_the_first_argument() {
        let user = User::find("", PASSWD, GROUP).unwrap();
        let mut wanted = start(&["sh", "-c", "x"]);
        wanted.path = "/bin/busybox".into();
        let command = command(&wanted, &user, &BTreeMap::new());
        assert_eq!((command.candidates.as_slice(), command.argv[0].as_str()), (&["/bin/busybox".to_owned()][..], "sh"));
    }
}
