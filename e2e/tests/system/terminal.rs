//! Interactive use, in a real terminal as a person has one.

use std::sync::OnceLock;

use e2e::{Cluster, Sprite, Terminal};

fn sprite() -> &'static Sprite<'static> {
    static SPRITE: OnceLock<Sprite<'static>> = OnceLock::new();
    SPRITE.get_or_init(|| Cluster::shared().new_sprite("tty"))
}

/// `sprite exec --tty` of a shell line.
fn terminal(line: &str) -> Terminal {
    Terminal::open(&sprite().exec_command(&["--tty"], &["bash", "-c", line]))
}

#[test]
fn a_command_sees_a_terminal_and_gives_its_exit_code() {
    let mut here = terminal("test -t 0 && test -t 1 && echo it is; exit 3");
    here.shows("it is");
    here.ends_with(3);
    // Without a terminal in between there is none inside either.
    sprite().exec(&["test", "-t", "1"]).code(1);
    let mut here = terminal("echo $TERM; locale charmap; echo ünï");
    here.shows("xterm");
    here.shows("ünï");
    here.ends_with(0);
}

#[test]
fn keys_reach_the_foreground_process() {
    let mut here = terminal("trap 'echo stopped by hand; exit 5' INT; echo go; while :; do read -r -t 1; done");
    here.shows("go");
    here.press("\x03");
    here.shows("stopped by hand");
    here.ends_with(5);
    let mut here = terminal("read -p 'name? ' -r name; echo hello $name");
    here.shows("name? ");
    here.press("wörld\r");
    here.shows("hello wörld");
    here.ends_with(0);
}

#[test]
fn the_window_and_its_resizes_are_seen_inside() {
    let mut here = terminal("trap 'stty size; exit 0' WINCH; stty size; while :; do read -r -t 1; done");
    here.shows("30 100");
    here.resize(50, 132);
    here.shows("50 132");
    here.ends_with(0);
}

#[test]
fn jobs_are_stopped_and_continued_in_the_console() {
    let cluster = Cluster::shared();
    let mut here = Terminal::open(&cluster.sprite_command(["console", "-s", &sprite().name]));
    here.shows("sprite@");
    here.press("bash -c 'trap \"echo not interrupted\" INT; echo began; sleep 1000; exit 9'\r");
    here.shows("began\r\n");
    here.press("\x1a");
    here.shows("Stopped");
    here.press("echo the shell is $((40 + 2)) again; fg\r");
    here.shows("is 42 again");
    here.shows("sleep 1000");
    here.press("\x03");
    here.shows("not interrupted");
    here.press("echo its code: $?\r");
    here.shows("its code: 9");
    here.press("\x04");
    here.ends_with(0);
}

#[test]
fn vim_edits_a_file() {
    let mut here = terminal("cd; rm -f note; LC_ALL=C.UTF-8 vim note");
    here.shows("[New");
    here.press("iünï 🎈 first\rsecond");
    here.shows("second");
    here.press("\x1b:wq\r");
    here.ends_with(0);
    assert_eq!(sprite().sh("cat ~/note"), "ünï 🎈 first\nsecond");
}

#[test]
fn top_draws_again_and_again_until_it_is_left() {
    let mut here = terminal("top -d 0.5");
    for _ in 0..3 {
        here.shows("load average");
    }
    here.press("q");
    here.ends_with(0);
}
