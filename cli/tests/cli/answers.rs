//! What commands print, and what they ask the API for.

use std::process::Stdio;

use serde_json::Value;

use crate::{
    fake::Fake,
    run::{command, sprite, wait, with_input},
};

#[test]
fn create_says_what_it_made_and_how_long_it_took() {
    let fake = Fake::start();
    let said = sprite(
        &fake,
        &[
            "create",
            "demo",
            "--skip-console",
            "--label",
            "a",
            "--label",
            "b",
            "--size",
            "l",
            "--idle-timeout",
            "2m",
            "--always-on",
        ],
    )
    .code(0)
    .text();
    let seconds =
        said.strip_prefix("✓ Created demo sprite in ").and_then(|rest| rest.strip_suffix("s\n")).expect(&said);
    assert!(seconds.parse::<f64>().unwrap() < 60.0 && seconds.split_once('.').unwrap().1.len() == 1, "{said}");
    let asked = fake.log().into_iter().find(|line| line.starts_with("create ")).unwrap();
    let body: Value = serde_json::from_str(asked.strip_prefix("create ").unwrap()).unwrap();
    assert_eq!(
        body,
        serde_json::json!({"name": "demo", "labels": ["a", "b"], "size": "l", "idle_timeout": "120s", "always_on": true})
    );
    // Without a terminal no console is tried.
    sprite(&fake, &["create", "-s", "other"]).code(0).says("Created other sprite");
    let made: Value = serde_json::from_slice(&sprite(&fake, &["create", "--json"]).code(0).out).unwrap();
    assert!(made["name"].as_str().unwrap().len() > 4);
}

#[test]
fn names_that_cannot_be_are_explained() {
    let fake = Fake::start();
    for (name, word) in [("", "name"), ("Upper", "name"), ("taken", "exists")] {
        sprite(&fake, &["create", name, "--skip-console"]).code(1).says(word);
    }
}

#[test]
fn an_unknown_sprite_is_named_in_every_refusal() {
    let fake = Fake::start();
    for arguments in [
        &["info", "nobody"][..],
        &["url", "nobody"],
        &["sleep", "-s", "nobody"],
        &["wake", "nobody"],
        &["wake", "nobody", "--every", "1h"],
        &["resize", "nobody", "--disk", "200G"],
        &["destroy", "nobody", "--force"],
        &["destroy", "nobody"],
        &["checkpoint", "create", "-s", "nobody"],
        &["checkpoint", "list", "-s", "nobody"],
        &["restore", "v1", "-s", "nobody"],
        &["sessions", "list", "-s", "nobody"],
        &["proxy", "0:80", "-s", "nobody"],
        &["config", "update", "nobody", "--always-on", "true"],
        &["use", "nobody"],
    ] {
        let refused = sprite(&fake, arguments).code(1).says("\"nobody\" not found");
        assert!(refused.out.is_empty(), "{arguments:?}: stdout is for answers");
    }
}

#[test]
fn the_list_has_every_page() {
    let fake = Fake::start();
    let listed = sprite(&fake, &["list", "--prefix", "x"]).code(0).text();
    let names: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["NAME", "alpha", "beta", "demo", "zeta"]);
    assert!(
        listed.contains("warm (suspended)")
            && listed.contains("1.4 GiB of 100 GiB")
            && listed.contains("https://demo-abcdef"),
        "{listed}"
    );
    assert!(fake.heard("prefix=x"));
    let all: Vec<Value> = serde_json::from_slice(&sprite(&fake, &["ls", "--json"]).code(0).out).unwrap();
    assert_eq!(all.len(), 4);
    assert!(sprite(&fake, &["list", "-w"]).code(1).text().ends_with("demo  running\n"));
}

#[test]
fn a_reader_that_leaves_is_no_panic() {
    let fake = Fake::start();
    let mut child =
        command(&fake, &["list"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let status = wait(&mut child).unwrap();
    let mut err = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut err).unwrap();
    assert_eq!((status.code(), err.as_str()), (Some(141), ""));
}

#[test]
fn info_and_url_answer_on_stdout() {
    let fake = Fake::start();
    let info = sprite(&fake, &["info", "demo"]).code(0).text();
    assert!(info.contains("warm (suspended)") && info.contains("private"), "{info}");
    let object: Value = serde_json::from_slice(&sprite(&fake, &["info", "-s", "demo", "--json"]).code(0).out).unwrap();
    assert_eq!(object["name"], "demo");
    sprite(&fake, &["info", "demo", "-s", "other"]).code(2).says("which sprite");
    for arguments in [
        &["url", "demo"][..],
        &["url", "-s", "demo"],
        &["url", "demo", "--public"],
        &["url", "update", "--auth", "public", "-s", "demo"],
    ] {
        assert_eq!(sprite(&fake, arguments).code(0).text(), "https://demo-abcdef.sprites.localhost\n", "{arguments:?}");
    }
    assert_eq!(
        fake.log().iter().filter(|line| line.as_str() == r#"update {"url_settings":{"auth":"public"}}"#).count(),
        2
    );
    sprite(
        &fake,
        &["config", "update", "-s", "demo", "--url-auth", "sprite", "--label", "x", "--idle-timeout", "never"],
    )
    .code(0);
    assert!(
        fake.heard(r#"{"idle_timeout":"never","labels":["x"],"url_settings":{"auth":"sprite"}}"#),
        "{:?}",
        fake.log()
    );
    sprite(&fake, &["config", "update", "-s", "demo"]).code(2).says("nothing to change");
}

#[test]
fn sleep_wake_and_resize_say_what_they_want() {
    let fake = Fake::start();
    sprite(&fake, &["sleep", "demo"]).code(0);
    sprite(&fake, &["sleep", "-s", "demo", "--cold"]).code(0);
    sprite(&fake, &["sleep", "demo", "--paused"]).code(0);
    sprite(&fake, &["wake", "demo"]).code(0);
    sprite(&fake, &["wake", "demo", "--at", "2999-01-01T00:00:00Z", "--every", "1d"]).code(0).says("2999");
    sprite(&fake, &["resize", "demo", "--disk", "1.5T"]).code(0).says("1.5 TiB");
    sprite(&fake, &["sync", "demo"]).code(0).says("in the bucket");
    sprite(&fake, &["create", "copy", "--from", "demo@v3", "--skip-console"]).code(0);
    let bodies: Vec<String> = fake.log().into_iter().filter(|line| line.contains('{')).collect();
    let expected = [
        r#"sleep {"to":"suspended"}"#,
        r#"sleep {"to":"cold"}"#,
        r#"sleep {"to":"paused"}"#,
        "wake {}",
        r#"wake {"at":["2999-01-01T00:00:00Z"],"every":"86400s"}"#,
        r#"resize {"disk_bytes":1649267441664}"#,
        "sync {}",
        r#"create {"from":{"checkpoint":"v3","sprite":"demo"},"name":"copy"}"#,
    ];
    assert_eq!(bodies, expected);
    for bad in [
        &["sleep", "demo", "--cold", "--paused"][..],
        &["wake", "demo", "--at", "soon"],
        &["resize", "demo", "--disk", "10"],
        &["create", "x", "--idle-timeout", "5"],
        &["create", "x", "--from", "@v3"],
    ] {
        sprite(&fake, bad).code(2);
    }
}

#[test]
fn checkpoints_are_made_listed_restored_and_deleted() {
    let fake = Fake::start();
    let made = sprite(&fake, &["checkpoint", "create", "-s", "demo", "--comment", "before", "--durable"]).code(0);
    assert!(made.text().starts_with("✓ Checkpoint v3 created successfully in "), "{}", made.text());
    assert!(fake.heard(r#"{"comment":"before","durable":true}"#));
    sprite(&fake, &["checkpoint", "create", "-s", "demo", "--comment", "fail"]).code(1).says("the disk is full");
    sprite(&fake, &["checkpoint", "create", "-s", "demo", "--comment", "break"]).code(1).says("broke off");
    let listed = sprite(&fake, &["checkpoint", "list", "-s", "demo", "--include-auto"]).code(0).text();
    assert!(listed.contains("v1") && listed.contains("before the mess") && listed.contains("Current"), "{listed}");
    sprite(&fake, &["checkpoint", "info", "v1", "-s", "demo"]).code(0).says("v1");
    sprite(&fake, &["checkpoint", "delete", "v2", "-s", "demo"]).code(0);
    sprite(&fake, &["checkpoint", "delete", "v1", "-s", "demo"]).code(1).says("restore another one first");
    sprite(&fake, &["restore", "v1", "-s", "demo"]).code(0).says("Restored v1");
    sprite(&fake, &["checkpoint", "restore", "v1", "-s", "demo"]).code(0);
    for bad in ["v9", "x", "v-1", "v99999999999999999999"] {
        sprite(&fake, &["restore", bad, "-s", "demo"]).code(1).says("checkpoint not found");
    }
}

#[test]
fn destroy_does_not_go_without_a_word() {
    let fake = Fake::start();
    sprite(&fake, &["destroy", "demo"]).code(2).says("--force");
    assert!(!fake.heard("DELETE"));
    sprite(&fake, &["destroy", "demo", "--force"]).code(0).says("Destroyed demo");
    assert!(fake.heard("DELETE /v1/sprites/demo"));
}

#[test]
fn a_folder_can_have_a_sprite() {
    let fake = Fake::start();
    sprite(&fake, &["info"]).code(2).says("sprite use");
    sprite(&fake, &["use", "demo"]).code(0);
    assert_eq!(sprite(&fake, &["use"]).code(0).text(), "demo\n");
    sprite(&fake, &["info"]).code(0).says("demo");
    let choice: Value = serde_json::from_slice(&std::fs::read(fake.home().join(".sprite")).unwrap()).unwrap();
    assert_eq!(choice, serde_json::json!({"organization": "acme", "sprite": "demo"}));
    sprite(&fake, &["use", "--unset"]).code(0);
    sprite(&fake, &["info"]).code(2);
}

#[test]
fn a_token_is_checked_kept_and_forgotten() {
    let fake = Fake::start();
    let bare = |arguments: &[&str]| {
        let mut command = command(&fake, arguments);
        command.env_remove("SPRITES_API_URL").env_remove("SPRITE_TOKEN");
        command
    };
    with_input(bare(&["list"]), b"").code(2).says("./dev up");
    with_input(bare(&["login", &fake.url(), "--token", "wrong/1/2/3"]), b"").code(1).says("authentication failed");
    with_input(bare(&["list"]), b"").code(2);
    with_input(bare(&["login", &fake.url()]), b"acme/org/tok/secret\n").code(0).says("as acme");
    with_input(bare(&["list"]), b"").code(0);
    with_input(bare(&["org", "list"]), b"").code(0).says("acme");
    with_input(bare(&["logout"]), b"").code(0).says("1 token");
    with_input(bare(&["auth", "setup", "--token", "acme/org/tok/secret", "--url", &fake.url()]), b"").code(0);
    with_input(bare(&["list"]), b"").code(0);
    with_input(bare(&["list", "-o", "other"]), b"").code(2).says("no token of other");
}

#[test]
fn the_api_can_be_called_by_hand() {
    let fake = Fake::start();
    let object: Value = serde_json::from_slice(&sprite(&fake, &["api", "/v1/sprites/demo"]).code(0).out).unwrap();
    assert_eq!(object["name"], "demo");
    sprite(&fake, &["api", "-s", "demo", "checkpoints"]).code(0).says("before the mess");
    sprite(&fake, &["api", "-s", "demo", "sleep", "-d", "{\"to\":\"cold\"}"]).code(0);
    assert!(fake.heard(r#"sleep {"to":"cold"}"#));
    sprite(&fake, &["api", "/v1/sprites/demo", "--", "-X", "PUT", "-d", "{}", "-i"]).code(0).says("200 OK");
    sprite(&fake, &["api", "/v1/sprites/nobody"]).code(1).says("sprite not found");
}

#[test]
fn every_shell_gets_a_script_that_knows_the_commands() {
    let fake = Fake::start();
    for shell in ["bash", "zsh", "fish"] {
        sprite(&fake, &["completion", shell]).code(0).says("checkpoint");
    }
    let script = fake.home().join("script");
    std::fs::write(&script, sprite(&fake, &["completion", "bash"]).out).unwrap();
    let line =
        "source ./script && COMP_WORDS=(sprite che) COMP_CWORD=1 && _sprite sprite che sprite && echo ${COMPREPLY[*]}";
    let output = std::process::Command::new("bash").args(["-c", line]).current_dir(fake.home()).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "checkpoint checkpoints",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn help_and_version_need_no_cluster() {
    let fake = Fake::start();
    for arguments in [&["--version"][..], &["help", "exec"], &["checkpoint", "create", "--help"], &["--help"]] {
        let mut command = command(&fake, arguments);
        command.env_remove("SPRITES_API_URL").env_remove("SPRITE_TOKEN").env_remove("HOME");
        with_input(command, b"").code(0).says("sprite");
    }
    sprite(&fake, &["exec", "--no-such-flag", "-s", "demo", "--", "true"]).code(2);
    sprite(&fake, &["no-such-command"]).code(2);
}

/// It cost 50 ms of every command; `.cargo/config.toml` says what replaces it.
#[test]
fn no_command_waits_for_jitter_entropy() {
    let binary = std::fs::read(env!("CARGO_BIN_EXE_sprite")).unwrap();
    let has = |symbol: &[u8]| binary.windows(symbol.len()).any(|bytes| bytes == symbol);
    assert!(has(b"RAND_bytes"), "the binary has its symbols, or this test sees nothing");
    assert!(!has(b"jent_read_entropy"), "AWS-LC was built without AWS_LC_SYS_NO_JITTER_ENTROPY");
}
