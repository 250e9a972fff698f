//! What an operator gets from good and bad configuration files.

use std::fs;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const FILE: &str = "/etc/prestage/prestaged.toml";

fn read(text: &str) -> Result<Config, String> {
    Config::from_toml(Path::new(FILE), text).map_err(|error| error.to_string())
}

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!(read(""), Ok(Config::default()));
}

#[test]
fn the_reference_file_is_the_defaults_as_it_stands_and_with_every_key_uncommented() {
    let text = Config::default_toml();
    assert_eq!(read(&text), Ok(Config::default()), "{text}");
    let mut keys = 0;
    let mut set = String::new();
    for line in text.lines() {
        match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => {
                keys += 1;
                set.push_str(rest);
            }
            _ => set.push_str(line),
        }
        set.push('\n');
    }
    assert!(keys > 20, "only {keys} keys in\n{text}");
    assert_eq!(read(&set), Ok(Config::default()), "{set}");
}

#[test]
fn an_unknown_key_is_named_with_file_line_and_a_suggestion() {
    let text = "# a\n\n[cache]\nram_szie = \"1GiB\"\n";
    assert_eq!(read(text).unwrap_err(), format!("{FILE}:4: unknown key `cache.ram_szie`; did you mean `ram_size`?"));
    let text = "[daemon]\nram_size = \"1GiB\"\n";
    assert_eq!(read(text).unwrap_err(), format!("{FILE}:2: unknown key `daemon.ram_size`; it belongs in `[cache]`"));
    let text = "[chache]\nram_size = \"1GiB\"\n";
    assert_eq!(read(text).unwrap_err(), format!("{FILE}:1: unknown section `chache`; did you mean `cache`?"));
    let text = "verbose = true\n";
    assert!(read(text).unwrap_err().starts_with(&format!("{FILE}:1: unknown key `verbose`; known are daemon, cache")));
}

#[test]
fn every_mistake_is_reported_at_once_in_file_order() {
    let text = "[prefetch]\nthreshold = 1.5\n[cache]\nram_size = \"1MiB\"\nssd_path = \"cache.ssd\"\nshards = 0\n[learner]\nsave_interval = 5\n";
    let error = read(text).unwrap_err();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(
        lines,
        [
            format!("{FILE}:2: `prefetch.threshold`: 1.5 is not a probability; it is 0 to 1"),
            format!("{FILE}:4: `cache.ram_size`: \"1MiB\" is too small; at least \"16MiB\" is needed"),
            format!("{FILE}:5: `cache.ssd_path`: `cache.ssd` is not an absolute path; start it with `/`"),
            format!("{FILE}:6: `cache.shards`: 0 is out of range; it is 1 to 64"),
            format!("{FILE}:8: `learner.save_interval`: expected a duration such as \"5s\", found a whole number"),
        ]
    );
}

#[test]
fn broken_toml_names_the_line() {
    let error = read("[cache]\nram_size = \n").unwrap_err();
    assert!(error.starts_with(&format!("{FILE}:2: not valid TOML: ")), "{error}");
    let error = read("[cache]\nshards = 1\nshards = 2\n").unwrap_err();
    assert!(error.starts_with(&format!("{FILE}:3: not valid TOML: ")), "{error}");
}

#[test]
fn values_arrive_in_their_units() {
    let config = read(
        "[cache]\nram_size = \"25%\"\nhuge_pages = \"require\"\nssd_path = \"/dev/nvme0n1p4\"\nssd_size = \"1.5GiB\"\nshards = 3\n\
         [prefetch]\nrate_per_store = \"100MiB/s\"\nthreshold = 1\n[store]\nretry_for = \"2m\"\n[api]\nmode = 0o600\n\
         [[disk]]\nname = \"a\"\nstore = \"/x\"\nread_only = true\n[[disk]]\nname = \"b\"\nstore = \"nbd://h/e\"\nsocket = \"/run/b\"\nvm = \"b\"\n",
    )
    .unwrap();
    assert_eq!(config.cache.ram_size.resolve(1 << 30), 1 << 28);
    assert_eq!(config.cache.huge_pages, HugePages::Require);
    assert_eq!(config.cache.ssd_size, Bytes(3 << 29));
    assert_eq!(
        (config.shard_count(64), Config::default().shard_count(64), Config::default().shard_count(2)),
        (3, 8, 1)
    );
    assert_eq!(config.prefetch.rate_per_store, RateLimit::BytesPerSecond(100 << 20));
    assert_eq!(config.store.retry_for, Duration::from_secs(120));
    assert_eq!(config.api.mode, Mode(0o600));
    assert_eq!(config.disks.len(), 2);
    assert!(config.disks[0].read_only && config.disks[0].socket.is_none());
    assert_eq!(config.disks[1].socket.as_deref(), Some(Path::new("/run/b")));
    assert!(host_ram_bytes().unwrap() > 1 << 20);
}

#[test]
fn nbd_over_tcp_needs_certificates() {
    let error = read("[nbd]\nmax_clients = 4\nlisten = \"127.0.0.1:10809\"\ntls_key = \"/k\"\n").unwrap_err();
    let wanted = "TCP is for clients with certificates only: set nbd.tls_cert, nbd.tls_client_ca as well";
    assert_eq!(error, format!("{FILE}:3: `nbd.listen`: {wanted}"));
    assert!(read("[nbd]\nlisten = \"localhost\"\n").unwrap_err().contains("an address and a port"));
    let files = "tls_cert = \"/c\"\ntls_key = \"/k\"\ntls_client_ca = \"/a\"\n";
    let config = read(&format!("[nbd]\nlisten = \"[::1]:10809\"\n{files}")).unwrap();
    assert_eq!(config.nbd.listen, Some("[::1]:10809".parse().unwrap()));
    assert!(read(&format!("[nbd]\n{files}")).is_ok(), "without TCP they are not needed, and do no harm");
}

#[test]
fn bad_disks_are_refused_with_their_line() {
    let error = read("[[disk]]\nname = \"../x\"\nstore = \"/x\"\n").unwrap_err();
    assert!(error.starts_with(&format!("{FILE}:2: `disk.name`: `../x` is not a disk name")), "{error}");
    let error = read("[[disk]]\nname = \"x\"\n").unwrap_err();
    assert_eq!(error, format!("{FILE}:1: `disk.store`: a `[[disk]]` needs `store`"));
    for (store, expected) in [
        ("", "it is empty"),
        ("images/x.raw", "`images/x.raw` is not an absolute path"),
        ("nbd+unix:///x", "`?socket=` is missing"),
        ("rbd:pool/x", "write /path/to/disk.img, nbd://host:port/export"),
    ] {
        let error = read(&format!("[[disk]]\nname = \"x\"\nstore = \"{store}\"\n")).unwrap_err();
        assert!(error.starts_with(&format!("{FILE}:3: `disk.store`: ")) && error.contains(expected), "{error}");
    }
    let error = read("[disk]\nname = \"x\"\n").unwrap_err();
    assert!(error.contains("double brackets"), "{error}");
    let error = read("[[disk]]\nname = \"x\"\nstore = \"/x\"\n[[disk]]\nname = \"x\"\nstore = \"/y\"\n").unwrap_err();
    assert!(error.contains("declared twice; first at line 1"), "{error}");
}

#[test]
fn webhooks_are_read_and_what_is_wrong_is_told_with_its_line() {
    let config = read(
        "[[webhook]]\nurl = \"https://m.example:8443/x?key=1\"\nsecret_file = \"/s\"\nevents = [\"anomaly\"]\nca_file = \"/ca\"\n\
         [[webhook]]\nname = \"b\"\nurl = \"http://10.0.0.1/\"\nsecret_file = \"cred\"\nallow_http = true\n",
    )
    .unwrap();
    let [first, second] = config.webhooks.as_slice() else { panic!("{:?}", config.webhooks) };
    assert_eq!((first.name.as_str(), first.events.as_deref()), ("m.example:8443", Some(&["anomaly".to_owned()][..])));
    assert_eq!((second.name.as_str(), second.secret_file.as_str(), second.events.as_deref()), ("b", "cred", None));
    assert_eq!(first.to_string(), "https://m.example:8443, secret /s, events anomaly");
    let changes = diff(&config, &Config::default());
    assert_eq!(
        changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>(),
        ["webhook.b", "webhook.m.example:8443"]
    );
    let good = "[[webhook]]\nurl = \"https://h/\"\nsecret_file = \"/s\"\n";
    for (text, expected) in [
        ("[webhook]\nurl = \"x\"\n".to_owned(), ":1: expected `[[webhook]]`"),
        ("[[webhook]]\nurl = \"https://h/\"\n".to_owned(), ":1: `webhook.secret_file`: a `[[webhook]]` needs"),
        ("[[webhook]]\nsecret_file = \"/s\"\n".to_owned(), ":1: `webhook.url`: a `[[webhook]]` needs `url`"),
        (format!("{good}event = []\n"), ":4: unknown key `webhook.event`; did you mean `events`?"),
        (format!("{good}events = []\n"), ":4: `webhook.events`: it is empty"),
        (format!("{good}events = [\"x\"]\n"), "`x` is no kind of event; there are resources.prestaged, "),
        (format!("{good}events = \"x\"\n"), "expected a list such as"),
        (format!("{good}ca_file = \"x\"\n"), "`webhook.ca_file`: `x` is not an absolute path"),
        (format!("{good}{good}"), ":4: `webhook.name`: webhook `h` is declared twice, first at line 1"),
        (good.replace("https", "http"), ":2: `webhook.url`: http:// to h would show"),
        (good.replace("/s", "a/s"), ":3: `webhook.secret_file`: `a/s` is neither"),
        (good.replace("https://", "ftp://"), "neither `https://` nor `http://`"),
    ] {
        let error = read(&text).unwrap_err();
        assert!(error.contains(expected) && error.starts_with(FILE), "{text}\n{error}");
    }
    let many: String = (0..17).map(|n| good.replace("h/", &format!("h{n}/"))).collect();
    assert!(read(&many).unwrap_err().contains("there are 17 webhooks; at most 16"));
}

#[test]
fn drop_ins_win_in_lexical_order_and_the_command_line_wins_over_all() {
    let folder = tempfile::tempdir().unwrap();
    let main = folder.path().join("prestaged.toml");
    let drop_in = folder.path().join("prestaged.toml.d");
    fs::create_dir(&drop_in).unwrap();
    fs::write(&main, "[cache]\nram_size = \"64MiB\"\nssd_size = \"1GiB\"\n[[disk]]\nname = \"a\"\nstore = \"/old\"\n")
        .unwrap();
    fs::write(drop_in.join("20-b.toml"), "[cache]\nram_size = \"128MiB\"\nshards = 2\n").unwrap();
    fs::write(
        drop_in.join("10-a.toml"),
        "[cache]\nram_size = \"96MiB\"\nshards = 4\n[[disk]]\nname = \"a\"\nstore = \"/new\"\n",
    )
    .unwrap();
    fs::write(drop_in.join("30-c.toml.bak"), "[nonsense]\n").unwrap();
    fs::write(drop_in.join(".hidden.toml"), "[nonsense]\n").unwrap();
    let config = Config::load(&main, &[]).unwrap();
    assert_eq!(config.cache.ram_size, RamSize::Bytes(128 << 20));
    assert_eq!(config.cache.shards, Count::Fixed(2));
    assert_eq!(config.cache.ssd_size, Bytes(1 << 30));
    assert_eq!(config.disks.len(), 1);
    assert_eq!(config.disks[0].store, "/new");
    assert_eq!(Config::files(&main).unwrap().len(), 3);

    let overrides = ["cache.ram_size=256MiB".to_owned(), "prefetch.enabled=false".to_owned()];
    let config = Config::load(&main, &overrides).unwrap();
    assert_eq!(config.cache.ram_size, RamSize::Bytes(256 << 20));
    assert!(!config.prefetch.enabled);
    let error = Config::load(&main, &["cache.shards=99".to_owned()]).unwrap_err().to_string();
    assert_eq!(error, "--set cache.shards=99: `cache.shards`: 99 is out of range; it is 1 to 64");
    assert!(Config::load(&main, &["shards".to_owned()]).unwrap_err().to_string().contains("section.key=value"));

    fs::write(drop_in.join("40-d.toml"), "\n[cache]\nnope = 1\n").unwrap();
    let error = Config::load(&main, &[]).unwrap_err().to_string();
    assert!(error.contains("40-d.toml:3: unknown key `cache.nope`"), "{error}");
}

#[test]
fn a_missing_file_says_how_to_get_one() {
    let error = Config::load(Path::new("/nonexistent/prestaged.toml"), &[]).unwrap_err().to_string();
    assert!(
        error.starts_with("/nonexistent/prestaged.toml: there is no such file; `prestagectl config default`"),
        "{error}"
    );
}

#[test]
fn a_reload_knows_what_needs_a_restart() {
    let old = read("[[disk]]\nname = \"a\"\nstore = \"/a\"\n[[disk]]\nname = \"b\"\nstore = \"/b\"\n").unwrap();
    let new = read(
        "[daemon]\nlog = \"debug\"\n[cache]\nssd_path = \"/x\"\n[[disk]]\nname = \"b\"\nstore = \"/c\"\n[[disk]]\nname = \"c\"\nstore = \"/d\"\n",
    )
    .unwrap();
    let changes = diff(&old, &new);
    let short: Vec<(&str, bool)> = changes.iter().map(|change| (change.key.as_str(), change.needs_restart)).collect();
    assert_eq!(
        short,
        [("daemon.log", false), ("cache.ssd_path", true), ("disk.a", false), ("disk.b", false), ("disk.c", false)]
    );
    assert_eq!((changes[1].old.as_deref(), changes[1].new.as_deref()), (None, Some("\"/x\"")));
    assert!(diff(&new, &new).is_empty());
}

/// A configuration in which no setting has its default, and every one can be had.
fn all_other() -> Config {
    let text = Config::default_toml();
    let (mut other, mut section, mut about) = (String::new(), String::new(), String::new());
    for line in text.lines() {
        if line.starts_with("[[") || line.starts_with("#[[") {
            break;
        }
        if let Some(more) = line.strip_prefix("# ") {
            about += more;
            about.push(' ');
            continue;
        }
        // Of those without a default, and of lists.
        let about = std::mem::take(&mut about);
        let example = about.split_once("Example: ").map(|(_, example)| example.trim());
        if let Some(example) = example {
            other += &format!("{example}\n");
        }
        if line.starts_with('[') {
            other += &format!("{line}\n");
            section = line.trim_matches(['[', ']']).to_owned();
            continue;
        }
        let Some((key, value)) = line
            .strip_prefix('#')
            .filter(|key| key.starts_with(|c: char| c.is_ascii_lowercase()))
            .and_then(|line| line.split_once(" = "))
        else {
            continue;
        };
        if example.and_then(|example| example.split_once(" = ")).is_some_and(|(named, _)| named == key) {
            continue;
        }
        let tried = [
            "true",
            "false",
            "\"debug\"",
            "\"/other\"",
            "\"other\"",
            "\"128MiB\"",
            "\"2MiB/s\"",
            "\"no\"",
            "\"thread_pool\"",
            "0.25",
            "0.5",
            "2",
            "3",
            "16",
            "32",
            "100",
            "20000",
            "0o600",
            "\"0600\"",
            "\"600\"",
            "\"2s\"",
            "\"7s\"",
            "\"2m\"",
            "\"2h\"",
            "\"2d\"",
            "\"qemu:///session\"",
            "\"127.0.0.1:1\"",
            "\"group\"",
            "\"off\"",
            "[\"/other\"]",
        ];
        let fits = |other: &&&str| {
            let read = read(&format!("[{section}]\n{key} = {other}\n"));
            **other != value
                && read.is_ok_and(|read| {
                    diff(&read, &Config::default()).iter().any(|change| change.key == format!("{section}.{key}"))
                })
        };
        let found = tried.iter().find(fits).unwrap_or_else(|| panic!("no other value for {section}.{key} = {value}"));
        other += &format!("{key} = {found}\n");
    }
    other += "[[disk]]\nname = \"a\"\nstore = \"/a\"\n[[webhook]]\nurl = \"https://h/\"\nsecret_file = \"/s\"\n";
    read(&other).unwrap()
}

/// Every setting there is: one that a reload changes is in effect after it, one that needs a restart is not.
#[test]
fn a_reload_takes_over_what_needs_no_restart_and_nothing_else() {
    let (old, new) = (Config::default(), all_other());
    let all = diff(&old, &new);
    let settings = Config::default_json();
    let known: usize = settings.as_object().unwrap().values().map(|section| section.as_object().unwrap().len()).sum();
    // Those without a default are not in that list.
    assert!(all.len() > known, "{} of more than {known} settings", all.len());
    let after = reloaded(&old, &new);
    let keys = |changes: Vec<Change>, restart: bool| {
        assert!(changes.iter().all(|change| change.needs_restart == restart), "{changes:?}");
        changes.into_iter().map(|change| change.key).collect::<Vec<_>>()
    };
    let (taken, left) = (keys(diff(&old, &after), false), keys(diff(&after, &new), true));
    assert_eq!(taken.len() + left.len(), all.len());
    for key in ["daemon.log", "cache.ram_size", "cache.ssd_size", "store.image_folder", "disk.a", "webhook.h"] {
        assert!(taken.iter().any(|taken| taken == key), "{key} is not in {taken:?}");
    }
    for key in ["daemon.state_dir", "cache.ssd_path", "cache.shards", "demand.every", "memory.helper"] {
        assert!(left.iter().any(|left| left == key), "{key} is not in {left:?}");
    }
}

proptest! {
    #[test]
    fn any_text_is_a_configuration_or_an_error_with_a_place(text in "(\\[(cache|daemon|disk|x)\\]\n|[a-z_]{1,9} = [0-9a-z\"%.\\[\\]{}-]{0,8}\n|\\PC{0,12}\n){0,8}") {
        if let Err(error) = read(&text) {
            prop_assert!(error.starts_with(FILE), "{}", error);
        }
    }
}

/// Words that other programs have for a level, of which the parser makes names.
#[test]
fn a_log_filter_is_made_of_levels() {
    let taken = |filter: &str| read(&format!("[daemon]\nlog = \"{filter}\"\n"));
    for word in ["warning", "verbose", "7", "info,verbose", "critical,info", "prestage_cache", "-1"] {
        let error = taken(word).unwrap_err();
        assert!(error.contains("is not a level; use error, warn, info, debug, trace or off"), "{word}: {error}");
    }
    for filter in ["warn", "INFO", "off", "3", "info,prestage_cache=debug", "prestage_cache::ssd", "warn,hyper=off"] {
        assert_eq!(taken(filter).unwrap().daemon.log, filter);
    }
    for filter in ["[span]=debug", "info,[a]=trace", "prestage_cache[span]=info"] {
        assert_eq!(taken(filter).unwrap().daemon.log, filter);
    }
    assert!(taken("prestage_cache=loud").unwrap_err().contains("is not a log filter"));
}
